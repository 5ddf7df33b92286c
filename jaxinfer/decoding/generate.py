"""Whole generations: one dispatch, one `lax.while_loop`, which leaves when every row is done."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from jaxinfer import mesh
from jaxinfer import sampling as draws
from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.model import Adapted, Decoder, Model, adapt
from jaxinfer.decoding.state import LENGTH, RUNNING, STOP, State, bucket, idle, pad, read
from jaxinfer.sampling import Sampling

Process = Callable[[jax.Array, State], jax.Array]


class Result(struct.PyTreeNode):
    """What a generation gives."""

    ids: jax.Array  # [B, buffer] int32 new ids, the stop id included, then -1
    num: jax.Array  # [B] int32 how many there are
    logprobs: jax.Array  # [B, buffer] float32 of each id under the unprocessed distribution; 0 past num
    state: State  # to go on with

    @property
    def finish(self) -> jax.Array:
        """[B] int32: 0 running, 1 stop, 2 length."""
        return self.state.finish[: self.num.shape[0]]

    def placed(self) -> Result:
        """Itself, rows over the devices of a mesh."""
        words = {"ids": "B_", "num": "B", "logprobs": "B_"}
        return self.replace(
            state=self.state.placed(),
            **{name: mesh.constrain(getattr(self, name), word) for name, word in words.items()},
        )

    def first(self, rows: int) -> Result:
        """Of the first rows alone; the state keeps all."""
        return jax.tree.map(lambda x: x[:rows], self.replace(state=None)).replace(state=self.state)

    @property
    def cache(self) -> Cache:
        """The cache, which holds every token but the newest."""
        return self.state.cache


def generate(
    params: Any,
    config: ModelConfig,
    ids: Any = None,
    *,
    num: Any = None,
    state: State | None = None,
    cache: Cache | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: Any = 128,
    buffer: int | None = None,
    key: jax.Array | None = None,
    model: Model | None = None,
    process: Process | None = None,
) -> Result:
    """Continues each row of ids until it stops or has its new tokens, in one dispatch.

    ids: [B, T] right-padded with num [B] valid, or a list of B lists of ids. None to go on with `state` as it is.
    state: of an earlier result: goes on where that stopped; ids are then what is said next. Spent by the call.
    cache: a cache that holds the tokens before ids; ids begin with the first token it does not hold, and penalties see
        these ids only. Spent by the call. By default a new one, as large as this call needs.
    sampling: per row, see `Sampling`; greedy by default. The checkpoint's stop ids are merged in.
    max_new_tokens: an int or one a row (traced). A row with 0 takes no part.
    buffer: length of the output, static; by default the next rung of a ladder over max(max_new_tokens).
    key: of all draws, which are then keyed by each row's seed and position; `jax.random.key(0)` by default.
    model: another model than the decoder of `config` (see `Model`). process: (logits [B, V], state) -> logits, before
        the processors of `sampling`; its rows are those of the state, with the idle ones that a mesh has added. Both
        are static: give the same object to compile once.

    Raises ValueError for a prompt that is empty, does not fit, or has ids outside the vocabulary.
    """
    asked = ask(config, ids, num, state, cache, sampling, max_new_tokens, buffer, key, model)
    with shrinking(asked.arguments[0].cache):
        return asked.cut(run(params, *asked.arguments, model=asked.model, process=process, buffer=asked.buffer))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a caller of `generate` or `speculate` wants, checked and laid out for the program."""

    arguments: tuple[Any, ...]  # state, ids, num, sampling, budget, key
    model: Decoder | Adapted
    buffer: int
    rows: int  # without those that a mesh added

    def cut(self, result: Any) -> Any:
        """A result without the rows that a mesh added; the state keeps them."""
        return result if len(result.num) == self.rows else result.first(self.rows)


def ask(
    config: ModelConfig,
    ids: Any,
    num: Any,
    state: State | None,
    cache: Cache | None,
    sampling: Sampling | None,
    max_new_tokens: Any,
    buffer: int | None,
    key: jax.Array | None,
    model: Model | None,
    **options: Any,
) -> Asked:
    """Checks the arguments of `generate`, makes a cache (with these options) where none was given, pads for a mesh."""
    runner = adapt(model, config)
    ids, num = prompt(ids, num, config)
    if state is not None and cache is not None:
        raise ValueError("got both state= and cache=: a state brings its cache along, give one of them")
    held = state.cache if state is not None else cache
    if held is None and num is None:
        raise ValueError("got neither ids nor a state nor a cache: there is nothing to continue")
    rows = held.rows if held is not None else len(num)
    budget = per_row(max_new_tokens, rows, "max_new_tokens")
    if concrete(budget, num):
        check(config, ids, num, budget, held, state)
    if buffer is None:
        if not concrete(budget):
            raise ValueError("max_new_tokens is traced: give buffer=, the static length of the output")
        buffer = bucket(int(np.max(budget)))
    if state is None:
        if cache is None:
            cache = runner.init_cache(rows, room(config, ids, num, budget, buffer), **options)
        state = State.init(cache)
    laid_out = (sampling or Sampling(temperature=0.0)).rows(rows, config.vocab_size, config.stop_ids)
    laid_out = jax.tree.map(lambda x: idle(state.cache, x)[0], laid_out)
    ids, num, budget = idle(state.cache, ids, num, budget)
    key = jax.random.key(0) if key is None else key
    return Asked((state, ids, num, laid_out, budget, key), runner, buffer, rows)


