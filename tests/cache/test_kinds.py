"""What every kind of cache promises, whatever is done with it: against the dense one, and against itself."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer import models
from jaxinfer.cache import Kivi, Paged, Pages, Ring, init_cache
from jaxinfer.cache.kinds import Maker
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PARAMS, LOCAL = tiny_model(num_layers=2, window=5, softcap=9.0)
CONFIG = LOCAL.replace(layers=(LOCAL.layers[0], LOCAL.layers[1].replace(window=None)))  # one has a window, one has not
ROWS, SIZE, PENDING, REWIND = 4, 40, 4, 3
SAME_AS_DENSE = ("auto", "ring", "paged:page=4", "paged:page=3", "paged:page=4,pages=31")
# what a query sees of these depends on positions alone
BY_POSITION = (
    "ring:window=7", "ring:window=6,sinks=2", "streaming:sinks=2,recent=6", "int8", "float8", "paged:page=4+int8",
    "ring:window=7+int8", "paged:page=3+float8", "streaming:sinks=2,recent=6+int8", "int4:group=4,residual=6",
    "dense+int4:group=4,residual=6", "paged:page=8+int4:group=4,residual=6", "ring:window=16+int4:group=4,residual=6",
)  # fmt: skip
WIDTHS = (1, PENDING, 12)  # tokens of a call


@functools.partial(jax.jit, static_argnums=0)
def call(config, ids, cache, num, start=None):
    """Scores of ids from `start` on; they stay pending."""
    step = cache.step(num, ids.shape[1], start)
    (hidden, _), cache = models.decoder(PARAMS, config, ids, cache, step)
    return models.logits(PARAMS, config, hidden), cache


advance, rewind, fork, take, put = (
    jax.jit(lambda cache, *args, name=name: getattr(cache, name)(*args))
    for name in ("advance", "rewind", "fork", "take", "put")
)


class Walk:
    """A cache that is used, and what every row's tokens are."""

    def __init__(self, kind, config=CONFIG, rows=ROWS):
        self.config = config
        self.cache = init_cache(config, rows, SIZE, kind, max_pending=PENDING, max_rewind=REWIND)
        self.texts = [[] for _ in range(rows)]
        self.scores = [{} for _ in range(rows)]  # of the tokens that stayed, by position
        self.highest = [0] * rows  # where a row has been: it may go back REWIND from there

    def feed(self, parts, kept=None, pieces=1):
        """Gives each row its part, in one call or as many; of these tokens the first `kept` stay."""
        num = np.array([len(part) for part in parts])
        kept = num if kept is None else np.minimum(kept, num)
        start, got = np.array([len(text) for text in self.texts]), [[] for _ in parts]
        size = max(-(-int(num.max()) // pieces), 1)
        for first in range(0, int(num.max()), size):
            part = [row[first : first + size] for row in parts]
            count = np.array([len(row) for row in part], np.int32)
            width = next(width for width in WIDTHS if width >= count.max())
            ids = np.zeros((len(parts), width), np.int32)
            for row, out in zip(part, ids, strict=True):
                out[: len(row)] = row
            score, self.cache = call(self.config, ids, self.cache, count, start + first)
            for row, n in enumerate(count):
                got[row] += list(np.asarray(score)[row, :n])
        self.cache = advance(self.cache, np.asarray(kept, np.int32))
        for row, n in enumerate(kept):
            for i in range(n):
                self.scores[row][len(self.texts[row]) + i] = got[row][i]
            self.texts[row] = self.texts[row] + list(parts[row][:n])
            self.highest[row] = max(self.highest[row], len(self.texts[row]))

    def back(self, lengths):
        """Takes tokens back."""
        lengths = [max(n, top - REWIND, 0) for n, top in zip(lengths, self.highest, strict=True)]
        self.cache = rewind(self.cache, np.array(lengths, np.int32))
        self.texts = [text[:n] for text, n in zip(self.texts, lengths, strict=True)]
        self.scores = [{p: s for p, s in held.items() if p < n} for held, n in zip(self.scores, lengths, strict=True)]

    def branch(self, row, source):
        """A row becomes another one."""
        self.cache = fork(self.cache, np.array([row]), np.array([source]))
        self.texts[row], self.scores[row] = list(self.texts[source]), dict(self.scores[source])
        self.highest[row] = self.highest[source]

    def move(self, rows, sources):
        """Rows become what other rows were, by way of a cache of their own."""
        self.cache = put(self.cache, np.array(rows), take(self.cache, np.array(sources)))
        for held in (self.texts, self.scores, self.highest):
            held[:] = [copy.copy(held[sources[rows.index(r)]] if r in rows else held[r]) for r in range(ROWS)]

    def check(self, expected, atol=1e-4):
        """Every score is that of `expected(text)` [T, V]."""
        for text, scores in zip(self.texts, self.scores, strict=True):
            whole = expected(tuple(text)) if text else np.zeros((0, 1))
            for position, score in scores.items():
                np.testing.assert_allclose(score, whole[position], atol=atol, err_msg=f"{position} of {text}")


@functools.lru_cache(maxsize=512)
def alone(kind, text, config=CONFIG):
    """Scores of a text that is read alone, token by token."""
    cache = init_cache(config, 1, SIZE, kind, max_pending=PENDING, max_rewind=REWIND)
    ids, scores = np.array([text], np.int32), []
    for t in range(len(text)):
        score, cache = call(config, ids[:, t : t + 1], cache, np.ones(1, np.int32))
        scores.append(np.asarray(score)[0, 0])
        cache = advance(cache, np.ones(1, np.int32))
    return np.stack(scores)


@functools.lru_cache(maxsize=512)
def dense(text, config=CONFIG):
    """Scores of a text in one call, without any cache to speak of."""
    ids = np.zeros((1, SIZE), np.int32)
    ids[0, : len(text)] = text
    score, _ = call(config, ids, init_cache(config, 1, SIZE, "dense"), np.array([len(text)], np.int32))
    return np.asarray(score)[0]


def is_plain(kind):
    """Whether it keeps the numbers as they are."""
    return not any(word in kind for word in ("int8", "int4", "float8"))


def draw_parts(data, most, texts):
    """Tokens for each row, as many as fit."""
    sizes = [data.draw(st.integers(0, min(most, SIZE - len(text)))) for text in texts]
    seed = data.draw(st.integers(0, 1000))
    return [np.random.default_rng([seed, row]).integers(1, 101, n).tolist() for row, n in enumerate(sizes)]


def walk_about(data, kind):
    """Does this and that with a cache of a kind."""
    walk = Walk(kind)
    for _ in range(data.draw(st.integers(2, 7))):
        match data.draw(st.sampled_from(["read", "draft", "back", "fork", "move"])):
            case "read":
                walk.feed(draw_parts(data, 12, walk.texts))
            case "draft":
                kept = [data.draw(st.integers(0, PENDING)) for _ in walk.texts]
                walk.feed(draw_parts(data, PENDING, walk.texts), kept, pieces=data.draw(st.sampled_from([1, PENDING])))
            case "back":
                walk.back([data.draw(st.integers(0, max(len(text), 1))) for text in walk.texts])
            case "fork":
                walk.branch(data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, ROWS - 1)))
            case "move":
                rows = data.draw(st.permutations(range(ROWS)))[:2]
                walk.move(rows, [data.draw(st.integers(0, ROWS - 1)) for _ in rows])
    return walk


