"""Attention over keys and values that lie as [B, K, S, H]: with [B, S, K, H] XLA copies both at every step."""

import functools

import jax
import jax.numpy as jnp

from jaxinfer import mesh
from jaxinfer.config import LayerSpec
from jaxinfer.ops.linear import dot

# Of a draft tree: (base [B], sees [T, M] bool, depth [M]): slot base + i, at position base + depth[i], is seen by a
# query t where sees[t, i]; slots before base are at the position of their index, and seen by all.
Branches = tuple[jax.Array, jax.Array, jax.Array]
MASKED = -1e30  # finite: a query that sees nothing (a pad) gives numbers, not NaN


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    spec: LayerSpec,
    branches: Branches | None = None,
) -> jax.Array:
    """Reference attention: plain and exact, the truth every kernel is compared with.

    q [B, T, N, H] at `position` [B, T] sees the slots s <= position of k and v [B, K, S, H] (inside the window, where
    the spec has one; those of its own branch, where they are a tree). Scores and their softmax are float32. Gives
    [B, T, N, H] in the dtype of q.
    """
    slot = jnp.arange(k.shape[2])
    rows = queries(q, k)  # [B, K, GT, H]
    score = scores(rows, k, visible(position, slot, spec, branches), spec)  # [B, K, GT, S]
    weight = jax.nn.softmax(score).astype(v.dtype)
    return answers(dot(weight, v, "BKXS,BKSH->BKXH"), q)


def attend_blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    spec: LayerSpec,
    block: int = 512,
    branches: Branches | None = None,
) -> jax.Array:
    """`attend` with an online softmax over blocks of slots (Milakov and Gimelshein 2018, Rabe and Staats 2021).

    Scores of one block at a time are held, and the loop ends at the last slot that a query with position < S sees, so
    that a long prompt needs memory for [B, N, T, block] and not [B, N, T, S].
    """
    local = functools.partial(attend_part, spec=spec, block=block)
    words = ("BTNH", "BKSH", "BKSH", "BT", None if branches is None else ("B", "__", "_"))
    return mesh.shard_map(local, words, "BTNH")(q, k, v, position, branches)


def attend_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    branches: Branches | None,
    spec: LayerSpec,
    block: int,
) -> jax.Array:
    """`attend_blockwise` of one device's rows, heads and slots; the parts of S are merged by their own softmax."""
    size = k.shape[2]
    block, begin = min(block, size), mesh.start("S", size)
    rows = queries(q, k)
    last = position if branches is None else branches[0][:, None] + len(branches[2]) - 1  # of the slots it may see
    ends = jnp.where(position < size * mesh.parts("S"), last + 1 - begin, 0)
    past = jnp.clip(jnp.max(ends), 0, size)

    def body(index, carry):
        best, total, out = carry
        # the last block may reach back into the one before: its slots that were seen already are masked
        start = jnp.minimum(index * block, size - block)
        slot = start + jnp.arange(block)
        seen = visible(position, begin + slot, spec, branches) & (slot >= index * block)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block, axis=2)
        score = scores(rows, take(k), seen, spec)
        peak = jnp.maximum(best, score.max(-1))
        fade = jnp.exp(best - peak)
        weight = jnp.exp(score - peak[..., None])
        part = dot(weight.astype(v.dtype), take(v), "BKXS,BKSH->BKXH")
        return peak, total * fade + weight.sum(-1), out * fade[..., None] + part

    shape = rows.shape[:-1]
    start = (jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(rows.shape, jnp.float32))
    best, total, out = jax.lax.fori_loop(0, -(-past // block), body, start)
    if mesh.parts("S") > 1:
        fade = jnp.exp(best - mesh.largest(best, "S"))
        total, out = mesh.total((total * fade, out * fade[..., None]), "S")
    return answers(out / jnp.maximum(total, 1e-30)[..., None], q)


def visible(position: jax.Array, slot: jax.Array, spec: LayerSpec, branches: Branches | None = None) -> jax.Array:
    """Which slots [S] a query at each position [B, T] sees: [B, T, S]."""
    if branches is None:
        seen, place = slot <= position[:, :, None], slot
    else:
        base, sees, depth = branches
        own = slot - base[:, None]  # [B, S]
        pending, own = (own >= 0) & (own < len(depth)), jnp.clip(own, 0, len(depth) - 1)
        branch = sees[:, own].transpose(1, 0, 2)  # [B, T, S]
        seen = jnp.where(pending[:, None], branch, (slot < base[:, None])[:, None])
        place = jnp.where(pending, base[:, None] + depth[own], slot)[:, None]
    return seen if spec.window is None else seen & (place > position[:, :, None] - spec.window)


def queries(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, T, N, H] as the rows that meet each kv head: [B, K, GT, H], in the dtype of k, at least two of them."""
    B, T, N, H = q.shape
    K = k.shape[1]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H).astype(k.dtype)
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
