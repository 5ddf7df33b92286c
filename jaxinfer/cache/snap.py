"""A prompt made small once it has been read: what its last queries looked at (SnapKV, Li et al. 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import mesh, ops
from jaxinfer.cache.base import LayerCache, Step
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.heavy import scaled
from jaxinfer.cache.pages import Pages
from jaxinfer.cache.slots import Slots, copy, write
from jaxinfer.config import LayerSpec
from jaxinfer.ops import PAST, Held
from jaxinfer.quantization import Codes


@struct.dataclass
class Snap(LayerCache):
    """While the prompt is read: all keys and values, and the queries of the last `window` tokens.

    `compress` keeps, per kv head, the `budget - window` tokens before them that these queries look at most, after an
    average over `kernel` neighbours, and these last ones.
    """

    whole: Dense
    queries: jax.Array  # [B, window, N, H]: of position p in p mod window
    budget: int = struct.field(pytree_node=False)
    kernel: int = struct.field(pytree_node=False)
    spec: LayerSpec = struct.field(pytree_node=False)
    compresses = True

    def letters(self) -> Snap:
        """The letters of the arrays, congruent with them."""
        return self.replace(whole=self.whole.letters(), queries="B_NH")  # type: ignore[attr-defined]

    @property
    def window(self) -> int:
        """How many queries are kept."""
        return self.queries.shape[1]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step) -> tuple[jax.Array, Snap]:
        """See `LayerCache`."""
        out, whole = self.whole.attend(q, k, v, spec, step)
        last = step.valid & (step.slot >= step.end[:, None] - self.window)
        spot = jnp.where(last, step.slot % self.window, PAST)
        write = jax.vmap(lambda held, p, n: held.at[p].set(n, mode="drop"))
        queries = mesh.constrain(write(self.queries, spot, q.astype(self.queries.dtype)), "B_NH")
        return out, self.replace(whole=whole, queries=queries)  # type: ignore[attr-defined]

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Snap:
        """See `LayerCache`."""
        return self.replace(whole=self.whole.move(source, target, pages))  # type: ignore[attr-defined]

    def compress(self, length: jax.Array, room: int) -> Picked:
        """What is left of rows with `length` [B] tokens, with room for so many more."""
        k, v = self.whole.k, self.whole.v
        S = jax.tree.leaves(k)[0].shape[2]
        position, slot = length[:, None] - self.window + jnp.arange(self.window), jnp.arange(S)
        q = jax.vmap(lambda held, p: held[p])(self.queries, position % self.window)  # in order
        raw = scaled(q, k.decode(), self.spec)  # [B, K, window, G, S]
        seen = (slot <= position[:, :, None]) & (position >= 0)[:, :, None]
        weight = jax.nn.softmax(jnp.where(seen[:, None, :, None], raw, ops.MASKED))
        looked = (weight * (position >= 0)[:, None, :, None, None]).sum((2, 3))  # [B, K, S]
        before = slot < (length - self.window)[:, None]
        rank = pooled(jnp.where(before[:, None], looked, 0), self.kernel)
        rank = jnp.where(before[:, None], rank, -jnp.inf)
        rank = jnp.where((slot < length[:, None])[:, None] & ~before[:, None], jnp.inf, rank)
        kept = min(self.budget, S)
        _, best = jax.lax.top_k(rank, kept)
        best = jnp.sort(jnp.where(jnp.take_along_axis(rank, best, 2) > -jnp.inf, best, S), axis=-1)  # in their order

        def chosen(x: jax.Array) -> jax.Array:
            at = jnp.minimum(best, S - 1).reshape(*best.shape, *[1] * (x.ndim - 3))
            return jnp.pad(jnp.take_along_axis(x, at, 2), [(0, 0), (0, 0), (0, room), *[(0, 0)] * (x.ndim - 3)])

        num = jnp.minimum(length, kept)
        return Picked(jax.tree.map(chosen, k), jax.tree.map(chosen, v), num, length - num)


@struct.dataclass
class Picked(Slots):
    """Some tokens of a prompt, the same number for every head, and after them all that came later."""

    k: Codes  # [B, K, C]
    v: Codes  # [B, K, C]
    num: jax.Array  # [B]: tokens of the prompt that are left, in the first slots
    dropped: jax.Array  # [B]: tokens of the prompt that are not: a later position p lies in slot p - dropped

    def letters(self) -> Picked:
        """The letters of the arrays, congruent with them."""
        return Picked(self.k.letters("BKW"), self.v.letters("BKW"), "B", "B")  # type: ignore[arg-type]

    @property
    def limit(self) -> jax.Array:
        """[B]: positions that a row can hold."""
        return jax.tree.leaves(self.k)[0].shape[2] + self.dropped

    def spot(self, slot: jax.Array) -> jax.Array:
        """Where later positions are kept; past all for none."""
        return jnp.where(slot >= PAST, PAST, slot - self.dropped[:, None])

    def write(self, k: Codes, v: Codes, slot: jax.Array, end: jax.Array, pages: Pages | None) -> Picked:
        """See `Slots`."""
        spot, words = self.spot(slot), self.letters()
        return self.replace(k=write(self.k, k, spot, words.k), v=write(self.v, v, spot, words.v))  # type: ignore

    def source(self, end: jax.Array, pages: Pages | None) -> Held:
        """See `Slots`. What is left of the prompt is before every query: its slots stand for earlier positions."""
        slot = jnp.arange(jax.tree.leaves(self.k)[0].shape[2])
        return Held(self.k, self.v, jnp.where(slot < self.num[:, None], slot, slot + self.dropped[:, None]))

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Picked:
        """See `LayerCache`."""
        spots, words = (self.spot(source), self.spot(target)), self.letters()
        return self.replace(k=copy(self.k, *spots, words.k), v=copy(self.v, *spots, words.v))  # type: ignore


def pooled(x: jax.Array, kernel: int) -> jax.Array:
    """The average of x [B, K, S] over `kernel` neighbours, zeros beyond the ends."""
    half = kernel // 2
    padded = jnp.pad(x, ((0, 0), (0, 0), (half, half)))
    return sum(padded[:, :, i : i + x.shape[2]] for i in range(kernel)) / kernel  # type: ignore[return-value]