@functools.partial(jax.jit, static_argnames=("model", "process", "buffer"), donate_argnames=("state",))
def run(
    params: Any,
    state: State,
    ids: jax.Array | None,
    num: jax.Array | None,
    sampling: Sampling,
    budget: jax.Array,
    key: jax.Array,
    *,
    model: Decoder | Adapted,
    process: Process | None,
    buffer: int,
) -> Result:
    """The program: takes in ids, if any, then steps until every row is done."""
    budget = jnp.minimum(budget, buffer)

    def body(result: Result) -> Result:
        now, state = active(result, budget), result.state
        step = state.cache.step(now.astype(jnp.int32), 1)
        scores, cache = model.last(params, state.newest[:, None], state.cache, step)
        state = state.replace(cache=cache.advance(step.num))
        token, logprob = draw(scores, state, sampling, key, process, model.vocab)
        return emit(result.replace(state=state), token, logprob, sampling, budget, now)

    if ids is not None and num is not None:
        state, *_ = read(model, params, state, ids, num)
    start = begin(state.replace(cache=state.cache.compress(buffer)), buffer)
    return jax.lax.while_loop(lambda result: active(result, budget).any(), body, start).placed()


@contextlib.contextmanager
def shrinking(cache: Cache) -> Iterator[None]:
    """For a program that makes a prompt small: what it gives back cannot lie where the prompt's whole cache lay."""
    with warnings.catch_warnings():
        if cache.compresses:
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        yield


def begin(state: State, buffer: int) -> Result:
    """What a loop starts with: nothing is made yet."""
    rows = state.length.shape[0]
    return Result(
        ids=jnp.full((rows, buffer), -1, jnp.int32),
        num=jnp.zeros(rows, jnp.int32),
        logprobs=jnp.zeros((rows, buffer), jnp.float32),
        state=state.resume(),
    ).placed()


def active(result: Result, budget: jax.Array) -> jax.Array:
    """[B] bool: the rows that are still to get tokens."""
    return (result.state.finish == RUNNING) & (result.num < budget)


def draw(
    scores: jax.Array, state: State, sampling: Sampling, key: jax.Array, process: Process | None, vocab: int | None
) -> tuple[jax.Array, jax.Array]:
    """The next id [B] of each row and its logprob: processors, then a draw keyed by the row's seed and the position."""
    processed = edited(process, scores, state, vocab)
    processed = draws.process(processed, sampling, state.tokens, state.length, state.prompt)
    return draws.choose(processed, scores, sampling, key, state.length)


def edited(process: Process | None, scores: jax.Array, state: State, vocab: int | None) -> jax.Array:
    """The caller's process of scores [B, V]; it sees the `vocab` ids there are, and not those a mesh has added."""
    if process is None:
        return scores
    more = scores.shape[-1] - (vocab or scores.shape[-1])
    own = process(scores[:, : scores.shape[-1] - more], state)
    return jnp.pad(own, ((0, 0), (0, more)), constant_values=-jnp.inf) if more else own


def emit(
    result: Result, token: jax.Array, logprob: jax.Array, sampling: Sampling, budget: jax.Array, now: jax.Array
) -> Result:
    """Writes the ids and logprobs [B] of the rows that are `now` at work, and finishes those that are done."""
    one, at = now.astype(jnp.int32), jnp.where(now, result.num, result.ids.shape[1])[:, None]
    put = jax.vmap(lambda row, p, new: row.at[p].set(new, mode="drop"))
    state, num = result.state.append(token[:, None], one), result.num + one
    stopped = (token[:, None] == sampling.stop_ids).any(-1)
    full = (num >= budget) | (state.length > state.cache.limits)
    finish = jnp.where(stopped, STOP, jnp.where(full, LENGTH, RUNNING))
    return Result(
        ids=put(result.ids, at, token[:, None]),
        num=num,
        logprobs=put(result.logprobs, at, logprob[:, None]),
        state=state.replace(finish=jnp.where(now, finish, state.finish)),
    )


