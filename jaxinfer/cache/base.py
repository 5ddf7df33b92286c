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
from jaxinfer.cache.pages import Pages
from jaxinfer.cache.tree import Tree
from jaxinfer.config import LayerSpec
from jaxinfer.ops import PAST  # the position of a pad: its write drops by itself (-1 would wrap)
from jaxinfer.quantization import Codes


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
    pages: Pages | None = None  # of a paged cache

    @property
    def valid(self) -> jax.Array:
        """[B, T]: which tokens are no pads."""
        return jnp.arange(self.position.shape[1]) < self.num[:, None]

    @property
    def slot(self) -> jax.Array:
        """[B, T]: where each token is kept."""
        return self.position if self.branches is None else self.branches.slot

    @property
    def begin(self) -> jax.Array:
        """[B]: the slot of each row's first token; 0 of a row without any."""
        return jnp.where(self.num > 0, self.slot[:, 0], 0)

    @property
    def end(self) -> jax.Array:
        """[B]: the slot after each row's last token; 0 of a row without any."""
        return self.begin + self.num


class LayerCache(abc.ABC):
    """One layer's memory. A kind is a frozen struct whose arrays have the rows first."""

    trees = True  # whether it can hold a draft tree
    compresses = False  # whether it makes a prompt small once that has been read
    limit: jax.Array | None = None  # [B] positions that a row can hold, where that is not the cache's size

    @abc.abstractmethod
    def letters(self) -> LayerCache:
        """The letters of the arrays, congruent with them."""

    @abc.abstractmethod
    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> LayerCache:
        """What is kept at the slots source [B, n] is put at the slots target [B, n]; past `size` nothing is moved."""

    @abc.abstractmethod
    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of q [B, T, N, H] over what was held plus this call's k, v [B, T, K, H]: ([B, T, N, H], cache)."""

    def commit(self, length: jax.Array, num: jax.Array) -> LayerCache:
        """Told that the first `num` [B] pending tokens after `length` [B] stay."""
        return self

    def rewind(self, length: jax.Array) -> LayerCache:
        """Told that only the first `length` [B] tokens stay."""
        return self

    def compress(self, length: jax.Array, room: int) -> LayerCache:
        """What is left of a prompt of `length` [B] tokens that has been read, with room for so many more."""
        return self

    def take(self, rows: jax.Array, pages: Pages | None) -> LayerCache:
        """Of some rows [M], in that order; what lies in pages is an empty pool for `pages` (as it is, for None)."""
        return jax.tree.map(lambda x: x[rows], self)

    def put(self, rows: jax.Array, other: LayerCache) -> LayerCache:
        """With rows [M] replaced by the first M of `other`, of the same kind, but for what lies in pages."""
        return jax.tree.map(lambda x, y: x.at[rows].set(y[: len(rows)]), self, other)

    def copied(self, source: jax.Array, target: jax.Array, pages: Pages) -> LayerCache:
        """With the pages source [B] also at the pages target [B], each in its row's group; P: none."""
        return self

    def brought(self, other: LayerCache, source: jax.Array, target: jax.Array) -> LayerCache:
        """With the pages source [n, M] of another pool at target [n, M], both counted over all groups."""
        return self


