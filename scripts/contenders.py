"""Ways of decoding with one model, ready to be measured: the prompts are read, and every turn goes on from there.

plain, other = Contender(Technique("plain"), work), Contender(Technique("eight bits", form="int8"), work)
in_turns([plain, other], rounds=5)
other.facts(plain)["ratio"]  # of their tokens/s, turn by turn
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import drafting
import jax
import jax.numpy as jnp
import measured
import memory
import numpy as np
import variants
from screen import size
from settings import FLOATS

import jaxinfer
from jaxinfer import cache as caches
from jaxinfer import kernels, models, roofline
from jaxinfer.decoding.model import adapt
from jaxinfer.decoding.stream import chunks, read_chunk, start
from jaxinfer.speculation import HeadDraft, LayersDraft
from jaxinfer.speculation.plan import planned
from jaxinfer.speculation.stream import read_chunk as read_drafted

CHUNK = 128  # tokens of the prompts that are read at once
SLOWEST = (("median", "median"), ("min", "max"), ("max", "min"))  # which rate belongs to which time


@dataclasses.dataclass(frozen=True)
class Technique:
    """A way of decoding; by default one row, plain weights, every key and value kept."""

    says: str  # what it is, for people
    rows: int = 1
    form: str | None = None  # of weights in codes
    kind: str = "dense"  # of cache; none: every token is a forward over the whole length
    grouped: bool = True  # False: every query head has keys and values of its own
    draft: str | None = None  # what guesses, as decode.py --draft has it
    exact: bool = True  # it says what the plain way says

    @property
    def uncached(self) -> bool:
        """Whether nothing is kept."""
        return self.kind == "none"


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, and what every contender does with it."""

    name: str
    params: Any
    config: Any
    small: tuple[Any, Any]  # params and config before they were widened: drafts were made for these
    tokenizer: Any  # None of a model that has none
    prompts: np.ndarray  # [B, T], a row for each that any contender has
    new_tokens: int
    uncached_tokens: int  # where each is a forward over the whole length
    num_draft_tokens: int
    temperature: float

    @property
    def size(self) -> int:
        """S: positions of a row."""
        return self.prompts.shape[1] + self.new_tokens