def prompt(ids: Any, num: Any, config: ModelConfig) -> tuple[Any, Any]:
    """ids [B, T] and num [B] from arrays or lists of lists, padded to a rung of the ladder; (None, None) for none."""
    if ids is None:
        return None, None
    if not hasattr(ids, "ndim"):
        rows: Sequence[Sequence[int]] = ids
        if num is not None:
            raise ValueError("num goes with an array of ids; lists of ids have lengths of their own")
        return pad(rows)
    if ids.ndim != 2:
        raise ValueError(f"ids have shape {ids.shape}: give [rows, tokens], or a list of lists")
    if num is None:
        num = np.full(ids.shape[0], ids.shape[1], np.int32)
    if concrete(ids):
        ids = np.asarray(ids)
        ids = np.pad(ids, ((0, 0), (0, bucket(ids.shape[1]) - ids.shape[1])))
    return ids, per_row(num, ids.shape[0], "num")


def per_row(value: Any, rows: int, name: str) -> Any:
    """An int, or one a row, as [B] int32."""
    value = jnp.asarray(value, jnp.int32) if isinstance(value, jax.Array) else np.asarray(value, np.int32)
    if value.ndim == 0:
        return jnp.full(rows, value) if isinstance(value, jax.Array) else np.full(rows, value)
    if value.shape != (rows,):
        raise ValueError(f"{name} has shape {value.shape} but there are {rows} rows: give one number, or one a row")
    return value


def concrete(*values: Any) -> bool:
    """Whether values are known on the host, rather than traced."""
    return not any(isinstance(value, Tracer) for value in values)


def check(config: ModelConfig, ids: Any, num: Any, budget: Any, held: Cache | None, state: State | None) -> None:
    """Refuses, before anything is dispatched, what could not be answered rightly."""
    num, budget = np.zeros_like(budget) if num is None else np.asarray(num), np.asarray(budget)
    held = state.cache if state is not None else held
    known = state.length if state is not None else held.length if held is not None else np.zeros_like(num)
    if not concrete(known):
        return
    known = mesh.fetch(known)[: len(known) - held.padding if held is not None else None]
    if len(num) != len(known):
        raise ValueError(f"ids have {len(num)} rows but the cache has {len(known)}: give every row a prompt or num 0")
    if budget.min() < 0:
        raise ValueError(f"max_new_tokens is {budget.min()}: it must be at least 0")
    idle = np.flatnonzero((num + (known if state is not None else 0) == 0) & (budget > 0))
    if idle.size:
        raise ValueError(f"row {idle[0]} has an empty prompt: give it at least one token, or max_new_tokens 0")
    skipped = np.flatnonzero((num > 0) & (budget == 0))
    if skipped.size:
        raise ValueError(f"row {skipped[0]} has a prompt but max_new_tokens 0: give it at least 1, or no prompt")
    if ids is not None and concrete(ids):
        inside = np.arange(ids.shape[1]) < num[:, None]
        outside = inside & ((ids < 0) | (ids >= config.vocab_size))
        if outside.any():
            row, place = np.argwhere(outside)[0]
            raise ValueError(f"row {row} has id {ids[row, place]} but the vocabulary ends at {config.vocab_size - 1}")
    need = (known + num + budget) * (budget > 0)
    size = mesh.fetch(held.limits) if held is not None else config.num_positions or need.max()
    size = np.broadcast_to(size, (len(need) + (held.padding if held is not None else 0),))[: len(need)]
    if (need - 1 > size).any():  # the newest token is never fed
        row = int((need - size).argmax())
        raise ValueError(
            f"prompt has {known[row] + num[row]} tokens and {budget[row]} are to be made, but the cache holds "
            f"{size[row]}: shorten the prompt, lower max_new_tokens or make a larger cache"
        )
    check_pages(held, need - 1)


def check_pages(held: Cache | None, length: Any) -> None:
    """Refuses rows that are to grow to `length` [B] where the pool of a paged cache has not the pages for it."""
    if held is None or held.pages is None or not concrete(held.pages.table):
        return
    pages = mesh.fetch(held.pages)
    length = np.pad(np.maximum(length, 0), (0, held.padding))
    want = np.maximum(-(-np.maximum(length - pages.late, 0) // pages.page) - pages.held, 0)
    shared = np.where(pages.table < pages.num, np.take(np.append(pages.holders.max(0), 0), pages.table), 0).max(1) > 1
    want = (want + shared * (length > 0)).reshape(pages.groups, -1).sum(1)
    short = int((want - pages.free).max())
    if short > 0:
        group = int((want - pages.free).argmax())
        raise ValueError(
            f"the rows need {want[group]} more pages of {pages.page} tokens but {pages.free[group]} of the pool's "
            f"{pages.num} are free: shorten prompts, lower max_new_tokens, release rows or give the pool more pages"
        )


def room(config: ModelConfig, ids: Any, num: Any, budget: Any, buffer: int) -> int:
    """The size of a cache for these prompts and budgets: a rung of the ladder."""
    known = concrete(num, budget)
    size = bucket(int((np.asarray(num) + np.asarray(budget)).max()) if known else ids.shape[1] + buffer, least=64)
    return min(size, config.num_positions) if config.num_positions else size
