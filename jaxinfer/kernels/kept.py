"""What the attention kernels are given: keys and values as a cache keeps them, and what a query makes of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

PAST = 1 << 30  # the position of a pad, and of a slot that holds nothing: past any size, so that no query sees it


class Kept(NamedTuple):
    """Keys and values as a cache keeps them: slots of each row, or pages of a pool that a table gives to rows."""

    k: jax.Array  # [B, K, S, H] float32, bfloat16 (or its bits, uint16), float16, or int8 with scales
    v: jax.Array
    scales: tuple[jax.Array, jax.Array] | None = None  # [B, K, S] float32, of k and of v
    slot: jax.Array | None = None  # [B, S] int32, which slot of the text each is, past all for none; None: its index
    # [B, M] int32, the page of each Z slots of a row, past all for none. k and v are then a pool [D, P, K, Z, H] (and
    # scales [D, P, K, Z]), of which the d-th B / D rows have pages in the d-th part.
    table: jax.Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """Of the numbers, or of the codes."""
        return jnp.dtype(jnp.bfloat16) if self.k.dtype == jnp.uint16 else self.k.dtype

    @property
    def numbers(self) -> tuple[jax.Array, jax.Array]:
        """k and v of no scales, bits as the numbers that they are of."""
        if self.k.dtype != jnp.uint16:
            return self.k, self.v
        k, v = (jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in (self.k, self.v))
        return k, v

    @property
    def slots(self) -> int:
        """S: how many a row has, pages that it was not given included."""
        return self.k.shape[2] if self.table is None else self.table.shape[1] * self.k.shape[3]


class Rule(NamedTuple):
    """What a query makes of its scores, and which it has: as a LayerSpec says it."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: int = 0
