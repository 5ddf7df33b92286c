"""A budget of tokens: those that were looked at most, and the newest (H2O, Zhang et al. 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import mesh, ops
from jaxinfer.cache.base import LayerCache, Step
from jaxinfer.cache.pages import Pages
from jaxinfer.config import LayerSpec
from jaxinfer.ops import PAST
from jaxinfer.quantization import Codes

QUERIES = 64  # of a long call, whose scores are held at once


@struct.dataclass
class Heavy(LayerCache):
    """Per row and kv head: up to `budget` tokens, each with the attention that it got from all queries so far.

    Each token that comes when there are `budget` drives out the one with the least attention, of those that are not
    among the `recent` newest. What is pending drives out tokens too, each after its own query, as if it were
    committed; what then stays is kept a pending token at a time, until `commit` says how many there are. A call of more
    than max_pending tokens reads its prompt whole, and drops to the budget once, at its end.
    """

    k: Codes  # [B, K, C], C = budget + max_pending
    v: Codes  # [B, K, C]
    place: jax.Array  # [B, K, C] int32: the position of each slot's token; PAST where it has none
    score: jax.Array  # [B, K, C] float32: the attention it got, of all queries of the head's group
    alive: jax.Array  # [B, K, max_pending, C] bool: whose token is left after each pending one
    scores: jax.Array  # [B, K, max_pending, C] float32: `score` after each pending one
    budget: int = struct.field(pytree_node=False)
    recent: int = struct.field(pytree_node=False)
    trees = False

    @classmethod
    def empty(cls, k: Codes, v: Codes, pending: int, budget: int, recent: int) -> Heavy:
        """Nothing kept, in codes for budget + pending tokens."""
        B, K, C = jax.tree.leaves(k)[0].shape[:3]
        place, score = jnp.full((B, K, C), PAST, jnp.int32), jnp.zeros((B, K, C), jnp.float32)
        alive, scores = (jnp.repeat(x[:, :, None], pending, 2) for x in (place < PAST, score))
        return cls(k, v, place, score, alive, scores, budget, recent)

    def letters(self) -> Heavy:
        """The letters of the arrays, congruent with them."""
        words = {"k": self.k.letters("BKW"), "v": self.v.letters("BKW"), "place": "BKW", "score": "BKW"}
        return self.replace(**words, alive="BK_W", scores="BK_W")  # type: ignore[attr-defined]

    @property
    def pending(self) -> int:
        """max_pending."""
        return self.alive.shape[2]

    @property
    def length(self) -> jax.Array:
        """[B]: committed tokens; the newest is always kept."""
        return jnp.where(self.place < PAST, self.place + 1, 0).max((1, 2))

    @property
    def spots(self) -> jax.Array:
        """[B, K, max_pending]: the slots of the pending tokens, which hold nothing that is committed."""
        return jnp.argsort(self.place < PAST, axis=-1, stable=True)[..., : self.pending]

    def places(self) -> jax.Array:
        """[B, K, C]: `place`, the pending tokens' slots included."""
        position = self.length[:, None, None] + jnp.arange(self.pending)
        return over(self.place, self.spots, jnp.broadcast_to(position, self.spots.shape))

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step) -> tuple[jax.Array, Heavy]:
        """See `LayerCache`."""
        if step.branches is not None:
            raise ValueError("a cache of kind h2o drops tokens one after the other, so it holds no draft tree: draft a "
                             "chain, or take another cache")  # fmt: skip
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        own = self.k.encode(k), self.v.encode(v)
        if k.shape[2] > self.pending:
            return self.read(q, *own, spec, step)
        first = step.begin - self.length  # of the pending tokens, this call's first
        order = first[:, None] + jnp.arange(k.shape[2])
        order = jnp.where(step.valid, order, self.pending)[:, None]  # [B, 1, T]
        spots = jnp.take_along_axis(self.spots, jnp.minimum(order, self.pending - 1), 2)
        spots = jnp.where(order < self.pending, spots, PAST)
        new_k, new_v = (
            jax.tree.map(lambda x, n: over(x, spots, n), *pair) for pair in zip((self.k, self.v), own, strict=True)
        )
        raw = scaled(q, new_k.decode(), spec)  # [B, K, T, G, C]
        alive, total, places = *self.before(first), self.places()

        def one(carry: tuple, at: tuple) -> tuple:
            alive, total = carry
            raw, spot, position, valid = at
            here = jnp.arange(places.shape[2]) == spot[..., None]
            live = alive | here
            weight = jax.nn.softmax(jnp.where(live[:, :, None], raw, ops.MASKED))
            summed = jnp.where(here, 0, total) + weight.sum(2)
            old = live & (places <= (position - self.recent)[:, None, None])
            least = old & (summed == jnp.where(old, summed, jnp.inf).min(-1, keepdims=True))
            oldest = jnp.where(least, places, PAST).min(-1, keepdims=True)  # of several, whatever slots they lie in
            full = live.sum(-1, keepdims=True) > self.budget
            left = live & ~(full & least & (places == oldest))
            valid = valid[:, None, None]
            carry = jnp.where(valid, left, alive), jnp.where(valid, summed, total)
            return carry, (weight, *carry)

        turns = (raw.transpose(2, 0, 1, 3, 4), spots.transpose(2, 0, 1), step.position.T, step.valid.T)
        _, (weight, alive, total) = jax.lax.scan(one, (alive, total), turns)
        out = mixed(weight.transpose(1, 2, 0, 3, 4), new_v.decode(), q)
        kept = [over(x, order, n.transpose(1, 2, 0, 3)) for x, n in ((self.alive, alive), (self.scores, total))]
        return out, self.replace(k=new_k, v=new_v, alive=kept[0], scores=kept[1]).placed()  # type: ignore

    def before(self, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Who is left, and with what score, before the pending token `first` [B]."""
        at = jnp.maximum(first - 1, 0)[:, None, None, None]
        begun = (first > 0)[:, None, None]
        alive, scores = (jnp.take_along_axis(x, at, 2)[:, :, 0] for x in (self.alive, self.scores))
        return jnp.where(begun, alive, self.place < PAST), jnp.where(begun, scores, self.score)

    def read(self, q: jax.Array, k: Codes, v: Codes, spec: LayerSpec, step: Step) -> tuple[jax.Array, Heavy]:
        """A long call: every query sees what was kept and this call's tokens up to itself; then the budget is kept."""
        B, T, N, _ = q.shape
        K, C = self.place.shape[1:]
        both = [jax.tree.map(lambda x, n: jnp.concatenate([x, n], 2), *pair) for pair in ((self.k, k), (self.v, v))]
        own = jnp.broadcast_to(jnp.where(step.valid, step.position, PAST)[:, None], (B, K, T))
        place = jnp.concatenate([self.place, own], 2)  # [B, K, C + T]
        keys, values = (x.decode() for x in both)
        size = min(QUERIES, T)

        def some(index: jax.Array, carry: tuple) -> tuple:
            out, total = carry
            begin = jnp.minimum(index * size, T - size)
            part = [jax.lax.dynamic_slice_in_dim(x, begin, size, 1) for x in (q, step.position, step.valid)]
            raw = scaled(part[0], keys, spec)  # [B, K, size, G, C + T]
            seen = place[:, :, None] <= part[1][:, None, :, None]
            weight = jax.nn.softmax(jnp.where(seen[:, :, :, None], raw, ops.MASKED))
            fresh = part[2] & (begin + jnp.arange(size) >= index * size)  # the last part may reach back
            total = total + (weight.sum(3) * fresh[:, None, :, None]).sum(2)
            return jax.lax.dynamic_update_slice_in_dim(out, mixed(weight, values, part[0]), begin, 1), total

        start = jnp.pad(self.score, ((0, 0), (0, 0), (0, T)))
        out, total = jax.lax.fori_loop(0, -(-T // size), some, (jnp.zeros_like(q), start))
        newest = (step.end - 1)[:, None, None]
        rank = jnp.where(place > newest - self.recent, jnp.inf, total)
        rank = jnp.where(place < PAST, rank, -jnp.inf)
        kept = min(self.budget, C + T)
        _, best = jax.lax.top_k(rank, kept)
        busy = (step.num > 0)[:, None, None]

        def chosen(x: jax.Array, old: jax.Array, empty: float) -> jax.Array:
            new = jnp.take_along_axis(x, best.reshape(*best.shape, *[1] * (x.ndim - 3)), 2)
            room = [(0, 0), (0, 0), (0, C - kept), *[(0, 0)] * (x.ndim - 3)]
            new = jnp.pad(new, room, constant_values=empty)
            return jnp.where(busy.reshape(*busy.shape, *[1] * (x.ndim - 3)), new, old)

        k, v = (
            jax.tree.map(lambda x, old: chosen(x, old, 0), *pair) for pair in zip(both, (self.k, self.v), strict=True)
        )
        place, score = chosen(place, self.place, PAST), chosen(total, self.score, 0)
        score = jnp.where(place < PAST, score, 0)
        alive, scores = (jnp.repeat(x[:, :, None], self.pending, 2) for x in (place < PAST, score))
        return out, Heavy(k, v, place, score, alive, scores, self.budget, self.recent).placed()

    def commit(self, length: jax.Array, num: jax.Array) -> Heavy:
        """See `LayerCache`."""
        at = jnp.clip(num - 1, 0, self.pending - 1)[:, None, None, None]
        alive, scores = (jnp.take_along_axis(x, at, 2)[:, :, 0] for x in (self.alive, self.scores))
        some = (num > 0)[:, None, None]
        place = jnp.where(some, jnp.where(alive, self.places(), PAST), self.place)
        score = jnp.where(some, jnp.where(alive, scores, 0), self.score)
        return self.replace(place=place, score=score).placed()  # type: ignore[attr-defined]

    def rewind(self, length: jax.Array) -> Heavy:
        """See `LayerCache`. What was driven out does not come back."""
        place = jnp.where(self.place < length[:, None, None], self.place, PAST)
        return self.replace(place=place)  # type: ignore[attr-defined]

    def move(self, source: jax.Array, target: jax.Array, pages: Pages | None) -> Heavy:
        """There are no trees here, whose paths would be moved."""
        raise ValueError("a cache of kind h2o holds no draft tree")

    def placed(self) -> Heavy:
        """Itself, lying as its letters say on a mesh."""
        return mesh.constrain_tree(self, self.letters())


def over(x: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
    """x [B, K, S, ...] with new [B, K, n, ...] at slot [B, K or 1, n]; past S nothing is written."""
    slot = jnp.broadcast_to(slot, (*x.shape[:2], slot.shape[2]))
    return jax.vmap(jax.vmap(lambda row, p, n: row.at[p].set(n, mode="drop")))(x, slot, new)


def scaled(q: jax.Array, k: jax.Array, spec: LayerSpec) -> jax.Array:
    """Scores [B, K, T, G, C] float32 of q [B, T, N, H] and k [B, K, C, H], scaled and capped."""
    B, T, N, H = q.shape
    rows = q.reshape(B, T, k.shape[1], -1, H).transpose(0, 2, 1, 3, 4).astype(k.dtype)
    score = ops.dot(rows.reshape(B, k.shape[1], -1, H), k, "BKXH,BKSH->BKXS") * spec.scale
    if spec.softcap is not None:
        score = spec.softcap * jnp.tanh(score / spec.softcap)
    return score.reshape(*rows.shape[:-1], k.shape[2])


def mixed(weight: jax.Array, v: jax.Array, q: jax.Array) -> jax.Array:
    """What weights [B, K, T, G, C] make of v [B, K, C, H], as q [B, T, N, H] lies."""
    B, K, T, G, C = weight.shape
    out = ops.dot(weight.astype(v.dtype).reshape(B, K, T * G, C), v, "BKXS,BKSH->BKXH")
    return out.reshape(B, K, T, G, -1).transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)