class Contender:
    """A technique behind its prompts, from prompt `first` on: every turn makes the same tokens once more."""

    def __init__(self, technique: Technique, work: Work, first: int = 0):
        rows = range(first, first + technique.rows)
        self.technique, self.work = technique, work
        self.params, self.config = formed(technique, work)
        self.model = variants.Uncached(self.config) if technique.uncached else None
        self.draft = read_draft(technique.draft, work) if technique.draft else None
        self.num = min(work.new_tokens, work.uncached_tokens) if technique.uncached else work.new_tokens
        self.sampling = jaxinfer.Sampling(temperature=work.temperature, seed=list(rows))
        self.begun = jax.block_until_ready(self.read(work.prompts[rows.start : rows.stop]))
        self.seconds: list[float] = []
        self.peak: int | None = None  # bytes above what is held
        self.result: Any = None

    def read(self, ids: np.ndarray) -> tuple[Any, Any]:
        """The state behind prompts ids [B, T], and what the draft knows of them."""
        (rows, length), runner, known = ids.shape, adapt(self.model, self.config), None
        pieces, kind = chunks(ids, np.full(rows, length), CHUNK), self.technique.kind
        if self.draft is None:
            state = start(runner.init_cache(rows, self.work.size, kind=kind))
            for piece, num in pieces:
                state = read_chunk(self.params, state, piece, num, model=runner)
            return state, None
        plan = plan_of(self.technique, self.draft, self.work)
        state = start(runner.init_cache(rows, self.work.size, kind=kind, max_pending=plan.max_pending))
        for piece, num in pieces:
            state, known = read_drafted(
                self.params, self.draft, state, known, piece, num, model=runner, plan=plan, fresh=True
            )
        return state, known

    def warm(self) -> None:
        """Turns that are not counted: one for the compiler, the first time, and one to look at the memory."""
        if self.result is None:
            self.keep(self.decode(*self.fresh()))
        again = self.fresh()
        held = memory.held() if jax.default_backend() == "cpu" else None
        result = self.decode(*again)
        self.peak = memory.above(held)
        self.keep(result)

    def turn(self) -> None:
        """One that is counted."""
        again = self.fresh()
        began = time.perf_counter()
        result = self.decode(*again)
        self.seconds.append(time.perf_counter() - began)
        self.keep(result)

    def fresh(self) -> tuple[Any, Any]:
        """A copy of what was read: a state is spent by its use."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.begun))

    def decode(self, state: Any, known: Any) -> Any:
        """Makes the tokens."""
        how = {"state": state, "sampling": self.sampling, "max_new_tokens": self.num}
        if self.draft is None:
            return jax.block_until_ready(jaxinfer.generate(self.params, self.config, model=self.model, **how))
        how |= {"draft": self.draft, "num_draft_tokens": self.work.num_draft_tokens, "memory": known}
        return jax.block_until_ready(jaxinfer.speculate(self.params, self.config, **how))

    def keep(self, result: Any) -> None:
        """What was made, without a second cache."""
        self.result = result.replace(state=None) if self.draft is None else result.replace(state=None, memory=None)

    # --- what came of it ---

    @property
    def ids(self) -> list[list[int]]:
        """The new ids of every row."""
        return np.asarray(self.result.ids)[:, : self.num].tolist()

    @property
    def tokens(self) -> int:
        """Of a turn, over all rows."""
        return self.num * self.technique.rows

    def facts(self, plain: Contender) -> dict[str, Any]:
        """What was measured, beside the last turns of `plain`, which were in turn with these."""
        beside = plain.seconds[-len(self.seconds) :]
        ratios = [self.tokens / a * b / plain.tokens for a, b in zip(self.seconds, beside, strict=True)]
        took = measured.spread(self.seconds)
        moved = self.bytes_of_a_pass() * self.passes
        return {
            "rows": self.technique.rows,
            "weights": self.technique.form or self.config.dtype,
            "cache": self.technique.kind,
            "tokens": self.tokens,
            "ms_per_token": {name: took[name] / self.num * 1e3 for name in took},
            "tokens_per_second": {name: self.tokens / took[other] for name, other in SLOWEST},
            "ratio": measured.spread(ratios),
            "weight_bytes": num_bytes(self.params),
            "cache_bytes": 0 if self.technique.uncached else self.begun[0].cache.bytes,
            "draft_bytes": self.draft_bytes(),
            "peak_bytes": self.peak,
            "bytes_of_a_pass": self.bytes_of_a_pass(),
            "gb_per_second": moved / took["median"] / 1e9,
            "speculation": self.fared(),
            "seconds": self.seconds,
            "baseline_seconds": beside,
        }

    @property
    def passes(self) -> int:
        """Of the model, in a turn."""
        return self.num if self.draft is None else int(self.result.rounds.max())

    def bytes_of_a_pass(self) -> int:
        """Weights and valid cache that a pass half way through must move; not what a draft reads."""
        packed, rows = roofline.weights_of(self.technique.form), self.technique.rows
        if self.technique.uncached:
            return roofline.forward_bytes(self.config, self.work.size, [0] * rows, packed, "none")
        kept = self.begun[0].cache.form
        kind = dataclasses.replace(roofline.kind_of(self.technique.kind), dtype=kept if kept in FLOATS else None)
        new = 1 if self.draft is None else self.work.num_draft_tokens + 1
        half = self.work.prompts.shape[1] + self.num // 2
        return roofline.forward_bytes(self.config, new, [half] * rows, packed, kind)

    def draft_bytes(self) -> int:
        """Of a draft's own weights, and of what it keeps."""
        if self.draft is None:
            return 0
        shared = {id(x) for x in jax.tree.leaves(self.params)}
        own = [x for x in jax.tree.leaves(self.draft) if id(x) not in shared]
        return num_bytes(own) + num_bytes(self.begun[1].draft)

    def fared(self) -> dict[str, Any] | None:
        """How the guesses did."""
        if self.draft is None:
            return None
        rounds, drafted, accepted = (
            np.asarray(getattr(self.result, x)).sum(0) for x in ("rounds", "drafted", "accepted")
        )
        tried = np.minimum(drafted, np.append(drafted[:1], accepted[:-1])).sum()  # where all guesses before were right
        return {
            "draft": self.technique.draft,
            "num_draft_tokens": self.work.num_draft_tokens,
            "rounds": int(rounds),
            "acceptance_rate": float(accepted.sum() / tried) if tried else None,
            "tokens_per_round": float(self.result.tokens_per_round),
        }


