"""The contract of every cache kind.

A call's tokens are *pending* until `advance(num)` commits the first num of each row and drops the rest. Pending tokens
accumulate: a call may start at any position >= length and sees the pending ones before it, so a draft makes J calls
and commits once. Nothing here clamps: a write past `size` is dropped, and `overflow` says so.
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import mesh
from jaxinfer.cache.tree import Tree
from jaxinfer.config import LayerSpec

PAST = 1 << 30  # the position of a pad: past any size, so that its write drops by itself (-1 would wrap)


@struct.dataclass
class Branches:
    """Where the tokens of a draft tree are kept, and what they see: several pending tokens may have one position."""

    slot: jax.Array  # [B, T] of each token; a pad's is PAST
    base: jax.Array  # [B] the first pending slot: what lies before it is committed, and seen by all
    sees: jax.Array  # [T, M] bool: which of the slots from base on a token sees, itself included
    depth: jax.Array  # [M]: how far behind base their positions are


@struct.dataclass
class Step:
    """What one call does to each row, shared by all layers."""

    num: jax.Array  # [B] valid tokens of each row; a row with 0 changes nothing
    position: jax.Array  # [B, T] of each token; a pad's is PAST
    branches: Branches | None = None  # of a draft tree; a token is otherwise kept at its position and sees all before

    @property
    def valid(self) -> jax.Array:
        """[B, T]: which tokens are no pads."""
        return jnp.arange(self.position.shape[1]) < self.num[:, None]

    @property
    def slot(self) -> jax.Array:
        """[B, T]: where each token is kept."""
        return self.position if self.branches is None else self.branches.slot


class LayerCache(abc.ABC):
    """One layer's memory. A kind is a frozen struct whose arrays have the rows first."""

    @staticmethod
    @abc.abstractmethod
    def letters() -> LayerCache:
        """The letters of the arrays, congruent with them."""

    @abc.abstractmethod
    def move(self, source: jax.Array, target: jax.Array) -> LayerCache:
        """What is kept at the slots source [B, n] is put at the slots target [B, n]; past `size` nothing is moved."""

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

    def branch(self, num: jax.Array, tree: Tree, first: int, last: int, root: int = 0) -> Step:
        """The step of a call with the nodes [first, last) of a tree, `num` [B] of them valid.

        Node `root` (0, or 1 where the newest token is no part of it) is the first pending one, at slot `length`.
        """
        valid = jnp.arange(last - first) < num[:, None]
        slot, depth = np.arange(first, last) - root, tree.depth[root:] - root
        sees = jnp.asarray(tree.sees[first:last, root:])
        own = jnp.where(valid, self.length[:, None] + slot, PAST)
        position = jnp.where(valid, self.length[:, None] + depth[slot], PAST)
        return Step(num, position, Branches(own, self.length, sees, jnp.asarray(depth)))

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step
    ) -> tuple[jax.Array, Cache]:
        """Layer `layer`'s attention over what it held before the call plus the call's own tokens."""
        out, new = self.layers[layer].attend(q, k, v, spec, step)
        return out, self.replace(layers=(*self.layers[:layer], new, *self.layers[layer + 1 :]))

    def advance(self, num: jax.Array) -> Cache:
        """Commits the first `num` [B] pending tokens of each row and drops the rest."""
        return self.replace(length=mesh.constrain(self.length + num, "B"))

    def commit(self, path: jax.Array, num: jax.Array) -> Cache:
        """Commits the first `num` [B] nodes of a path [B, n] through the pending tree, and drops the rest."""
        valid = jnp.arange(path.shape[1]) < num[:, None]
        source = jnp.where(valid, self.length[:, None] + path, PAST)
        target = jnp.where(valid, self.length[:, None] + jnp.arange(path.shape[1]), PAST)
        return self.replace(layers=tuple(layer.move(source, target) for layer in self.layers)).advance(num)

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
