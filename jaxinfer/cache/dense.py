"""The preallocated cache."""

from __future__ import annotations

import jax
from flax import struct

from jaxinfer.cache.pages import Pages
from jaxinfer.cache.slots import Slots, copy, write
from jaxinfer.ops import Held
from jaxinfer.quantization import Codes


@struct.dataclass
class Dense(Slots):
    """Every key and value kept, left aligned, one slot per position."""

    k: Codes  # [B, K, S]
    v: Codes  # [B, K, S]
    whole: bool = struct.field(pytree_node=False, default=False)  # every device of `seq` has all of it

    def letters(self) -> Dense:
        """The letters of the arrays, congruent with them."""
        word = "BKW" if self.whole else "BKS"
        return Dense(self.k.letters(word), self.v.letters(word), self.whole)

    def write(self, k: Codes, v: Codes, slot: jax.Array, end: jax.Array, pages: Pages | None) -> Dense:
        """See `Slots`."""
        words = self.letters()
        return self.replace(k=write(self.k, k, slot, words.k), v=write(self.v, v, slot, words.v))  # type: ignore

    def source(self, end: jax.Array, pages: Pages | None) -> Held:
        """See `Slots`. What lies past the newest token is seen by no query."""
        return Held(self.k, self.v)

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Dense:
        """See `LayerCache`."""
        words = self.letters()
        return self.replace(k=copy(self.k, source, target, words.k), v=copy(self.v, source, target, words.v))  # type: ignore
