"""Attention on NVIDIA GPUs: flash decoding (Dao et al. 2023) over slots or pages, one Triton kernel through Pallas.

A program holds the queries of one kv head, as many tokens as fill its tile, and reads its share of the slots that they
see: from the first of their windows to the last that any of them sees, whatever is allocated. The shares of a row are
brought together in a second, small step. Slots and pages differ in where a slot lies, and in nothing else; neither is
gathered or copied. Scores, softmax and sums are float32. Codes meet the queries as the numbers that they are; their
scales meet the scores and the weights.

A row has the same bits alone and among any others: how many shares it is cut into rests on its own size alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.gpu.tiles import load, power, product, split, store
from jaxinfer.kernels.kept import PAST, Kept, Rule

NOTHING = -1e30  # the score of what is not seen: finite, so that differences are numbers
TILE = 64  # queries of a program, unless those of one token are more
SHARE = 256  # slots that are worth a program of their own
PROGRAMS = 256  # that a row is cut into at most: two for each processor of a large GPU
BLOCK = 1 << 14  # bytes of keys that are read at once: with values, two or three stages fit a small GPU's 99 KB
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Plan(NamedTuple):
    """How the work is cut, known before it runs."""

    shape: tuple[int, int, int, int, int, int]  # B, T, N, K, S, H
    pages: tuple[int, int, int, int] | None  # D, P, Z, M of a pool
    rows: int  # queries of a tile, filled up to a power of two
    width: int  # H, likewise
    block: int  # slots that are read at once
    shares: int  # into which the slots of a row are cut

    @classmethod
    def of(cls, q: jax.Array, kept: Kept) -> Plan:
        """For queries [B, T, N, H] and what is kept."""
        (B, T, N, H), K, S = q.shape, kept.k.shape[-3], kept.slots
        pages, group = None, N // K
        if kept.table is not None:
            D, P, _, Z, _ = kept.k.shape
            pages = D, P, Z, kept.table.shape[1]
        rows = max(power(group), min(TILE, power(group * T)))
        width = power(H)
        block = min(max(BLOCK // (width * meeting(q, kept).itemsize), 16), 128)
        plan = cls((B, T, N, K, S, H), pages, rows, width, block, shares=1)
        return plan._replace(shares=min(-(-S // SHARE), max(PROGRAMS // (K * plan.tiles), 1)))

    @property
    def tokens(self) -> int:
        """Of a tile."""
        _, _, N, K, _, _ = self.shape
        return self.rows // (N // K)

    @property
    def columns(self) -> int:
        """Of a vector, that one program merges: what its shares have there fits the registers."""
        return min(self.width, 4096 // power(self.shares))

    @property
    def tiles(self) -> int:
        """Of a row and kv head."""
        return -(-self.shape[1] // self.tokens)

    @property
    def programs(self) -> int:
        """Shares of tiles of kv heads of rows."""
        B, _, _, K, _, _ = self.shape
        return B * K * self.tiles * self.shares


def meeting(q: jax.Array, kept: Kept) -> jnp.dtype:
    """The dtype in which queries meet keys."""
    return jnp.promote_types(q.dtype, kept.dtype) if kept.scales is None else q.dtype


def unknown(q: jax.Array, kept: Kept) -> str | None:
    """Why the kernel cannot look at such arrays, or None if it can."""
    known = DTYPES if kept.scales is None else (jnp.int8,)
    if kept.k.dtype != kept.v.dtype or kept.dtype not in known:
        return f"it reads no caches of {kept.dtype}"
    if q.dtype not in DTYPES:
        return f"it takes no queries of {q.dtype}"
    # Pallas counts bytes of up to 2**32 with 32 bits, of which Triton takes one as the sign: so more codes than 2**31.
    if kept.scales is not None and 1 << 31 < kept.k.size <= 1 << 32:
        return "it cannot count to the end of codes of 2 to 4 GiB"
    return None


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))  # traced once for all layers
def attend(q: jax.Array, position: jax.Array, kept: Kept, rule: Rule, interpret: bool = False) -> jax.Array:
    """q [B, T, N, H] at `position` [B, T] int32, over what is kept: [B, T, N, H] in the dtype of q. The bare kernel.

    A query that sees nothing (a pad, at a position past all slots) gives zeros. interpret: by XLA's own operations, on
    any platform, for tests.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    plan = Plan.of(q, kept)
    B, T, N, _, _, H = plan.shape
    whole, lines = plan.shares == 1, B * T * N
    # As vectors in a line, which costs nothing: a place is one number, and tiles need no padding.
    k, v = (x.reshape(-1, H) for x in kept.numbers)
    flat = Kept(k, v, *jax.tree.map(jnp.ravel, kept[2:]))
    call = functools.partial(pallas.pallas_call, interpret=interpret, name="attention")
    out, size = call(
        functools.partial(look, plan, rule, meeting(q, kept)),
        out_shape=(
            jax.ShapeDtypeStruct((plan.shares, lines, H), q.dtype if whole else jnp.float32),
            jax.ShapeDtypeStruct((plan.shares, lines), jnp.float32),
        ),
        grid=(plan.programs,),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2 if plan.rows > 16 else 3),
    )(q.reshape(-1, H), position.reshape(-1), flat)
    if not whole:
        out = call(
            functools.partial(merge, plan),
            out_shape=jax.ShapeDtypeStruct((1, lines, H), q.dtype),
            grid=(lines, plan.width // plan.columns),
            compiler_params=triton.CompilerParams(num_warps=4),
        )(out, size)
    return out.reshape(q.shape)


# --- a program -----------------------------------------------------------------------------------------------------


def look(plan: Plan, rule: Rule, dtype: jnp.dtype, q: Any, position: Any, kept: Any, out: Any, size: Any) -> None:
    """A tile of queries over a share of the slots that they see; all arrays as references."""
    from jax.experimental import pallas

    _, T, N, K, S, _ = plan.shape
    rest, share = split(pallas.program_id(0), plan.shares)
    rest, tile = split(rest, plan.tiles)
    row, head = split(rest, K)
    group, lane = N // K, jnp.arange(plan.rows)
    token, member = split(lane, group)
    token += tile * plan.tokens
    filled = (lane < plan.tokens * group) & (token < T)
    mine = (row * T + token) * N + head * group + member
    queries = vectors(q, mine, filled, plan.width).astype(dtype)
    until = load(position, (row * T + token,), filled, -1)  # the last slot that each sees; -1: none
    until = jnp.where(until < PAST, until, -1)
    since = until - (rule.window or PAST) + 1  # and the first
    last, first = jnp.max(until), jnp.min(jnp.where(until >= 0, since, PAST))
    weigh = jnp.bfloat16 if kept.scales is not None and dtype == jnp.float16 else dtype  # of a scale, whatever its size

    def seen(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """With one more block."""
        best, total, answer = state
        index = index * plan.block + jnp.arange(plan.block)
        slot = jnp.where(index < S, index, PAST)
        if kept.slot is not None:
            slot = load(kept.slot, (row * S + index,), index < S, PAST)
        read = (slot <= last) & ((slot >= first) | (slot < rule.sinks))
        shown = (slot <= until[:, None]) & ((slot >= since[:, None]) | (slot < rule.sinks))
        place = placed(plan, kept.table, row, head, index, read)
        k, v = (vectors(x, place, read, plan.width) for x in (kept.k, kept.v))
        score = product(queries, k.astype(dtype), 1) * rule.scale
        if kept.scales is not None:
            score *= load(kept.scales[0], (place,), read)
        if rule.softcap is not None:
            score = rule.softcap * jnp.tanh(score / rule.softcap)
        score = jnp.where(shown, score, NOTHING)
        peak = jnp.maximum(best, score.max(1))
        fade = jnp.exp(best - peak)
        weight = jnp.where(shown, jnp.exp(score - peak[:, None]), 0)
        total = total * fade + weight.sum(1)
        if kept.scales is not None:
            weight *= load(kept.scales[1], (place,), read)
        return peak, total, answer * fade[:, None] + product(weight.astype(weigh), v.astype(weigh), 0)

    blocks = pallas.cdiv(S, plan.block)
    begin, end = jnp.int32(0), jnp.minimum(last + 1, 1) * blocks  # of slots in no order all, where any are seen
    if kept.slot is None:
        begin = begin if rule.sinks else jnp.maximum(first, 0) // plan.block
        end = jnp.minimum(pallas.cdiv(last + 1, plan.block), blocks)
    each = pallas.cdiv(jnp.maximum(end - begin, 0), plan.shares)
    begin += share * each
    empty = jnp.zeros(plan.rows, jnp.float32)
    state = empty + NOTHING, empty, jnp.zeros((plan.rows, plan.width), jnp.float32)
    best, total, answer = jax.lax.fori_loop(begin, jnp.minimum(begin + each, end), seen, state)
    sound = jnp.where(total == 0, 1, total)
    where, there = cells(mine, filled, plan.width, out.shape[2])
    store(out, (share, *where), there, answer / sound[:, None])
    store(size, (share, mine), filled, jnp.where(total == 0, NOTHING, best + jnp.log(sound)))


def merge(plan: Plan, out: Any, size: Any, answer: Any) -> None:
    """What the shares of one query came to, each with the logarithm of its sum of weights, in one: some columns."""
    from jax.experimental import pallas

    line, piece = pallas.program_id(0), pallas.program_id(1)
    share = jnp.arange(power(plan.shares))
    there = share < plan.shares
    sizes = load(size, (share, line), there, NOTHING)
    weight = jnp.where(there, jnp.exp(sizes - jnp.max(sizes)), 0)
    column = piece * plan.columns + jnp.arange(plan.columns)
    parts = load(out, (share[:, None], line, column[None]), there[:, None] & (column < out.shape[2]))
    merged = (parts * weight[:, None]).sum(0) / weight.sum()
    store(answer, (0, line, column), column < out.shape[2], merged)


def placed(plan: Plan, table: Any, row: jax.Array, head: jax.Array, index: jax.Array, read: jax.Array) -> jax.Array:
    """Where the slots `index` [s] of a row's kv head lie, of those that are to be read."""
    B, _, _, K, S, _ = plan.shape
    if plan.pages is None:
        return (row * K + head) * S + index
    D, P, Z, M = plan.pages
    entry, offset = split(index, Z)
    page = jnp.minimum(load(table, (row * M + entry,), read), P - 1)  # none is any: what the row lacks is lost
    return ((split(row, B // D)[0] * P + page) * K + head) * Z + offset


def vectors(ref: Any, at: jax.Array, mask: jax.Array, width: int) -> jax.Array:
    """Vectors of a line, [s, width]; zeros where there is no mask, and past their own width."""
    where, there = cells(at, mask, width, ref.shape[1])
    return load(ref, where, there)


def cells(at: jax.Array, mask: jax.Array, width: int, H: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """The (line, column) of what vectors consist of, filled up to [s, width], and which of it there is."""
    column = jnp.arange(width)
    return (at[:, None], column[None]), mask[:, None] if width == H else mask[:, None] & (column < H)
