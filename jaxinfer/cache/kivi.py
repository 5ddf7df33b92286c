"""Old tokens in four bits, new ones as they are (KIVI, Liu et al. 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import ops
from jaxinfer.cache.base import LayerCache, Step
from jaxinfer.cache.pages import Pages
from jaxinfer.cache.ring import Ring
from jaxinfer.cache.slots import Slots, branches_of
from jaxinfer.config import LayerSpec
from jaxinfer.ops import PAST, Held, Look


@struct.dataclass
class Kivi(LayerCache):
    """Groups of g tokens in codes, and a ring of the newest in plain numbers.

    A query at position p sees codes of the whole groups among the tokens before p - residual, and plain numbers of all
    others, its own call's among them. So what is seen depends on positions alone: not on how a prompt was cut into
    calls, nor on what was drafted, dropped or taken back. A group is coded by the first call that has such a query, and
    again if its tokens are taken back and others come in their place.
    """

    old: Slots  # units are groups
    ring: Ring  # residual + one open group + max_pending + max_rewind slots
    residual: int = struct.field(pytree_node=False)

    def letters(self) -> Kivi:
        """The letters of the arrays, congruent with them."""
        return self.replace(old=self.old.letters(), ring=self.ring.letters())  # type: ignore[attr-defined]

    def groups(self, position: jax.Array) -> jax.Array:
        """How many groups a query at a position sees as codes."""
        return jnp.maximum(position - self.residual, 0) // self.old.k.tokens

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step) -> tuple[jax.Array, Kivi]:
        """See `LayerCache`."""
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        own = self.ring.k.encode(k), self.ring.v.encode(v)
        ring = self.ring.write(*own, step.slot, step.end, None)
        first, end = (jnp.where(step.num > 0, self.groups(x - 1), 0) for x in (step.begin, step.end))
        unit = first[:, None] + jnp.arange(-(-k.shape[2] // self.old.k.tokens))
        unit = jnp.where(unit < end[:, None], unit, PAST)  # the groups that are coded now
        new_k, new_v = (
            codes.encode(self.collect(held.decode(), new.decode(), unit, step))
            for codes, held, new in zip((self.old.k, self.old.v), (self.ring.k, self.ring.v), own, strict=True)
        )
        old = self.old.write(new_k, new_v, unit, end, step.pages)
        border = self.groups(step.position) * self.old.k.tokens
        if self.old.spare is None or k.shape[2] <= (self.ring.spare or 0):
            coded = [old.source(end, step.pages)]
        else:
            coded = [self.old.source(first, step.pages), Held(new_k, new_v, unit)]
        if k.shape[2] <= (self.ring.spare or 0):
            plain = [ring.source(step.end, None)]
        else:
            plain = [self.ring.source(step.begin, None), Held(*own, step.slot)]
        looks = [Look(q, source, until=border) for source in coded] + [Look(q, source, border) for source in plain]
        out = ops.attend_looks(looks, step.position, self.old.narrowed(spec), branches_of(step))
        return out, self.replace(old=old, ring=ring)  # type: ignore[attr-defined]

    def collect(self, held: jax.Array, own: jax.Array, unit: jax.Array, step: Step) -> jax.Array:
        """The tokens [B, K, n, g, H] of units [B, n], from the ring's [B, K, R, H] or this call's own [B, K, T, H]."""
        slot = ops.spread(unit, self.old.k.tokens)  # [B, n g]
        behind = slot - step.begin[:, None]
        take = jax.vmap(lambda x, p: x.at[:, p].get(mode="clip"))
        mine, earlier = take(own, jnp.clip(behind, 0, own.shape[2] - 1)), take(held, self.ring.spot(slot))
        x = jnp.where((behind >= 0)[:, None, :, None], mine, earlier)
        return x.reshape(*x.shape[:2], unit.shape[1], -1, x.shape[3])

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Kivi:
        """See `LayerCache`. What is pending is in no group."""
        return self.replace(ring=self.ring.move(source, target, None))  # type: ignore[attr-defined]

    # --- rows, and pages of the old ---

    def take(self, rows: jax.Array, pages: Pages | None) -> Kivi:
        """See `LayerCache`."""
        return self.replace(old=self.old.take(rows, pages), ring=self.ring.take(rows, pages))  # type: ignore

    def put(self, rows: jax.Array, other: Kivi) -> Kivi:  # type: ignore[override]
        """See `LayerCache`."""
        return self.replace(old=self.old.put(rows, other.old), ring=self.ring.put(rows, other.ring))  # type: ignore

    def copied(self, source: jax.Array, target: jax.Array, pages: Pages) -> Kivi:
        """See `LayerCache`."""
        return self.replace(old=self.old.copied(source, target, pages))  # type: ignore[attr-defined]

    def brought(self, other: Kivi, source: jax.Array, target: jax.Array) -> Kivi:  # type: ignore[override]
        """See `LayerCache`."""
        return self.replace(old=self.old.brought(other.old, source, target))  # type: ignore[attr-defined]
