"""What --draft means: the draft that is loaded, what a pass of it costs, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from settings import DRAFT_TOKENS, Settings, spelled

import jaxinfer
from jaxinfer import models, weights
from jaxinfer.decoding import Decoder, State
from jaxinfer.decoding.generate import draw
from jaxinfer.decoding.state import idle
from jaxinfer.decoding.stream import first_key
from jaxinfer.speculation import Draft, HeadDraft, LayersDraft, ModelDraft, NGram, shared_vocabulary
from jaxinfer.speculation.drawing import Draw, Shared
from jaxinfer.speculation.plan import Plan, planned

KNOWN = 2  # tokens of a row while a pass is measured: what it costs depends on shapes alone
PASSES = 4  # of a dispatch that is measured
TRIES = 4
PAIRS = 2  # of runs that are compared: A B A B


# --- which it is ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Drafting:
    """A draft, how it is used, and what was measured of it."""

    name: str
    draft: Draft
    plan: Plan
    tree: str | None
    cost: float | None = None  # of a pass, over the model's on one token a row
    compared: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def how(self) -> dict[str, Any]:
        """As arguments of `speculation.stream`."""
        plan, cost = self.plan, self.cost if self.plan.adaptive else None
        return {
            "draft": self.draft, "num_draft_tokens": plan.tree.height, "tree": self.tree, "rule": plan.rule,
            "cost": cost,
        }  # fmt: skip

    def ready(self, model: Any, sampling: jaxinfer.Sampling, rows: int, how: dict[str, Any]) -> dict[str, Any]:
        """What `speculation.stream` is to be told beside `how`; the cost first, where it is needed and not known yet.

        Raises ValueError for a cache that cannot hold a round.
        """
        if size := how.get("size"):
            self.check_room(size)
            if self.plan.adaptive and self.cost is None:
                options = {name: how[name] for name in ("kind", "dtype")}
                cache = jaxinfer.init_cache(model.config, rows, size, **options, max_pending=self.plan.max_pending)
                self.weigh(model, sampling, jax.jit(State.init, donate_argnums=0)(cache))
        return self.how

    def check_room(self, size: int) -> None:
        """Refuses a cache that a round alone does not fit in."""
        if self.plan.max_pending > size:
            what = f"--draft-tree {self.tree}" if self.tree else f"--num-draft-tokens {self.plan.tree.height}"
            raise ValueError(
                f"{what} needs {self.plan.max_pending} positions a round but the cache holds {size}: draft less, or "
                "raise --max-length"
            )

    def weigh(self, model: Any, sampling: jaxinfer.Sampling, state: State) -> None:
        """Measures the cost, once; spends a state of the shape."""
        if self.cost is None:
            self.cost = measure(model, self, state, sampling)

    def compare(self, plain: Callable[[], Any], drafted: Callable[[], Any], shown: list[list[int]]) -> None:
        """Measures the speed-up: runs both, A B A B, compiled and warm; compares the ids with those that were shown.

        plain, drafted: () -> a stream of the same prompts, compiled.
        """
        ids, _ = drain(plain())  # warm; what drafts has run already
        pairs = [[drain(side())[1] for side in (plain, drafted)] for _ in range(PAIRS)]
        ratios = [ours / theirs for theirs, ours in pairs if theirs and ours]
        self.compared["measured_speedup"] = statistics.median(ratios) if ratios else None
        if self.plan.rule == "shared":
            differs = first_difference(ids, shown)
            self.compared |= {"same_ids": differs is None, "differs_at": differs}

    def facts(self, streams: list[Any]) -> dict[str, Any]:
        """How it fared, over all rows of all streams."""
        tree, counts = self.plan.tree, [stream.counts for stream in streams if stream.counts]
        rounds = sum(int(count["rounds"].sum()) for count in counts)
        drafted, accepted = (
            sum((count[name].sum(0) for count in counts), np.zeros(tree.height, int))
            for name in ("drafted", "accepted")
        )
        tried = np.minimum(drafted, [drafted[0], *accepted[:-1]])  # only where the guess before it was right
        rate = float(accepted.sum() / tried.sum()) if tried.any() else None
        return {
            "draft": self.name,
            "rule": self.plan.rule,
            **({"tree": self.tree} if self.tree else {"num_draft_tokens": tree.height}),
            "adaptive": self.plan.adaptive,
            "rounds": rounds,
            "drafted": int(drafted.sum()),
            "accepted": int(accepted.sum()),
            "acceptance_rate": rate,
            "tokens_per_round": sum(len(row) for stream in streams for row in stream.ids) / rounds if rounds else None,
            "accepted_per_position": [float(a / n) if n else None for a, n in zip(accepted, drafted, strict=True)],
            "cost": self.cost,
            "predicted_speedup": predicted(rate, self.cost, tree.height),
            **self.compared,
        }


def directory(name: str) -> pathlib.Path | None:
    """Where the files of a draft lie; None where it has none."""
    kind, rest = spelled(name)
    return None if kind in ("ngram", "layers") else home(kind, rest)


def home(kind: str, name: str) -> pathlib.Path:
    """The directory of a head or a model; ValueError where it should be and is not."""
    if name != "builtin":
        return pathlib.Path(name).expanduser() if kind == "head" else jaxinfer.hub.locate(name)
    found = jaxinfer.hub.locate(name) / ("head" if kind == "head" else "draft")
    if not found.is_dir():
        raise ValueError(f"this installation lacks {found.name}/ in the built-in model: install jaxinfer again")
    return found


def load(args: Settings, model: Any) -> Drafting | None:
    """The draft for a model, and how it is used. ValueError, which names the draft, says why it cannot be."""
    if args.draft is None:
        return None
    with naming(args.draft):
        draft = read(args.draft, None if args.dtype == "auto" else args.dtype, model)
        num, rule = args.num_draft_tokens or DRAFT_TOKENS, args.rule or "shared"
        plan = planned(draft, model.config, num, args.draft_tree, rule, args.adaptive)
    return Drafting(args.draft, draft, plan, args.draft_tree, cost=0.0 if model.outlined else None)


@contextlib.contextmanager
def naming(draft: str) -> Iterator[None]:
    """Says of what is refused that it was the draft."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"--draft {draft}: {error}") from error


