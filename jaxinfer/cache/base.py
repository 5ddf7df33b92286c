"""The contract of every cache kind.

A call's tokens are *pending* until `advance(num)` commits the first num of each row and drops the rest. Pending tokens
accumulate: a call may start at any position >= length and sees the pending ones before it, so a draft makes J calls
and commits once. Nothing here clamps: a write past `size` is dropped, and `overflow` says so.
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import mesh
from jaxinfer.config import LayerSpec

PAST = 1 << 30  # the position of a pad: past any size, so that its write drops by itself (-1 would wrap)


@struct.dataclass
class Step:
    """What one call does to each row, shared by all layers."""

    num: jax.Array  # [B] valid tokens of each row; a row with 0 changes nothing
    position: jax.Array  # [B, T] of each token; a pad's is PAST
    parent: jax.Array | None = None  # [T] of a draft tree, or none

    @property
    def valid(self) -> jax.Array:
        """[B, T]: which tokens are no pads."""
        return jnp.arange(self.position.shape[1]) < self.num[:, None]


class LayerCache(abc.ABC):
    """One layer's memory. A kind is a frozen struct whose arrays have the rows first."""

    @staticmethod
    @abc.abstractmethod
    def letters() -> LayerCache:
        """The letters of the arrays, congruent with them."""

    @abc.abstractmethod
    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of q [B, T, N, H] over what was held plus this call's k, v [B, T, K, H]: ([B, T, N, H], cache)."""


class Cache(struct.PyTreeNode):
    """The memory of a batch of rows: an explicit pytree that the caller carries, and spends once, like a key."""

    layers: tuple[LayerCache, ...]
    length: jax.Array  # [B] int32: committed tokens of each row
    size: int = struct.field(pytree_node=False)  # S: positions that a row can hold
    max_rewind: int = struct.field(pytree_node=False, default=0)
    max_pending: int = struct.field(pytree_node=False, default=1)
    padding: int = struct.field(pytree_node=False, default=0)  # inactive rows at the end, which a mesh asked for

    @property
    def rows(self) -> int:
        """B, without the padding."""
        return self.length.shape[0] - self.padding

    def letters(self) -> Cache:
        """The letters of the arrays, congruent with them."""
        return self.replace(layers=tuple(layer.letters() for layer in self.layers), length="B")

    @property
    def overflow(self) -> jax.Array:
        """[B] bool: rows that committed more tokens than the cache holds; what did not fit was dropped."""
        return self.length > self.size

    @property
    def bytes(self) -> int:
        """Bytes of all arrays, over all devices."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def step(self, num: jax.Array, T: int, start: jax.Array | None = None) -> Step:
        """The step of a call with T tokens a row, `num` [B] of them valid, from `start` [B] on (default: `length`)."""
        start = self.length if start is None else start
        valid = jnp.arange(T) < num[:, None]
        return Step(num, jnp.where(valid, start[:, None] + jnp.arange(T), PAST))

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step
    ) -> tuple[jax.Array, Cache]:
        """Layer `layer`'s attention over what it held before the call plus the call's own tokens."""
        out, new = self.layers[layer].attend(q, k, v, spec, step)
        return out, self.replace(layers=(*self.layers[:layer], new, *self.layers[layer + 1 :]))

    def advance(self, num: jax.Array) -> Cache:
        """Commits the first `num` [B] pending tokens of each row and drops the rest."""
        return self.replace(length=mesh.constrain(self.length + num, "B"))

    def rewind(self, length: jax.Array) -> Cache:
        """Takes back committed tokens, down to `length` [B]; at most `max_rewind` of them. Never moves forward."""
        return self.replace(length=jnp.minimum(self.length, length))

    def take(self, rows: jax.Array) -> Cache:
        """The cache of some rows [M], in that order."""
        more = mesh.round_up(len(rows), "B") - len(rows)
        rows = jnp.concatenate([jnp.asarray(rows), jnp.zeros(more, jnp.int32)]) if more else rows
        return jax.tree.map(lambda a: a[rows], self).replace(padding=more)

    def put(self, rows: jax.Array, other: Cache) -> Cache:
        """Rows [M] replaced by those of `other`, a cache of M rows of the same size and kind."""
        count = other.rows
        return jax.tree.map(
            lambda a, b: a.at[rows].set(b[:count]), self.replace(padding=0), other.replace(padding=0)
        ).replace(padding=self.padding)