def in_turns(contenders: list[Contender], rounds: int) -> None:
    """Every one once, and again, so many times."""
    for contender in contenders:
        contender.warm()
    for _ in range(rounds):
        for contender in contenders:
            contender.turn()


# --- what they are made of -------------------------------------------------------------------------------------------


def formed(technique: Technique, work: Work) -> tuple[Any, Any]:
    """The params and config that a technique runs; what stays as it is is shared."""
    params, config = work.params, work.config
    if not technique.grouped:
        params, config = variants.ungrouped(params, config)
    if technique.form:
        params = jaxinfer.quantize(params, technique.form)
    return jax.block_until_ready(params), config


def read_draft(name: str, work: Work) -> Any:
    """A draft for the model, made for what it was before it was widened: the same function, by the same embedding."""
    with drafting.naming(name):
        params, config = work.small
        draft = drafting.read(name, config.dtype, dataclasses.replace(work, params=params, config=config))
    if isinstance(draft, HeadDraft):
        return draft.replace(target=work.params, target_config=work.config)  # type: ignore[attr-defined]
    if isinstance(draft, LayersDraft):
        return draft.replace(params=work.params, config=work.config)  # type: ignore[attr-defined]
    return draft


def plan_of(technique: Technique, draft: Any, work: Work) -> Any:
    """How a draft is used; ValueError where it cannot be."""
    with drafting.naming(technique.draft or ""):
        return planned(draft, work.config, work.num_draft_tokens, None, "shared", False)


def unfit(technique: Technique, work: Work) -> str | None:
    """Why there is no room for a technique beside what is held already; None where there is, or nobody says."""
    free = kernels.free_memory()
    more = needed(technique, work)
    if free is None or more <= free:
        return None
    return f"it needs {size(more)} more, and {size(free)} are free"


def needed(technique: Technique, work: Work) -> int:
    """Bytes of what a technique keeps beside the plain weights, and of what a turn takes of it."""
    config = work.config if technique.grouped else variants.ungrouped_config(work.config)
    shapes = models.param_shapes(config)
    weights = num_bytes(shapes) - num_bytes(models.param_shapes(work.config))
    if technique.form:
        weights = num_bytes(jax.eval_shape(functools.partial(models.quantize, form=technique.form), shapes))
    place = drafting.directory(technique.draft) if technique.draft else None
    if place is not None:
        weights += sum(path.stat().st_size for path in place.glob("*.safetensors"))
    if technique.uncached:  # scores of all with all, and their softmax
        return weights + max(2 * 4 * technique.rows * spec.num_heads * work.size**2 for spec in config.layers)
    return weights + 2 * caches.cache_bytes(config, technique.rows, work.size, technique.kind)  # and its copy


def num_bytes(tree: Any) -> int:
    """Of all arrays, or shapes of arrays."""
    return round(sum(x.size * roofline.itemsize(x.dtype) for x in jax.tree.leaves(tree)))
