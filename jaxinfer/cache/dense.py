"""The preallocated cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import mesh, ops
from jaxinfer.cache.base import LayerCache, Step
from jaxinfer.config import LayerSpec

SCORES = 1 << 24  # scores of one layer (B N T S) above which they are made block by block: 64 MB in float32


@struct.dataclass
class Dense(LayerCache):
    """Every key and value kept, left aligned, one slot per position."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]

    @classmethod
    def init(cls, spec: LayerSpec, rows: int, size: int, dtype: jnp.dtype) -> Dense:
        """An empty one: zeros, never uninitialised memory (0 * NaN would reach the sum over slots)."""
        shape = (rows, spec.num_kv_heads, size, spec.head_width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @staticmethod
    def letters() -> Dense:
        """The letters of the arrays, congruent with them."""
        return Dense("BKSH", "BKSH")  # type: ignore[arg-type]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step) -> tuple[jax.Array, Dense]:
        """Writes k, v at their positions, then lets q look back."""
        new = Dense(write(self.k, k, step.slot), write(self.v, v, step.slot))
        B, T, N, _ = q.shape
        attend = ops.attend_blockwise if B * N * T * self.k.shape[2] > SCORES and T > 1 else ops.attend
        branches = step.branches and (step.branches.base, step.branches.sees, step.branches.depth)
        return attend(q, new.k, new.v, step.position, spec, branches=branches), new

    def move(self, source: jax.Array, target: jax.Array) -> Dense:
        """See `LayerCache`."""
        return Dense(copy(self.k, source, target), copy(self.v, source, target))


def write(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """new [B, T, K, H] into cache [B, K, S, H] at position [B, T]; what lies past S is dropped.

    A vmapped scatter is the form that stays in place when donated and local when B, K or S are sharded.
    """
    new = mesh.constrain(new.transpose(0, 2, 1, 3).astype(cache.dtype), "BK_H")
    if (
        position.size == 1
    ):  # written as two, one of them dropped: XLA:CPU makes a slice of a lone one, and copies for it
        new = jnp.concatenate([new, new], 2)
        position = jnp.concatenate([position, jnp.full_like(position, cache.shape[2])], 1)
    written = jax.vmap(lambda c, n, p: c.at[:, p].set(n, mode="drop"))(cache, new, position)
    return mesh.constrain(written, "BKSH")


def copy(cache: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """cache [B, K, S, H] with what lies at source [B, n] also at target [B, n]; past S nothing is read or written."""
    take = jax.vmap(lambda c, p: c.at[:, p].get(mode="fill", fill_value=0))
    kept = mesh.constrain(take(cache, source), "BK_H")
    put = jax.vmap(lambda c, n, p: c.at[:, p].set(n, mode="drop"))
    return mesh.constrain(put(cache, kept, target), "BKSH")