def read(name: str, dtype: str | None, model: Any) -> Draft:
    """The draft of this name, for this model."""
    kind, rest = spelled(name)
    if kind == "ngram":
        return NGram()
    if kind == "layers":
        return LayersDraft(model.params, model.config, int(rest))
    place = home(kind, rest)
    if kind == "head":
        return read_head(place, model)
    if weights.is_head(place):
        raise ValueError(f"this is a head: write --draft head:{name}")
    tokenizer = model.tokenizer if name == model.name else jaxinfer.Tokenizer(name)  # builtin/draft has the built-in's
    outline = weights.shapes(place, dtype) if model.outlined else None
    params, config = outline or jaxinfer.load(place, dtype)
    vocab = shared_vocabulary(model.tokenizer, tokenizer, model.config.vocab_size, config.vocab_size)
    return ModelDraft(params, config, vocab=vocab)


def read_head(place: pathlib.Path, model: Any) -> HeadDraft:
    """A head that was trained for this model, in the model's dtype."""
    params, config, target = weights.load_head(place, model.config.dtype)
    own = models.fingerprint(model.params, model.config)
    if not target.startswith(own):  # of weights in codes, and of an outline, the sizes alone are known
        raise ValueError(
            f"this head was trained for {target} but {model.name} is {own}: take a head of this model's own "
            "(scripts/distill.py --kind head makes one)"
        )
    return HeadDraft(params, model.params, config, model.config)


# --- what a pass of it costs ---------------------------------------------------------------------------------------


def measure(model: Any, drafting: Drafting, state: State, sampling: jaxinfer.Sampling) -> float:
    """Time of a draft's pass over that of the model's on one token a row, draws included; spends a state of the shape.

    A process times its own passes, and all of them go by the clock of process 0.
    """
    rows, config, plan = state.cache.rows, model.config, drafting.plan
    controls = jax.tree.map(lambda x: idle(state.cache, x)[0], sampling.rows(rows, config.vocab_size, config.stop_ids))
    key, runner = first_key(), Decoder(config)
    plain = functools.partial(model.programs.run, model_passes, model.params, model=runner)
    ahead = functools.partial(model.programs.run, draft_passes, drafting.draft, model=runner, plan=plan)
    own, state = seconds(lambda state, num: plain(state, controls, key, num), state)
    other, _ = seconds(lambda state, num: ahead(state, controls, key, num), state)
    return float(jaxinfer.mesh.hear(other / plan.tree.height / own)[0, 0])


