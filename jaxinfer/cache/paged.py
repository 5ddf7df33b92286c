"""The cache in pages of a pool: a row takes memory as it grows, and rows can have pages in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import kernels, mesh, ops
from jaxinfer.cache.base import LayerCache
from jaxinfer.cache.pages import Pages
from jaxinfer.cache.slots import Slots
from jaxinfer.ops import PAST
from jaxinfer.quantization import Codes

BLOCK = 256  # tokens that are read at once


@struct.dataclass
class Paged(Slots):
    """One layer's pool; the table of `Cache.pages` says which page holds which of a row's tokens."""

    k: Codes  # [D, P, K, Z] tokens, or units of several
    v: Codes

    def letters(self) -> Paged:
        """The letters of the arrays, congruent with them: a device of `data` has the pool of its rows."""
        return Paged(self.k.letters("BPKZ"), self.v.letters("BPKZ"))

    def write(self, k: Codes, v: Codes, slot: jax.Array, end: jax.Array, pages: Pages | None) -> Paged:
        """See `Slots`."""
        assert pages is not None
        where, words = places(slot, self.k.tokens, pages), self.letters()
        return Paged(scatter(self.k, k, where, words.k), scatter(self.v, v, where, words.v))

    def source(self, end: jax.Array, pages: Pages | None) -> Read:
        """See `Slots`."""
        assert pages is not None
        return Read(self.k, self.v, pages.table, pages.page)

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Paged:
        """See `LayerCache`."""
        assert pages is not None
        (page, offset), where = places(source, 1, pages), places(target, 1, pages)

        def taken(x: jax.Array) -> jax.Array:
            take = jax.vmap(lambda pool, page, offset: pool.at[page, :, offset].get(mode="fill", fill_value=0))
            kept = take(x, pages.grouped(page), pages.grouped(offset))  # [D, B / D, n, K, ...]
            return kept.reshape(-1, *kept.shape[2:]).swapaxes(1, 2)

        moved = (jax.tree.map(taken, codes) for codes in (self.k, self.v))
        words = self.letters()
        return Paged(
            *(scatter(x, n, where, w) for x, n, w in zip((self.k, self.v), moved, (words.k, words.v), strict=True))
        )

    def copied(self, source: jax.Array, target: jax.Array, pages: Pages) -> Paged:
        """With the pages source [B] also at the pages target [B], each row's of its group; P: none."""

        def one(x: jax.Array, word: str) -> jax.Array:
            def local(pool: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
                return pool.at[target].set(pool.at[source].get(mode="fill", fill_value=0), mode="drop")

            return mesh.constrain(jax.vmap(local)(x, pages.grouped(source), pages.grouped(target)), word)

        return jax.tree.map(one, self, self.letters())

    def take(self, rows: jax.Array, pages: Pages | None) -> Paged:
        """See `LayerCache`."""
        if pages is None:
            return self

        def empty(x: jax.Array, word: str) -> jax.Array:
            return mesh.constrain(jnp.zeros((pages.groups, pages.num, *x.shape[2:]), x.dtype), word)

        return jax.tree.map(empty, self, self.letters())

    def put(self, rows: jax.Array, other: LayerCache) -> Paged:
        """See `LayerCache`."""
        return self

    def brought(self, other: LayerCache, source: jax.Array, target: jax.Array) -> Paged:
        """See `LayerCache`."""

        def one(x: jax.Array, y: jax.Array, word: str) -> jax.Array:
            every = y.reshape(-1, *y.shape[2:]).at[source.reshape(-1)].get(mode="fill", fill_value=0)
            at = target.reshape(-1)
            return mesh.constrain(x.reshape(-1, *x.shape[2:]).at[at].set(every, mode="drop").reshape(x.shape), word)

        return jax.tree.map(one, self, other, self.letters())


@struct.dataclass
class Read:
    """A pool as rows see it, some pages at a time: a `Source`."""

    k: Codes
    v: Codes
    table: jax.Array  # [B, M]
    page: int = struct.field(pytree_node=False)  # Z in tokens

    def letters(self) -> Any:
        """See `Source`."""
        return Read(self.k.letters("BPKZ"), self.v.letters("BPKZ"), "B_", self.page)  # type: ignore[arg-type]

    @property
    def at_once(self) -> int:
        """Pages of a block."""
        return min(max(BLOCK // self.page, 1), self.table.shape[1])

    @property
    def kept(self) -> kernels.Kept | None:
        """See `Source`."""
        return ops.kept_of(self.k, self.v, table=self.table)

    def blocks(self, past: jax.Array) -> jax.Array:
        """See `Source`: up to the longest row."""
        width = self.at_once * self.page
        return -(-jnp.clip(past, 0, self.table.shape[1] * self.page) // width)

    def block(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `Source`."""
        M, count = self.table.shape[1], self.at_once
        begin = jnp.minimum(index * count, M - count)
        page = jax.lax.dynamic_slice_in_dim(self.table, begin, count, 1)

        def gathered(pool: jax.Array) -> jax.Array:
            D = pool.shape[0]
            take = jax.vmap(lambda pool, page: pool.at[page].get(mode="clip"))
            x = take(pool, page.reshape(D, -1, count))  # [D, B / D, count, K, Z, ...]
            x = x.reshape(-1, *x.shape[2:]).swapaxes(1, 2)  # [B, K, count, Z, ...]
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        k, v = (ops.unfold(jax.tree.map(gathered, codes)) for codes in (self.k, self.v))
        own = begin + jnp.arange(count)
        slot = ops.spread(jnp.where(own >= index * count, own, PAST), self.page)
        return k, v, slot


def places(slot: jax.Array, tokens: int, pages: Pages) -> tuple[jax.Array, jax.Array]:
    """(page, offset) [B, n] of the units [B, n] of so many tokens each."""
    page, offset = pages.find(jnp.where(slot >= PAST, PAST, slot * tokens))
    return page, offset // tokens


def scatter(pool: Codes, new: Codes, where: tuple[jax.Array, jax.Array], letters: Any) -> Codes:
    """A pool [D, P, K, Z, ...] with new [B, K, n, ...] at the places (page, offset) [B, n] of the rows' groups."""
    page, offset = where

    def one(x: jax.Array, new: jax.Array, word: str) -> jax.Array:
        D, at = x.shape[0], (page, offset)
        new = mesh.constrain(new.astype(x.dtype), f"BK_{word[4:]}").swapaxes(1, 2)  # [B, n, K, ...]
        if page.size == 1:  # see `slots.write`
            new = jnp.concatenate([new, new], 1)
            at = (jnp.concatenate([page, jnp.full_like(page, x.shape[1])], 1), jnp.concatenate([offset, offset], 1))
        flat = [a.reshape(D, -1, *a.shape[2:]) for a in (*at, new)]
        return mesh.constrain(jax.vmap(lambda x, p, o, n: x.at[p, :, o].set(n, mode="drop"))(x, *flat), word)

    return jax.tree.map(one, pool, new, letters)
