"""What a generation with speculation gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import mesh
from jaxinfer.decoding.generate import Result


@struct.dataclass
class Memory:
    """What a loop remembers of its rows beside their state."""

    draft: Any  # the draft's own memory
    rate: jax.Array  # [B] float32: how often a token of a draft was accepted of late, an exponential mean


class Speculated(Result):
    """What `generate` gives, and how the drafts fared."""

    rounds: jax.Array  # [B] int32: passes of the target
    drafted: jax.Array  # [B, J] int32: how often a token was drafted at each place of a round (a tree: at each depth)
    accepted: jax.Array  # [B, J] int32: how often it was emitted
    memory: Memory  # to go on with

    @property
    def tokens_per_round(self) -> jax.Array:
        """Tokens a row emits with one pass of the target, over all rows."""
        return self.num.sum() / jnp.maximum(self.rounds.sum(), 1)

    def placed(self) -> Speculated:
        """Itself, rows over the devices of a mesh."""
        words = {"rounds": "B", "drafted": "B_", "accepted": "B_"}
        own = {name: mesh.constrain(getattr(self, name), word) for name, word in words.items()}
        memory = Memory(self.memory.draft, mesh.constrain(self.memory.rate, "B"))
        return super().placed().replace(**own, memory=memory)  # type: ignore[return-value]

    def first(self, rows: int) -> Speculated:
        """Of the first rows alone; state and memory keep all."""
        return super(Speculated, self.replace(memory=None)).first(rows).replace(memory=self.memory)  # type: ignore
