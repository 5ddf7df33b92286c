"""Prompt lookup: what followed the last time that these tokens were seen (Saxena 2023). On the device, in the loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.decoding.state import State
from jaxinfer.speculation.drafts.base import Draft
from jaxinfer.speculation.drawing import Draw


@struct.dataclass
class NGram(Draft):
    """Continues as after the latest earlier place that shares the longest end, of `least` to `most` tokens.

    Where the copied stretch runs into the newest token it goes round: a text that repeats itself is drafted for ever.
    """

    most: int = struct.field(pytree_node=False, default=3)
    least: int = struct.field(pytree_node=False, default=1)
    abstains = True

    def propose(self, memory: Any, state: State, active: jax.Array, num: jax.Array, draw: Draw):
        """See `Draft`."""
        place, shared = self.find(state.tokens, state.length)
        period = jnp.maximum(state.length - 1 - place, 1)[:, None]
        source = place[:, None] + 1 + jnp.arange(draw.tree.height) % period
        ids = jnp.take_along_axis(state.tokens, jnp.minimum(source, state.tokens.shape[1] - 1), 1)
        return jnp.maximum(ids, 0), None, jnp.where(shared >= self.least, num, 0), memory, state

    def find(self, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(place [B], shared [B]): tokens [B, S] up to `place` end like the first `length` [B] of them do, so long."""
        S = tokens.shape[1]
        slot = jnp.arange(S)
        alike, run = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
        for back in range(self.most):
            last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0)[:, None], 1)
            there = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :S]  # the token `back` before each
            alike = alike & (there == last) & (last >= 0) & (length[:, None] > back)
            run = run + alike
        run = jnp.where(slot < length[:, None] - 1, run, 0)
        place = jnp.argmax(run * S + slot, axis=1).astype(jnp.int32)
        return place, jnp.take_along_axis(run, place[:, None], 1)[:, 0]
