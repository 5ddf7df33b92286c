"""What a generation carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import mesh
from jaxinfer.cache import Cache

RUNNING, STOP, LENGTH = 0, 1, 2
FINISH = ("running", "stop", "length")  # names of the codes


class State(struct.PyTreeNode):
    """All that is remembered of a batch of rows. The cache holds every token but the newest."""

    cache: Cache
    tokens: jax.Array  # [B, S] int32, every id of prompt and output at its position; -1: not known
    length: jax.Array  # [B] int32, how many of them there are
    prompt: jax.Array  # [B] int32, where the newest output begins
    finish: jax.Array  # [B] int32, RUNNING, STOP or LENGTH

    @classmethod
    def init(cls, cache: Cache) -> State:
        """The state of a cache whose tokens, if it holds any, are not known."""
        rows = cache.length.shape[0]
        tokens = jnp.full((rows, cache.size), -1, jnp.int32)
        # distinct buffers: a donated state must not hold one array twice
        return cls(cache, tokens, cache.length + 0, cache.length + 0, jnp.zeros(rows, jnp.int32)).placed()

    def letters(self) -> State:
        """The letters of the arrays, congruent with them. Every device has the tokens of its rows, all of them."""
        return State(self.cache.letters(), "B_", "B", "B", "B")  # type: ignore[arg-type]

    def placed(self) -> State:
        """Itself, lying as its letters say on a mesh."""
        tokens, *rest = (getattr(self, name) for name in ("tokens", "length", "prompt", "finish"))
        length, prompt, finish = (mesh.constrain(x, "B") for x in rest)
        return self.replace(tokens=mesh.constrain(tokens, "B_"), length=length, prompt=prompt, finish=finish)

    @property
    def newest(self) -> jax.Array:
        """[B]: the one id of each row that the cache does not hold."""
        return jnp.take_along_axis(self.tokens, jnp.maximum(self.length - 1, 0)[:, None], 1)[:, 0]

    def append(self, ids: jax.Array, num: jax.Array) -> State:
        """Writes ids [B, T], num [B] of them valid, after what is there; past S they are dropped."""
        offset = jnp.arange(ids.shape[1])
        position = jnp.where(offset < num[:, None], self.length[:, None] + offset, self.tokens.shape[1])
        tokens = jax.vmap(lambda row, p, new: row.at[p].set(new, mode="drop"))(self.tokens, position, ids)
        return self.replace(tokens=tokens, length=self.length + num)

    def ask(self, ids: jax.Array, num: jax.Array) -> State:
        """A new prompt [B, T] for the rows with num > 0: their next token is the first of a new output."""
        asked, state = num > 0, self.append(ids, num)
        return state.replace(
            prompt=jnp.where(asked, state.length, self.prompt), finish=jnp.where(asked, RUNNING, self.finish)
        )

    def resume(self) -> State:
        """Rows that ran out of budget run again, where the cache has room; rows that came to a stop stay stopped."""
        again = (self.finish == LENGTH) & (self.length <= self.cache.limits)
        return self.replace(finish=jnp.where(again, RUNNING, self.finish))

    def cut(self, length: jax.Array) -> State:
        """Ends rows at `length` [B], where a stop string did; rows shorter than that stay as they are."""
        ends = length <= self.length
        return self.replace(
            cache=self.cache.rewind(jnp.maximum(length - 1, 0)),
            length=jnp.minimum(self.length, length),
            finish=jnp.where(ends, STOP, self.finish),
        )


def read(
    model: Any, params: Any, state: State, ids: jax.Array, num: jax.Array
) -> tuple[State, jax.Array, jax.Array | None]:
    """Takes in a prompt, or a chunk of one: everything but the newest token goes through the model, unscored.

    Gives also what went through [B, T], and its last hidden states [B, T, D], of a research model None.
    """
    state = state.ask(ids, num)
    T = ids.shape[1]
    position = state.cache.length[:, None] + jnp.arange(T)
    known = jnp.take_along_axis(state.tokens, jnp.minimum(position, state.tokens.shape[1] - 1), 1)
    count = jnp.where(num > 0, state.length - 1 - state.cache.length, 0)
    hidden, cache = model.read(params, known, state.cache, state.cache.step(count, T))
    return state.replace(cache=cache.advance(count)), known, hidden


def bucket(n: int, least: int = 16) -> int:
    """The next rung of a short ladder (16, 24, 32, 48, 64, 96, ...), so that few shapes are ever compiled."""
    rung = least
    while rung < n:
        if rung * 3 // 2 >= n:
            return rung * 3 // 2
        rung *= 2
    return rung


def idle(cache: Cache, *values: Any) -> Any:
    """Arrays of one entry a row, with zeros for the inactive rows that a mesh added to the cache. None stays."""

    def fill(x: Any) -> Any:
        return (np if isinstance(x, np.ndarray) else jnp).pad(x, ((0, cache.padding), *[(0, 0)] * (x.ndim - 1)))

    return [fill(x) if cache.padding and x is not None else x for x in values]


def pad(rows: Any, least: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids of different lengths as (ids [B, T], num [B]), T a rung of the ladder."""
    num = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), bucket(int(num.max(initial=1)), least)), np.int32)
    for row, out in zip(rows, ids, strict=True):
        out[: len(row)] = row
    return ids, num