def seconds(run: Callable[[State, np.int32], State], state: State) -> tuple[float, State]:
    """Of one more pass of a program that makes so many, without what a dispatch costs: the best of a few."""
    best = {0: float("inf"), PASSES: float("inf")}
    for _ in range(TRIES):  # the first compiles
        for num in best:
            begin = time.perf_counter()
            state = jax.block_until_ready(run(state, np.int32(num)))
            best[num] = min(best[num], time.perf_counter() - begin)
    return max(best[PASSES] - best[0], 1e-9) / PASSES, state


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def model_passes(
    params: Any, state: State, sampling: jaxinfer.Sampling, key: jax.Array, num: jax.Array, *, model: Decoder
) -> State:
    """So many tokens of plain decoding, each in the place of the one before."""

    def again(_: Any, state: State) -> State:
        step = state.cache.step(jnp.ones_like(state.length), 1)
        scores, cache = model.last(params, state.newest[:, None], state.cache, step)
        token, _ = draw(scores, state, sampling, key, None, model.vocab)
        return said(state.replace(cache=cache), token)

    return jax.lax.fori_loop(0, num, again, begun(state)).placed()


@functools.partial(jax.jit, static_argnames=("model", "plan"), donate_argnames=("state",))
def draft_passes(
    draft: Draft,
    state: State,
    sampling: jaxinfer.Sampling,
    key: jax.Array,
    num: jax.Array,
    *,
    model: Decoder,
    plan: Plan,
) -> State:
    """So many rounds of drafts, each in the place of the one before."""
    state, shared = (
        begun(state),
        Shared(plan.tree, sampling, key, None, plan.rule, model.vocab, draft.known, model.columns),
    )
    rows = len(state.length)
    now, most = jnp.ones(rows, bool), jnp.full(rows, plan.tree.height, jnp.int32)
    hidden = jnp.zeros((rows, KNOWN - 1, model.config.width), jnp.dtype(model.config.dtype))
    memory = draft.begin(state, plan.tree)
    memory = draft.read(memory, state, state.tokens[:, : KNOWN - 1], jnp.zeros_like(state.length), hidden)

    def again(_: Any, carry: Any) -> Any:
        state, memory = carry
        ids, _, _, memory, state = draft.propose(memory, state, now, most, Draw(shared, state))
        ids, memory = jax.lax.optimization_barrier((ids, memory))  # so that nothing is made once for all rounds
        return said(state, ids[:, 0]), memory

    return jax.lax.fori_loop(0, num, again, (state, memory))[0].placed()


def begun(state: State) -> State:
    """Rows of a few tokens, whatever they held."""
    length = jnp.full_like(state.length, KNOWN)
    cache = state.cache.replace(length=jaxinfer.mesh.constrain(length - 1, "B"))
    return state.replace(cache=cache, tokens=jnp.zeros_like(state.tokens), length=length, prompt=length).placed()


def said(state: State, token: jax.Array) -> State:
    """The newest token of each row is another one, token [B]."""
    return state.replace(tokens=state.tokens.at[jnp.arange(len(token)), state.length - 1].set(token))


# --- what came of it -----------------------------------------------------------------------------------------------


def drain(stream: Any) -> tuple[list[list[int]], float]:
    """(ids, tokens a second after the first step) of a stream; 0 tokens where there was one step."""
    for _ in stream:
        pass
    later = stream.decode_seconds - stream.first_seconds
    tokens = sum(max(len(row) - 1, 0) for row in stream.ids)
    return stream.ids, tokens / later if later > 0 else 0.0


def first_difference(ids: list[list[int]], others: list[list[int]]) -> dict[str, int] | None:
    """The first row, and its first token, that is not the same."""
    for row, (one, other) in enumerate(zip(ids, others, strict=True)):
        if one != other:
            same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            return {"row": row, "token": min(len(one), len(other)) if same is None else same}
    return None


def predicted(rate: float | None, cost: float | None, J: int) -> float | None:
    """Leviathan et al. 2023, theorem 3.8, as `speculation.speedup`, where both are known."""
    if rate is None or cost is None:
        return None
    return sum(rate**i for i in range(J + 1)) / (J * cost + 1)
