"""The cache of a layer that looks back over a window: as many slots as that takes, used again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.cache.pages import Pages
from jaxinfer.cache.slots import Slots, copy, write
from jaxinfer.config import LayerSpec
from jaxinfer.ops import PAST, Held
from jaxinfer.quantization import Codes


@struct.dataclass
class Ring(Slots):
    """The newest keys and values: position p lies in slot p mod R until position p + R takes its place.

    R = W - 1 + max_pending + max_rewind. What a dropped draft leaves behind lies at most max_pending - 1 positions past
    the next token, and would be taken for the position R before that: outside of every window.
    """

    k: Codes  # [B, K, R]
    v: Codes  # [B, K, R]
    window: int = struct.field(pytree_node=False)  # W
    spare: int | None = struct.field(pytree_node=False)  # max_pending

    def letters(self) -> Ring:
        """The letters of the arrays, congruent with them. A device of `seq` has all of a ring: it is small."""
        return self.replace(k=self.k.letters("BKW"), v=self.v.letters("BKW"))  # type: ignore[attr-defined]

    @property
    def size(self) -> int:
        """R."""
        return jax.tree.leaves(self.k)[0].shape[2]

    def narrowed(self, spec: LayerSpec) -> LayerSpec:
        """See `Slots`."""
        return spec.replace(window=min(self.window, spec.window or self.window))

    def write(self, k: Codes, v: Codes, slot: jax.Array, end: jax.Array, pages: Pages | None) -> Ring:
        """See `Slots`. Of a long call only the newest find room."""
        spot, words = self.spot(jnp.where(slot >= end[:, None] - self.size, slot, PAST)), self.letters()
        return self.replace(k=write(self.k, k, spot, words.k), v=write(self.v, v, spot, words.v))  # type: ignore

    def source(self, end: jax.Array, pages: Pages | None) -> Held:
        """See `Slots`."""
        return Held(self.k, self.v, self.places(end))

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Ring:
        """See `LayerCache`."""
        spots, words = (self.spot(source), self.spot(target)), self.letters()
        return self.replace(k=copy(self.k, *spots, words.k), v=copy(self.v, *spots, words.v))  # type: ignore

    def spot(self, slot: jax.Array) -> jax.Array:
        """Where slots are kept; past all for none."""
        return jnp.where(slot >= PAST, PAST, slot % self.size)

    def places(self, end: jax.Array) -> jax.Array:
        """Which slot [B, R] lies in each place when all before `end` [B] have been written; PAST: none."""
        newest = end[:, None] - 1
        place = newest - (newest - jnp.arange(self.size)) % self.size
        return jnp.where((place >= 0) & (end > 0)[:, None], place, PAST)
