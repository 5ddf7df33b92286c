"""Attention over keys and values that lie as [B, K, S, H]: with [B, S, K, H] XLA copies both at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import kernels, mesh
from jaxinfer.config import LayerSpec
from jaxinfer.ops.linear import dot
from jaxinfer.quantization import Codes, Plain

# Of a draft tree: (base [B], sees [T, M] bool, depth [M]): slot base + i, at position base + depth[i], is seen by a
# query t where sees[t, i]; slots before base are at the position of their index, and seen by all.
Branches = tuple[jax.Array, jax.Array, jax.Array]
DECODED = 256  # tokens of a block of codes: what they say is held beside them
MASKED = -1e30  # finite: a query that sees nothing (a pad) gives numbers, not NaN
PAST = kernels.PAST


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    spec: LayerSpec,
    branches: Branches | None = None,
    slot: jax.Array | None = None,
    sinks: int = 0,
) -> jax.Array:
    """Reference attention: plain and exact, the truth every kernel is compared with.

    q [B, T, N, H] at `position` [B, T] sees the slots s <= position of k and v [B, K, S, H] (inside the window, where
    the spec has one, or among the first `sinks`; those of its own branch, where they are a tree). slot [B, S] says
    which s each of them is, PAST for none; by default its index. Scores and their softmax are float32. Gives
    [B, T, N, H] in the dtype of q.
    """
    slot = jnp.arange(k.shape[2]) if slot is None else slot
    rows = queries(q, k.dtype, k.shape[1])  # [B, K, GT, H]
    score = scores(rows, k, visible(position, slot, spec, branches, sinks), spec)  # [B, K, GT, S]
    weight = jax.nn.softmax(score).astype(v.dtype)
    return answers(dot(weight, v, "BKXS,BKSH->BKXH"), q)


# --- block by block ------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Keys and values that are read block by block: a pytree, of which each device of a mesh has its part."""

    def letters(self) -> Any:
        """The letters of its arrays, congruent with them."""
        ...

    @property
    def kept(self) -> kernels.Kept | None:
        """The same, where it lies in arrays of a token a slot, or in pages of such."""
        ...

    def blocks(self, past: jax.Array) -> jax.Array:
        """How many blocks hold the slots before `past` []."""
        ...

    def block(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(k, v [B, K, s, H], slot [B, s] or [s]): which slots they are; PAST where they are none, or were given."""
        ...


class Look(NamedTuple):
    """What queries [B, T, N, H] see of a source: its slots from `since` [B, T] on, before `until` [B, T]."""

    q: jax.Array
    source: Source
    since: jax.Array | None = None
    until: jax.Array | None = None


@struct.dataclass
class Held:
    """Keys and values in slots, in whatever form; the last block may reach back into the one before."""

    k: Codes  # [B, K, U] units of one or several tokens
    v: Codes  # [B, K, U]
    slot: jax.Array | None = None  # [B, U] see `attend`; of a unit of several tokens, its number
    size: int = struct.field(pytree_node=False, default=512)  # tokens of a block

    def letters(self) -> Any:
        """See `Source`."""
        word = "BKS" if self.slot is None else "BKW"
        slot = None if self.slot is None else "BW"
        return self.replace(k=self.k.letters(word), v=self.v.letters(word), slot=slot)  # type: ignore[attr-defined]

    @property
    def kept(self) -> kernels.Kept | None:
        """See `Source`."""
        return kept_of(self.k, self.v, slot=self.slot)

    @property
    def shape(self) -> tuple[int, int]:
        """(U, units of a block)."""
        units = jax.tree.leaves(self.k)[0].shape[2]
        whole = self.kept is not None and self.kept.scales is None
        size = self.size if whole else min(self.size, DECODED)
        return units, min(units, max(size // self.k.tokens, 1))

    def blocks(self, past: jax.Array) -> jax.Array:
        """See `Source`. All of them where the slots are in no order."""
        (units, block), tokens = self.shape, self.k.tokens
        if self.slot is not None:
            return jnp.where(past > 0, -(-units // block), 0)
        return -(-jnp.clip(-(-past // tokens) - mesh.start("S", units), 0, units) // block)

    def block(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `Source`."""
        units, block = self.shape
        begin = jnp.minimum(index * block, units - block)

        def part(x: jax.Array, axis: int = 2) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, block, axis)

        own = begin + jnp.arange(block)
        slot = mesh.start("S", units) + own if self.slot is None else part(self.slot, 1)
        slot = jnp.where(own >= index * block, slot, PAST)
        k, v = (unfold(jax.tree.map(part, x)) for x in (self.k, self.v))
        return k, v, spread(slot, self.k.tokens)