few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", SAME_AS_DENSE)
@few
@given(data=st.data())
def test_a_kind_that_keeps_what_is_seen_equals_dense_whatever_is_done(kind, data):
    walk_about(data, kind).check(dense)


@pytest.mark.parametrize("kind", BY_POSITION)
@few
@given(data=st.data())
def test_what_a_kind_shows_depends_on_the_text_alone_whatever_is_done(kind, data):
    # a key that differs in its last bit may be rounded to the next code
    walk_about(data, kind).check(functools.partial(alone, kind), atol=1e-4 if is_plain(kind) else 0.05)


# --- kinds that drop tokens ----------------------------------------------------------------------------------------

GLOBAL = CONFIG.replace(layers=(CONFIG.layers[1],) * 2)  # no layer has a window
LARGE = ("streaming:sinks=2,recent=40", "h2o:budget=40", "snapkv:budget=40,window=4", "h2o:budget=40,recent=40")


def texts(seed, *lengths):
    return [np.random.default_rng([seed, row]).integers(1, 101, n).tolist() for row, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("config", [CONFIG, GLOBAL])
def test_a_budget_that_all_tokens_fit_in_changes_nothing(kind, config):
    walk = Walk(kind, config)
    walk.feed(texts(0, 12, 3, 7, 0))
    walk.cache = walk.cache.compress(SIZE)
    for seed in range(3):
        walk.feed(texts(seed + 1, 2, 4, 1, 3), pieces=4)
        walk.feed(texts(seed + 9, 4, 4, 2, 1), kept=[3, 1, 0, 1])
    walk.check(functools.partial(dense, config=config))


@pytest.mark.parametrize("kind", ["h2o:budget=8,recent=4", "h2o:budget=6,recent=1+int8", "snapkv:budget=8,window=4",
                                  "snapkv:budget=6,window=3,kernel=3+int8"])  # fmt: skip
def test_what_was_drafted_and_dropped_leaves_no_trace_in_what_is_kept(kind):
    plain, drafted = Walk(kind, GLOBAL), Walk(kind, GLOBAL)
    for walk in (plain, drafted):
        walk.feed(texts(0, 12, 3, 10, 0))
        walk.cache = walk.cache.compress(SIZE)
    told = texts(5, 12, 12, 12, 12)
    rng = np.random.default_rng(3)
    at = [0] * ROWS
    while min(at) < 12:
        kept = [min(n, 12 - i) for n, i in zip(rng.integers(0, PENDING + 1, ROWS), at, strict=True)]
        guess = [
            row[i : i + n] + rng.integers(1, 101, PENDING - n).tolist()
            for row, i, n in zip(told, at, kept, strict=True)
        ]
        drafted.feed(guess, kept, pieces=int(rng.choice([1, PENDING])))
        at = [i + n for i, n in zip(at, kept, strict=True)]
    for i in range(12):
        plain.feed([row[i : i + 1] for row in told])
    for row in range(ROWS):
        for position, score in plain.scores[row].items():
            atol = 1e-4 if is_plain(kind) else 0.05
            np.testing.assert_allclose(drafted.scores[row][position], score, atol=atol, err_msg=f"{row} {position}")


# --- the laws can be broken ----------------------------------------------------------------------------------------


def busy(kind):
    """A walk that does everything once or twice."""
    walk = Walk(kind)
    walk.feed(texts(0, 12, 7, 10, 1))
    walk.feed(texts(1, 4, 4, 4, 4), kept=[0, 2, 4, 1])
    walk.feed(texts(2, 4, 3, 4, 2), kept=[3, 0, 1, 2], pieces=PENDING)
    walk.branch(3, 0)
    walk.feed(texts(3, 1, 1, 1, 1))
    walk.feed(texts(4, 4, 2, 4, 4), kept=[0, 2, 3, 4], pieces=PENDING)
    walk.back([13, 20, 14, 30])
    walk.feed(texts(5, 11, 2, 5, 7))
    walk.move([1, 2], [2, 1])
    walk.feed(texts(6, 4, 4, 4, 4), kept=[4, 1, 2, 3])
    walk.feed(texts(7, 1, 1, 1, 1))
    return walk


def one_slot_less(monkeypatch):
    size = Maker.ring_size
    monkeypatch.setattr(Maker, "ring_size", lambda self, window: size(self, window) - 1)


def places_of_a_token_later(monkeypatch):
    places = Ring.places
    monkeypatch.setattr(Ring, "places", lambda self, end: places(self, end + 1))


def a_shared_page_is_written(monkeypatch):
    copied = Pages.reserve

    def reserve(self, length, end):
        own = self.replace(holders=jnp.minimum(self.holders, 1))
        pages, *pair = copied(own, length, end)
        return pages, *pair

    monkeypatch.setattr(Pages, "reserve", reserve)


def pages_are_not_copied(monkeypatch):
    monkeypatch.setattr(Paged, "copied", lambda self, source, target, pages: self)


def a_group_is_seen_as_soon_as_it_is_coded(monkeypatch):
    attend = Kivi.attend

    def early(self, q, k, v, spec, step):
        last = jnp.broadcast_to((step.end - 1)[:, None], step.position.shape)
        border = self.groups
        monkeypatch.setattr(Kivi, "groups", lambda self, p: border(last) if p.ndim == 2 else border(p))
        out = attend(self, q, k, v, spec, step)
        monkeypatch.setattr(Kivi, "groups", groups)
        return out

    groups = Kivi.groups
    monkeypatch.setattr(Kivi, "attend", early)


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("auto", one_slot_less),
        ("auto", places_of_a_token_later),
        ("paged:page=4", a_shared_page_is_written),
        ("paged:page=4", pages_are_not_copied),
        ("int4:group=4,residual=6", a_group_is_seen_as_soon_as_it_is_coded),
    ],
)
def test_a_mistake_in_a_kind_is_found(kind, mistake, monkeypatch):
    expected = functools.partial(alone, kind) if "int4" in kind else dense
    atol = 1e-4 if is_plain(kind) else 0.05
    busy(kind).check(expected, atol)
    jax.clear_caches()
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        busy(kind).check(expected, atol)
    monkeypatch.undo()
    jax.clear_caches()
