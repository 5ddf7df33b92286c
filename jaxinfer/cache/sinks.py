"""A window with attention sinks: the first tokens are seen from everywhere (StreamingLLM, Xiao et al. 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import ops
from jaxinfer.cache.base import LayerCache, Step
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.pages import Pages
from jaxinfer.cache.ring import Ring
from jaxinfer.cache.slots import branches_of
from jaxinfer.config import LayerSpec
from jaxinfer.ops import PAST, Held, Look


@struct.dataclass
class Sinks(LayerCache):
    """The first tokens, and a ring of the newest.

    turned: positions are those inside the cache, as StreamingLLM has it: a query that lies further from the sinks than
    the cache is long is turned back, for them alone, to where it would lie right behind what is kept. Distances to the
    newest tokens are the true ones either way.
    """

    first: Dense  # of as many slots as there are sinks; on every device of `seq`
    ring: Ring
    turned: bool = struct.field(pytree_node=False, default=False)
    size: int = struct.field(pytree_node=False, default=0)  # positions of a row: which of two ropes a model takes

    def letters(self) -> Sinks:
        """The letters of the arrays, congruent with them."""
        return self.replace(first=self.first.letters(), ring=self.ring.letters())  # type: ignore[attr-defined]

    @property
    def num(self) -> int:
        """How many sinks there are."""
        return jax.tree.leaves(self.first)[0].shape[2]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step) -> tuple[jax.Array, Sinks]:
        """See `LayerCache`: each token sees the sinks and the window that ends with it."""
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        own, spec = (self.ring.k.encode(k), self.ring.v.encode(v)), self.ring.narrowed(spec)
        first = self.first.write(*own, jnp.where(step.slot < self.num, step.slot, PAST), step.end, None)
        ring = self.ring.write(*own, step.slot, step.end, None)
        if k.shape[2] <= (self.ring.spare or 0):
            recent = [ring.source(step.end, None)]
        else:
            recent = [self.ring.source(step.begin, None), Held(*own, step.slot)]
        since = jnp.full(step.position.shape, self.num)
        front = Held(first.k, first.v, jnp.broadcast_to(jnp.arange(self.num), (len(step.num), self.num)))
        back = q
        if self.turned and spec.rope is not None and spec.window is not None:
            behind = jnp.maximum(step.position - (self.num + spec.window - 1), 0)
            back = ops.turn_back(q, jnp.where(step.valid, behind, 0), spec.rope, self.size)
        looks = [Look(back, front), *(Look(q, source, since) for source in recent)]
        out = ops.attend_looks(looks, step.position, spec, branches_of(step), self.num)
        return out, self.replace(first=first, ring=ring)  # type: ignore[attr-defined]

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Sinks:
        """See `LayerCache`. A token that becomes a sink as it moves lies in the ring before."""
        spots, inside = (self.ring.spot(source), self.ring.spot(target)), jnp.where(target < self.num, target, PAST)

        def into(held: jax.Array, ring: jax.Array) -> jax.Array:
            kept = jax.vmap(lambda row, p: row.at[:, p].get(mode="fill", fill_value=0))(ring, spots[0])
            return jax.vmap(lambda row, n, p: row.at[:, p].set(n, mode="drop"))(held, kept, inside)

        k, v = self.first.k, self.first.v
        first = self.first.replace(k=jax.tree.map(into, k, self.ring.k), v=jax.tree.map(into, v, self.ring.v))  # type: ignore
        return self.replace(first=first, ring=self.ring.move(source, target, pages))  # type: ignore[attr-defined]