def kept_of(k: Codes, v: Codes, slot: jax.Array | None = None, table: jax.Array | None = None) -> kernels.Kept | None:
    """Keys and values in some form as a kernel is given them; None where their form is for none."""
    if k.flat is None or v.flat is None:
        return None
    (keys, k_scale), (values, v_scale) = k.flat, v.flat
    scales = None if k_scale is None or v_scale is None else (k_scale, v_scale)
    return kernels.Kept(keys, values, scales, slot, table)


def unfold(codes: Codes) -> jax.Array:
    """What codes [B, K, U] of units say, token by token: [B, K, s, H]."""
    x = codes.decode()
    return x if codes.tokens == 1 else x.reshape(*x.shape[:2], -1, x.shape[-1])


def spread(unit: jax.Array, tokens: int) -> jax.Array:
    """The slots [..., U tokens] of the tokens in units [..., U]; none stays none."""
    slot = unit[..., None] * tokens + jnp.arange(tokens)
    return jnp.where((unit < PAST)[..., None], slot, PAST).reshape(*unit.shape[:-1], -1)


def attend_blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    spec: LayerSpec,
    block: int = 512,
    branches: Branches | None = None,
    slot: jax.Array | None = None,
    sinks: int = 0,
) -> jax.Array:
    """`attend` with an online softmax over blocks of slots (Milakov and Gimelshein 2018, Rabe and Staats 2021).

    Scores of one block at a time are held, and the loop ends at the last slot that a query sees, so that a long prompt
    needs memory for [B, N, T, block] and not [B, N, T, S].
    """
    return attend_looks([Look(q, Held(Plain(k), Plain(v), slot, block))], position, spec, branches, sinks)


def attend_looks(
    looks: Sequence[Look], position: jax.Array, spec: LayerSpec, branches: Branches | None = None, sinks: int = 0
) -> jax.Array:
    """`attend` over several sources at once, in one softmax, block by block: [B, T, N, H] in the dtype of q.

    Of sources whose letters have no S every device of `seq` has all; they are looked at once.
    """

    def local(looks: Sequence[Look], position: jax.Array, branches: Branches | None) -> jax.Array:
        seen = Seen.nothing(looks[0].q, looks[0].source)
        for look, whole in zip(looks, whole_by_look, strict=True):
            seen = see(seen, look, whole, position, spec, branches, sinks)
        return seen.answer(looks[0].q)

    whole_by_look = ["S" not in "".join(jax.tree.leaves(look.source.letters())) for look in looks]
    words = [
        Look("BTNH", look.source.letters(), *(None if x is None else "BT" for x in look[2:]))  # type: ignore[arg-type]
        for look in looks
    ]
    tree = None if branches is None else ("B", "__", "_")
    return mesh.shard_map(local, (words, "BT", tree), "BTNH")(list(looks), position, branches)


class Seen(NamedTuple):
    """What an online softmax has come to: the largest score, the sum of weights and of weighted values so far."""

    best: jax.Array  # [B, K, GT]
    total: jax.Array  # [B, K, GT]
    out: jax.Array  # [B, K, GT, H]

    @classmethod
    def nothing(cls, q: jax.Array, source: Source) -> Seen:
        """Before the first block."""
        k = jax.eval_shape(lambda: source.block(jnp.int32(0))[0])
        shape = jax.eval_shape(lambda: queries(q, k.dtype, k.shape[1])).shape
        empty = jnp.zeros(shape[:-1], jnp.float32)
        return cls(empty + MASKED, empty, jnp.zeros(shape, jnp.float32))

    def more(self, score: jax.Array, v: jax.Array) -> Seen:
        """With a block of scores [B, K, GT, s] and values [B, K, s, H]."""
        peak = jnp.maximum(self.best, score.max(-1))
        fade = jnp.exp(self.best - peak)
        weight = jnp.exp(score - peak[..., None])
        new = dot(weight.astype(v.dtype), v, "BKXS,BKSH->BKXH")
        return Seen(peak, self.total * fade + weight.sum(-1), self.out * fade[..., None] + new)

    def answer(self, q: jax.Array) -> jax.Array:
        """[B, T, N, H], the parts of S merged."""
        total, out = self.total, self.out
        if mesh.parts("S") > 1:
            fade = jnp.exp(self.best - mesh.largest(self.best, "S"))
            total, out = mesh.total((total * fade, out * fade[..., None]), "S")
        return answers(out / jnp.maximum(total, 1e-30)[..., None], q)


