"""The cache that keeps nothing: for training and scoring."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import ops
from jaxinfer.cache.base import LayerCache, Step
from jaxinfer.cache.pages import Pages
from jaxinfer.config import LayerSpec


@struct.dataclass
class Nothing(LayerCache):
    """Attention over the call's own tokens alone. Differentiable."""

    trees = False

    def letters(self) -> Nothing:
        """No arrays, no letters."""
        return Nothing()

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Nothing:
        """There is nothing to move."""
        return self

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step
    ) -> tuple[jax.Array, Nothing]:
        """Each token sees the tokens of this call up to itself, inside its window."""
        if step.branches is not None:
            raise ValueError("a cache of kind none keeps no pending tokens, so no draft tree: take dense")
        own = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
        return ops.attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), own, spec), self
