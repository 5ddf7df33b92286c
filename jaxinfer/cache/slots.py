"""Slots of rows: what is written where, in arrays [B, K, S, ...] of any form of numbers."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import mesh, ops
from jaxinfer.cache.base import LayerCache, Step
from jaxinfer.cache.pages import Pages
from jaxinfer.config import LayerSpec
from jaxinfer.ops import Held, Look, Source
from jaxinfer.quantization import Codes

SCORES = 1 << 24  # scores of one layer (B N T S) above which they are made block by block: 64 MB in float32


class Slots(LayerCache):
    """A memory with a slot for each token, or for each unit of several that are coded together."""

    k: Codes  # of units
    v: Codes
    spare: int | None = None  # tokens of a call that are written before they are looked at; None: any number

    @abc.abstractmethod
    def write(self, k: Codes, v: Codes, slot: jax.Array, end: jax.Array, pages: Pages | None) -> Slots:
        """With codes [B, K, n] in the slots [B, n] of units, of which those before `end` [B] will be the newest."""

    @abc.abstractmethod
    def source(self, end: jax.Array, pages: Pages | None) -> Source:
        """What is held when all units before `end` [B] have been written."""

    def narrowed(self, spec: LayerSpec) -> LayerSpec:
        """The layer, as far as this memory lets it look back."""
        return spec

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, spec: LayerSpec, step: Step) -> tuple[jax.Array, Slots]:
        """Writes k, v and lets q look back; where there is no room for all of them, looks at both side by side."""
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        own = self.k.encode(k), self.v.encode(v)
        new = self.write(*own, step.slot, step.end, step.pages)
        if self.spare is None or k.shape[2] <= self.spare:
            sources = [new.source(step.end, step.pages)]
        else:
            sources = [self.source(step.begin, step.pages), Held(*own, step.slot)]
        return look(q, sources, self.narrowed(spec), step), new


def look(q: jax.Array, sources: list[Source], spec: LayerSpec, step: Step) -> jax.Array:
    """Attention of q [B, T, N, H] over one source or several: by a kernel, plainly where small, or block by block."""
    branches = branches_of(step)

    def plainly(q: jax.Array, position: jax.Array, *sources: Source) -> jax.Array:
        kept = sources[0].kept if len(sources) == 1 else None
        if kept is not None and kept.scales is None and kept.table is None:
            (B, T, N, _), (k, v) = q.shape, kept.numbers
            if T == 1 or B * N * T * k.shape[2] <= SCORES:
                return ops.attend(q, k, v, position, spec, branches, kept.slot)
        return ops.attend_looks([Look(q, source) for source in sources], position, spec, branches)

    kernel = ops.kernel_for(q, sources[0]) if len(sources) == 1 and branches is None else None
    if kernel is not None:
        return ops.attend_kernel(plainly, kernel, q, sources[0], step.position, spec)
    return plainly(q, step.position, *sources)


def branches_of(step: Step) -> Any:
    """The tree of a step, as attention knows it."""
    return step.branches and (step.branches.base, step.branches.sees, step.branches.depth)


def write(cache: Any, new: Any, slot: jax.Array, letters: Any) -> Any:
    """A tree of arrays [B, K, S, ...] with new ones [B, K, n, ...] in the slots [B, n]; what lies past S is dropped.

    A vmapped scatter is the form that stays in place when donated and local when B, K or S are sharded.
    """

    def one(x: jax.Array, new: jax.Array, word: str) -> jax.Array:
        at, new = slot, mesh.constrain(new.astype(x.dtype), f"BK_{word[3:]}")
        if slot.size == 1:  # written as two, one dropped: XLA:CPU makes a slice of a lone one, and copies for it
            new = jnp.concatenate([new, new], 2)
            at = jnp.concatenate([slot, jnp.full_like(slot, x.shape[2])], 1)
        written = jax.vmap(lambda row, n, p: row.at[:, p].set(n, mode="drop"))(x, new, at)
        return mesh.constrain(written, word)

    return jax.tree.map(one, cache, new, letters)


def copy(cache: Any, source: jax.Array, target: jax.Array, letters: Any) -> Any:
    """A tree of arrays with what lies at source [B, n] also at target [B, n]; past S nothing is read or written."""

    def one(x: jax.Array, word: str) -> jax.Array:
        kept = jax.vmap(lambda row, p: row.at[:, p].get(mode="fill", fill_value=0))(x, source)
        kept = mesh.constrain(kept, f"BK_{word[3:]}")
        return mesh.constrain(jax.vmap(lambda row, n, p: row.at[:, p].set(n, mode="drop"))(x, kept, target), word)

    return jax.tree.map(one, cache, letters)