class Cache(struct.PyTreeNode):
    """The memory of a batch of rows: an explicit pytree that the caller carries, and spends once, like a key."""

    layers: tuple[LayerCache, ...]
    length: jax.Array  # [B] int32: committed tokens of each row
    size: int = struct.field(pytree_node=False)  # S: positions that a row can hold
    max_rewind: int = struct.field(pytree_node=False, default=0)
    max_pending: int = struct.field(pytree_node=False, default=1)
    padding: int = struct.field(pytree_node=False, default=0)  # inactive rows at the end, which a mesh asked for
    pages: Pages | None = None  # where the rows' tokens lie in the pools of its layers, if any are paged
    limit: jax.Array | None = None  # [B] int32: positions that a row can hold, where prompts were made small; None: S

    @property
    def rows(self) -> int:
        """B, without the padding."""
        return self.length.shape[0] - self.padding

    def letters(self) -> Cache:
        """The letters of the arrays, congruent with them."""
        return self.replace(
            layers=tuple(layer.letters() for layer in self.layers),
            length="B",
            pages=self.pages and self.pages.letters(),
            limit=None if self.limit is None else "B",
        )

    @property
    def limits(self) -> jax.Array | int:
        """[B] or []: positions that a row can hold."""
        return self.size if self.limit is None else self.limit

    @property
    def overflow(self) -> jax.Array:
        """[B] bool: rows that committed more tokens than the cache holds; what did not fit was dropped."""
        over = self.length > self.limits
        return over if self.pages is None else over | self.pages.lacking

    @property
    def bytes(self) -> int:
        """Bytes of all arrays, over all devices."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def form(self) -> str:
        """What the first layer keeps of its oldest tokens: a dtype, or int4; "none" if nothing."""
        leaves = jax.tree.leaves(self.layers, is_leaf=lambda x: isinstance(x, Codes))
        return next((x.form for x in leaves if isinstance(x, Codes)), "none")

    # --- a call ---

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

    def reserve(self, step: Step) -> Cache:
        """Takes the pages that the tokens of a step need; the decoder does so before its first layer."""
        if self.pages is None:
            return self
        pages, source, target = self.pages.reserve(self.length, jnp.minimum(step.end, self.size))
        return self.replace(pages=pages, layers=tuple(layer.copied(source, target, pages) for layer in self.layers))

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step
    ) -> tuple[jax.Array, Cache]:
        """Layer `layer`'s attention over what it held before the call plus the call's own tokens."""
        out, new = self.layers[layer].attend(q, k, v, spec, step.replace(pages=self.pages))  # type: ignore
        return out, self.replace(layers=(*self.layers[:layer], new, *self.layers[layer + 1 :]))

    # --- what stays of it ---

    def advance(self, num: jax.Array) -> Cache:
        """Commits the first `num` [B] pending tokens of each row and drops the rest."""
        layers = tuple(layer.commit(self.length, num) for layer in self.layers)
        return self.replace(layers=layers, length=mesh.constrain(self.length + num, "B"))

    def commit(self, path: jax.Array, num: jax.Array) -> Cache:
        """Commits the first `num` [B] nodes of a path [B, n] through the pending tree, and drops the rest."""
        valid = jnp.arange(path.shape[1]) < num[:, None]
        source = jnp.where(valid, self.length[:, None] + path, PAST)
        target = jnp.where(valid, self.length[:, None] + jnp.arange(path.shape[1]), PAST)
        layers = tuple(layer.move(source, target, self.pages) for layer in self.layers)
        return self.replace(layers=layers).advance(num)

    def rewind(self, length: jax.Array) -> Cache:
        """Takes back committed tokens, down to `length` [B]; at most `max_rewind` of them, or all. Never moves forward.

        Pages that are no longer needed are free again: `rewind` to 0 releases a row.
        """
        length = jnp.minimum(self.length, length)
        layers = tuple(layer.rewind(length) for layer in self.layers)
        return self.replace(layers=layers, length=length, pages=self.pages and self.pages.release(length))

    @property
    def compresses(self) -> bool:
        """Whether there is a prompt yet to be made small."""
        return self.limit is None and any(layer.compresses for layer in self.layers)

    def compress(self, room: int) -> Cache:
        """Makes prompts that have been read small, where its kind is one that does (SnapKV), with room for more tokens.

        Such a cache is read whole before; it cannot be taken back to before this.
        """
        if not self.compresses:
            return self
        layers = tuple(layer.compress(self.length, room + self.max_pending) for layer in self.layers)
        limits = [layer.limit for layer in layers if layer.limit is not None]
        return self.replace(layers=layers, limit=jnp.minimum(limits[0], self.size))

    # --- rows ---

    def take(self, rows: jax.Array) -> Cache:
        """The cache of some rows [M], in that order. Pages that rows had in common are then each one's own."""
        more = mesh.round_up(len(rows), "B") - len(rows)
        rows = jnp.concatenate([jnp.asarray(rows), jnp.zeros(more, jnp.int32)]) if more else jnp.asarray(rows)
        pages = self.pages and self.pages.like(len(rows))
        new = self.replace(
            layers=tuple(layer.take(rows, pages) for layer in self.layers),
            length=self.length[rows],
            limit=None if self.limit is None else self.limit[rows],
            padding=more,
            pages=pages,
        )
        return new if pages is None else new.paged_from(jnp.arange(len(rows)), self, rows)

    def put(self, rows: jax.Array, other: Cache) -> Cache:
        """Rows [M] replaced by those of `other`, a cache of M rows of the same size and kind."""
        rows = jnp.asarray(rows)
        layers = tuple(own.put(rows, new) for own, new in zip(self.layers, other.layers, strict=True))
        count = other.rows
        limit = None if self.limit is None else self.limit.at[rows].set(other.limit[:count])  # type: ignore[index]
        new = self.replace(layers=layers, length=self.length.at[rows].set(other.length[:count]), limit=limit)
        if self.pages is None:
            return new
        new = new.replace(pages=self.pages.release(jnp.where(one_of(rows, len(self.length)), 0, new.length)))
        return new.paged_from(rows, other, jnp.arange(count))

    def fork(self, rows: jax.Array, sources: jax.Array, length: jax.Array | None = None) -> Cache:
        """Rows [n] become what others, `sources` [n], are, or their first `length` [n] tokens.

        In a paged cache they have the pages in common, and each copies the last one when it writes to it; the others
        of a mesh's data group have pages of their own, so there a row and its source must be of one group. A ring has
        only its newest tokens: `length` may lie at most max_rewind behind there.
        """
        rows, sources = jnp.asarray(rows), jnp.asarray(sources)
        length = self.length[sources] if length is None else jnp.minimum(self.length[sources], length)
        layers = tuple(own.put(rows, own.take(sources, None)) for own in self.layers)
        limit = None if self.limit is None else self.limit.at[rows].set(self.limit[sources])
        pages = self.pages and self.pages.share(rows, sources, length)
        return self.replace(layers=layers, length=self.length.at[rows].set(length), pages=pages, limit=limit)

    def paged_from(self, rows: jax.Array, other: Cache, sources: jax.Array) -> Cache:
        """With the pages that the rows `sources` [M] of another cache have copied into pages of `rows` [M]."""
        assert self.pages is not None and other.pages is not None
        wanted = jnp.where(one_of(rows, len(self.length)), self.length, 0)
        pages, *_ = self.pages.reserve(jnp.zeros_like(wanted), wanted)
        source, target = other.pages.everywhere(sources), pages.everywhere(rows)
        layers = (own.brought(new, source, target) for own, new in zip(self.layers, other.layers, strict=True))
        return self.replace(layers=tuple(layers), pages=pages)


def one_of(rows: jax.Array, B: int) -> jax.Array:
    """[B] bool: which of B rows are among `rows`."""
    return jnp.zeros(B, bool).at[rows].set(True)
