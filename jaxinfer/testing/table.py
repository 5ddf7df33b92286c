"""A model whose logits can be worked out by hand: a row of a table for each last id."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.cache import Cache, Step


@dataclasses.dataclass(frozen=True)
class Table:
    """`generate(params=table [V, V], model=Table())`: the logits after id i are table[i]. Remembers only lengths."""

    def init_cache(self, rows: int, size: int) -> Cache:
        """A cache without layers."""
        return Cache((), jnp.zeros(rows, jnp.int32), size=size)

    def step(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Cache]:
        """[B, T, V]."""
        return params[ids], cache
