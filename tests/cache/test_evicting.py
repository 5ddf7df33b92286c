"""Kinds that drop tokens: each against its paper's procedure, written down plainly in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops
from jaxinfer.cache import init_cache
from jaxinfer.config import RopeSpec
from jaxinfer.testing import tiny_config

pytestmark = pytest.mark.usefixtures("quickly_compiled")
ROPE = RopeSpec(frequency=tuple(100.0 ** -(i / 4) for i in range(4)), scale=1.1)  # R = 8 of H = 10
CONFIG = tiny_config(num_layers=1, num_heads=4, num_kv_heads=2, rope=ROPE, softcap=30.0)
SPEC = CONFIG.layers[0]
N, K, H = 4, 2, 10


def draw(T, seed=0, rows=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((rows, T, n, H)).astype(np.float32) for n in (N, K, K))


def rotated(x, position):
    return np.asarray(ops.rotate(jnp.asarray(x), *ops.angles(jnp.asarray(position)[None], ROPE, 64)))


@functools.partial(jax.jit)
def call(cache, q, k, v, num):
    step = cache.step(num, q.shape[1])
    out, cache = cache.attend(0, q, k, v, SPEC, step)
    return out, cache.advance(num)


def feed(kind, q, k, v, pieces, pending=4):
    """What attention gives [T, N, H] for rotated q, k in pieces of these sizes."""
    cache, out, start = init_cache(CONFIG, 1, 64, kind, max_pending=pending), [], 0
    for n in pieces:
        part = (jnp.asarray(x[:, start : start + n]) for x in (q, k, v))
        got, cache = call(cache, *part, np.array([n], np.int32))
        out.append(np.asarray(got)[0])
        start += n
    return np.concatenate(out), cache


def weights(q, k):
    """Attention of one query [N, H] over keys [n, K, H]: [N, n]."""
    score = np.stack([k[:, head // (N // K)] @ q[head] for head in range(N)]) * SPEC.scale
    score = SPEC.softcap * np.tanh(score / SPEC.softcap)
    score = np.exp(score - score.max(-1, keepdims=True))
    return score / score.sum(-1, keepdims=True)


def answer(weight, v):
    """[N, H] of weights [N, n] over values [n, K, H]."""
    return np.stack([weight[head] @ v[:, head // (N // K)] for head in range(N)])


# --- StreamingLLM ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * 30, [30], [3] * 10, [17, 1, 12]])
@pytest.mark.parametrize(("sinks", "recent"), [(3, 5), (1, 1), (4, 20)])
def test_streaming_counts_positions_inside_the_cache(pieces, sinks, recent):
    q, k, v = draw(30)
    turned = (rotated(x, np.arange(30)) for x in (q, k))
    got, _ = feed(f"streaming:sinks={sinks},recent={recent}", *turned, v, pieces)
    for p in range(30):
        kept = [i for i in range(p + 1) if i < sinks or i > p - recent]
        place = np.arange(len(kept))  # keys are kept as they are, and turned by where they lie when they are read
        keys, query = rotated(k[:, kept], place)[0], rotated(q[:, [p]], place[-1:])[0, 0]
        np.testing.assert_allclose(got[p], answer(weights(query, keys), v[0, kept]), atol=2e-5, err_msg=str(p))


def test_a_ring_with_sinks_sees_them_from_where_they_are():
    q, k, v = draw(30)
    q, k = (rotated(x, np.arange(30)) for x in (q, k))
    got, _ = feed("ring:window=5,sinks=3", q, k, v, [7, 4, 1, 18])
    for p in range(30):
        kept = [i for i in range(p + 1) if i < 3 or i > p - 5]
        np.testing.assert_allclose(got[p], answer(weights(q[0, p], k[0, kept]), v[0, kept]), atol=2e-5)


# --- H2O ------------------------------------------------------------------------------------------------------------


def heavy_hitters(q, k, v, prompt, budget, recent):
    """(outputs [T, N, H], kept positions of each kv head) as in Zhang et al. 2023, algorithm 1, a head at a time.

    A prompt is read whole, then cut to the budget; every later token drives out one.
    """
    T, out = q.shape[1], np.zeros((q.shape[1], N, H))
    held = [dict() for _ in range(K)]  # position -> score
    for p in range(T):
        for head in range(K):
            group = range(head * (N // K), (head + 1) * (N // K))
            held[head][p] = 0.0
            places = sorted(held[head])
            weight = weights(q[0, p], k[0, places])
            for n in group:
                out[p, n] = weight[n] @ v[0, places, head]
            for i, place in enumerate(places):
                held[head][place] += weight[list(group), i].sum()
            if p >= prompt and len(places) > budget:
                del held[head][min((i for i in places if i <= p - recent), key=held[head].get)]
            if p == prompt - 1 and len(places) > budget:
                newest = [i for i in places if i > p - recent]
                best = sorted((i for i in places if i <= p - recent), key=held[head].get)[len(newest) - budget :]
                held[head] = {i: held[head][i] for i in (*best[len(best) - (budget - len(newest)) :], *newest)}
    return out, [sorted(h) for h in held]


@pytest.mark.parametrize("pieces", [[1] * 30, [12, *[1] * 18], [20, 4, 2, 3, 1], [3, 4, 4, 4, 4, 4, 4, 3]])
@pytest.mark.parametrize(("budget", "recent"), [(8, 4), (6, 1), (9, 8)])
def test_h2o_keeps_the_heavy_hitters_and_the_newest(pieces, budget, recent):
    q, k, v = draw(30, seed=5)
    q, k = 2 * rotated(q, np.arange(30)), rotated(k, np.arange(30))
    prompt = pieces[0] if pieces[0] > 4 else 0
    expected, kept = heavy_hitters(q, k, v, prompt, budget, recent)
    got, cache = feed(f"h2o:budget={budget},recent={recent}", q, k, v, pieces)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    place = np.asarray(cache.layers[0].place)[0]
    assert [sorted(row[row < 1 << 30].tolist()) for row in place] == kept


# --- SnapKV ---------------------------------------------------------------------------------------------------------


def snapped(q, k, length, budget, window, kernel):
    """The positions that are left of a prompt, for each kv head (Li et al. 2024, listing 1)."""
    last = range(length - window, length)
    looked = np.zeros((K, length))
    for p in last:
        weight = weights(q[0, p], k[0, : p + 1])
        looked[:, : p + 1] += weight.reshape(K, N // K, -1).sum(1)
    before = looked[:, : length - window]
    padded = np.pad(before, ((0, 0), (kernel // 2, kernel // 2)))
    pooled = np.stack([padded[:, i : i + before.shape[1]] for i in range(kernel)]).mean(0)
    best = np.argsort(-pooled, axis=1, kind="stable")[:, : budget - window]
    return [sorted([*row.tolist(), *last]) for row in best]


@pytest.mark.parametrize("pieces", [[20], [3, 9, 8], [1] * 20])
@pytest.mark.parametrize(("budget", "window", "kernel"), [(10, 4, 3), (7, 2, 5), (6, 5, 1)])
def test_snapkv_keeps_what_the_last_queries_looked_at(pieces, budget, window, kernel):
    q, k, v = draw(30, seed=8)
    q, k = 2 * rotated(q, np.arange(30)), rotated(k, np.arange(30))
    kept = snapped(q, k, 20, budget, window, kernel)
    prompt = (x[:, :20] for x in (q, k, v))
    kind = f"snapkv:budget={budget},window={window},kernel={kernel}"
    _, cache = feed(kind, *prompt, pieces)
    before = cache.bytes
    cache = jax.jit(lambda cache: cache.compress(10))(cache)
    assert cache.bytes < before
    got = []
    for p in range(20, 30):
        out, cache = call(cache, *(jnp.asarray(x[:, p : p + 1]) for x in (q, k, v)), np.array([1], np.int32))
        got.append(np.asarray(out)[0, 0])
    for p, out in zip(range(20, 30), got, strict=True):
        for head in range(K):
            places = [*kept[head], *range(20, p + 1)]
            expected = answer(weights(q[0, p], k[0, places]), v[0, places])
            group = slice(head * (N // K), (head + 1) * (N // K))
            np.testing.assert_allclose(out[group], expected[group], atol=2e-5)
    assert not np.asarray(cache.overflow).any()
    assert np.asarray(cache.limits)[0] == 64 or np.asarray(cache.limits)[0] >= 30


def test_a_prompt_within_the_budget_is_kept_whole():
    q, k, v = draw(20, seed=8)
    _, cache = feed("snapkv:budget=12,window=4", *(x[:, :9] for x in (q, k, v)), [9])
    small = cache.compress(16)
    got = []
    for p in range(9, 20):
        out, small = call(small, *(jnp.asarray(x[:, p : p + 1]) for x in (q, k, v)), np.array([1], np.int32))
        got.append(np.asarray(out)[0, 0])
    whole, _ = feed("dense", q, k, v, [20])
    np.testing.assert_allclose(np.stack(got), whole[9:], atol=2e-5)


# --- what they are for ------------------------------------------------------------------------------------------------


def test_a_token_that_every_later_query_needs_is_kept_by_h2o_and_snapkv_and_lost_by_a_window():
    T, needle = 40, 6
    q, k, v = draw(T, seed=1)
    towards = np.random.default_rng(4).standard_normal(H)
    q[0] += 2 * towards  # every query asks for it
    k[0, needle] = 3 * towards
    v[0, needle] = 10
    exact, _ = feed("dense", q, k, v, [T])

    def off(kind, compress=False):
        _, cache = feed(kind, *(x[:, :30] for x in (q, k, v)), [30])
        cache = cache.compress(12) if compress else cache
        out = []
        for p in range(30, T):
            got, cache = call(cache, *(jnp.asarray(x[:, p : p + 1]) for x in (q, k, v)), np.array([1], np.int32))
            out.append(np.asarray(got)[0, 0])
        return np.abs(np.stack(out) - exact[30:]).mean()

    lost = min(off("ring:window=10"), off("streaming:sinks=2,recent=8"))
    assert off("h2o:budget=10,recent=5") < lost / 20
    assert off("snapkv:budget=10,window=4,kernel=1", compress=True) < lost / 20


def test_first_tokens_that_hold_most_of_the_attention_are_what_sinks_are_for():
    # Xiao et al. 2023, section 3.1: without the first tokens the softmax has nowhere to put its weight
    T = 40
    q, k, v = draw(T, seed=2)
    towards = np.random.default_rng(4).standard_normal(H)
    q[0] += 2 * towards
    k[0, :2] = 2 * towards
    exact, _ = feed("dense", q, k, v, [T])
    window, _ = feed("ring:window=10", q, k, v, [T])
    sinks, _ = feed("ring:window=8,sinks=2", q, k, v, [T])
    assert 10 * np.abs(sinks - exact)[20:].mean() < np.abs(window - exact)[20:].mean()


def test_h2o_refuses_a_tree():
    from jaxinfer.cache import Tree

    cache = init_cache(CONFIG, 1, 64, "h2o:budget=8", max_pending=8)
    step = cache.branch(np.array([3]), Tree.branching(2), 0, 3)
    q, k, v = (jnp.asarray(x) for x in draw(3))
    with pytest.raises(ValueError, match="h2o drops tokens one after the other, so it holds no draft tree"):
        cache.attend(0, q, k, v, SPEC, step)