def see(
    seen: Seen,
    look: Look,
    whole: bool,
    position: jax.Array,
    spec: LayerSpec,
    branches: Branches | None,
    sinks: int,
) -> Seen:
    """All blocks of one source, on one device; of one that every device has whole, on the first of `seq` alone."""
    q, source, since, until = look
    last = position if branches is None else branches[0][:, None] + len(branches[2]) - 1  # of the slots it may see
    past = jnp.max(jnp.where(position < PAST, last + 1, 0), initial=0)
    if until is not None:
        past = jnp.minimum(past, jnp.max(jnp.where(position < PAST, until, 0), initial=0))
    if whole and mesh.parts("S") > 1:
        past = jnp.where(mesh.start("S", 1) == 0, past, 0)

    def body(index: jax.Array, seen: Seen) -> Seen:
        k, v, slot = source.block(index)
        shown = visible(position, slot, spec, branches, sinks)
        if since is not None:
            shown &= as_rows(slot) >= since[:, :, None]
        if until is not None:
            shown &= as_rows(slot) < until[:, :, None]
        return seen.more(scores(queries(q, k.dtype, k.shape[1]), k, shown, spec), v)

    return jax.lax.fori_loop(0, source.blocks(past), body, seen)


# --- by a kernel ---------------------------------------------------------------------------------------------------


def kernel_for(q: jax.Array, source: Source) -> str | None:
    """The one that `kernels.choice()` takes for queries [B, T, N, H] and a source, if any; none for a split S."""
    kept = source.kept
    split = mesh.size_of("S") > 1 and "S" in "".join(jax.tree.leaves(source.letters()))
    return None if kept is None or split else kernels.choice().attends(q, kept)


def attend_kernel(
    plain: Callable[..., jax.Array], kernel: str, q: jax.Array, source: Source, position: jax.Array, spec: LayerSpec
) -> jax.Array:
    """`attend` by the `kernel_for` a source: each device looks with its heads of q [B, T, N, H] at its part.

    plain(q, position, source): what a platform without the kernel does.
    """
    rule = kernels.Rule(spec.scale, spec.softcap, spec.window)

    def local(q: jax.Array, position: jax.Array, source: Source) -> jax.Array:
        return kernels.attended(plain, kernel, rule, q, position, source)

    return mesh.shard_map(local, ("BTNH", "BT", source.letters()), "BTNH")(q, position, source)


# --- what both are made of -----------------------------------------------------------------------------------------


def visible(
    position: jax.Array, slot: jax.Array, spec: LayerSpec, branches: Branches | None = None, sinks: int = 0
) -> jax.Array:
    """Which slots [S] or [B, S] a query at each position [B, T] sees: [B, T, S]."""
    slot = as_rows(slot)  # [B or 1, 1, S]
    if branches is None:
        seen, place = slot <= position[:, :, None], slot
    else:
        base, sees, depth = branches
        base = base[:, None, None]
        own = slot - base  # [B, 1, S]
        pending, own = (own >= 0) & (own < len(depth)), jnp.clip(own, 0, len(depth) - 1)
        branch = sees[:, own[:, 0]].transpose(1, 0, 2)  # [B, T, S]
        seen = jnp.where(pending, branch, slot < base)
        place = jnp.where(pending, base + depth[own], slot)
    if spec.window is None:
        return seen
    near = place > position[:, :, None] - spec.window
    return seen & (near | (place < sinks) if sinks else near)


def as_rows(slot: jax.Array) -> jax.Array:
    """slot [S] or [B, S] as [1 or B, 1, S], to be compared with what queries [B, T, 1] have."""
    return slot[:, None] if slot.ndim == 2 else slot[None, None]


def queries(q: jax.Array, dtype: jnp.dtype, K: int) -> jax.Array:
    """q [B, T, N, H] as the rows that meet each of K kv heads: [B, K, GT, H], in a dtype, at least two of them."""
    B, T, N, H = q.shape
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H).astype(dtype)
    return jnp.concatenate([rows, rows], 2) if rows.shape[2] == 1 else rows


def scores(rows: jax.Array, k: jax.Array, seen: jax.Array, spec: LayerSpec) -> jax.Array:
    """Scaled, capped and masked scores [B, K, GT, S] in float32."""
    score = dot(rows, k, "BKXH,BKSH->BKXS") * spec.scale
    if spec.softcap is not None:
        score = spec.softcap * jnp.tanh(score / spec.softcap)
    B, K, X, S = score.shape
    T = seen.shape[1]
    seen = jnp.broadcast_to(seen[:, None, None], (B, K, X // T, T, S)).reshape(B, K, X, S)
    return jnp.where(seen, score, MASKED)


def answers(out: jax.Array, q: jax.Array) -> jax.Array:
    """[B, K, GT, H] back as q lies: [B, T, N, H]."""
    B, T, N, H = q.shape
    K = out.shape[1]
    out = out[:, :, : N // K * T].astype(q.dtype)
    return out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
