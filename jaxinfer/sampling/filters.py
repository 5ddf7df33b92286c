"""top-k, top-p and min-p as one threshold per row: a row keeps the logits that are not below it.

The thresholds come from the best 128 logits of a row, found without sorting the vocabulary, or, where k or the mass p
is not inside those, from a search over the float32 numbers themselves. Both are exact and agree.

What touches the whole vocabulary is a maximum, a count or a sum of integers. Over a sharded vocabulary each device does
its own part (the best of the devices' `best` are the best), and as integers are what is summed, the thresholds have the
same bits however the vocabulary is split and however many rows the batch has.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer import mesh

CANDIDATES = 128
LIMB_BITS, LIMBS = 13, 3  # 39 bits: rounding loses less than 2**-20 of the best id's mass over any vocabulary that fits
MAX_VOCAB = 2 ** (32 - LIMB_BITS) - 1  # so that the sum of a limb fits 32 bits


def threshold(z: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The lowest logit that each row keeps. z [B, V] float32; top_k (0 = off), top_p (1 = off), min_p (0 = off) [B].

    top-k: the k-th largest logit. top-p (Holtzman et al. 2020, section 3.1): the largest t such that the logits >= t
    hold at least p of the mass, mass being that of the logits which top-k keeps. min-p (Nguyen et al. 2024, section 3):
    the best logit + log(min_p). The result [B] float32 is the highest of these, so that a row keeps its best logit, and
    all that tie with the lowest it keeps. It is -inf where nothing is filtered, and undefined where a row holds NaN.
    """
    V = z.shape[-1] * mesh.parts("V")
    if V > MAX_VOCAB:
        raise ValueError(f"the vocabulary has {V} ids but top-p can sum {MAX_VOCAB}: lower LIMB_BITS in {__name__}")
    top_k = jnp.where(top_k < V, top_k, 0)
    top = mesh.largest(jnp.max(z, axis=-1), "V")
    nothing = jnp.full_like(top, -jnp.inf)

    def from_best() -> jax.Array:
        candidates = best(z)
        if mesh.parts("V") > 1:  # the best of the parts' best are the best
            candidates = lax.top_k(mesh.gather(candidates, "V"), min(CANDIDATES, V))[0]
        edge = lax.cond(jnp.any(top_k > 0), lambda: _kth(z, candidates, top_k), lambda: nothing)
        return lax.cond(jnp.any(top_p < 1), lambda: _nucleus(z, candidates, top, edge, top_p), lambda: edge)

    edge = lax.cond(jnp.any((top_k > 0) | (top_p < 1)), from_best, lambda: nothing)
    return jnp.maximum(edge, jnp.where(min_p > 0, top + jnp.log(min_p), -jnp.inf))


def best(z: jax.Array, num: int = CANDIDATES) -> jax.Array:
    """The num largest values of each row, exactly, in falling order (all V if V < num). z [B, V] -> [B, num]

    In two stages, because on GPU a top_k of more than 16 sorts its whole operand. The num chunks with the largest
    maxima hold the num largest values (a value elsewhere is beaten or tied by num maxima); only these are sorted.
    """
    B, V = z.shape
    chunk = 1
    while 2 * chunk**2 * num < V:  # both stages are then about sqrt(V * num) wide, and there are at least num chunks
        chunk *= 2
    if chunk == 1:
        return lax.top_k(z, min(num, V))[0]
    z = jnp.pad(z, ((0, 0), (0, -V % chunk)), constant_values=-jnp.inf)
    z = z.reshape(B, chunk, -1)  # a chunk is a column: a maximum over columns vectorizes
    _, which = lax.top_k(jnp.max(z, axis=1), num)
    return lax.top_k(jnp.take_along_axis(z, which[:, None, :], axis=2).reshape(B, -1), num)[0]


def _kth(z: jax.Array, candidates: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest logit of each row; -inf where k is 0."""
    C = candidates.shape[-1]
    edge = jnp.take_along_axis(candidates, jnp.clip(k - 1, 0, C - 1)[:, None], axis=-1)[:, 0]
    edge = jnp.where(k > 0, edge, -jnp.inf)

    def deeper() -> jax.Array:
        def enough(t: jax.Array) -> jax.Array:
            return mesh.total(jnp.sum(z >= t[:, None], axis=-1, dtype=jnp.int32), "V") >= k

        return _search(enough, jnp.where(k > C, -jnp.inf, edge), edge)

    return lax.cond(jnp.any(k > C), deeper, lambda: edge)


def _nucleus(z: jax.Array, candidates: jax.Array, top: jax.Array, edge: jax.Array, p: jax.Array) -> jax.Array:
    """The threshold of top-p among the logits >= edge [B]; edge itself where p is 1."""

    def weigh(x: jax.Array) -> list[jax.Array]:
        weight = jnp.where(x == top[:, None], 1.0, jnp.exp(x - top[:, None]))  # not inf - inf in a row of -inf
        return _limbs(jnp.where(x >= edge[:, None], weight, 0.0))

    target = p * _mass(_sums(weigh(z)))
    so_far = jnp.cumsum(jnp.stack(weigh(candidates)), axis=-1, dtype=jnp.int32)
    reached = _mass(list(so_far)) >= target[:, None]
    found = jnp.take_along_axis(candidates, jnp.argmax(reached, axis=-1)[:, None], axis=-1)[:, 0]
    missing = (p < 1) & ~reached[:, -1]
    found = jnp.where(p < 1, jnp.where(missing, candidates[:, -1], found), edge)

    def deeper() -> jax.Array:
        limbs = weigh(z)  # again, so that the usual case does not write them to memory for this one

        def enough(t: jax.Array) -> jax.Array:
            kept = z >= t[:, None]
            return _mass(_sums([jnp.where(kept, limb, 0) for limb in limbs])) >= target

        return _search(enough, jnp.where(missing, edge, found), found)

    return lax.cond(jnp.any(missing), deeper, lambda: found)


def _limbs(weights: jax.Array) -> list[jax.Array]:
    """Weights in [0, 1] as fixed-point numbers of LIMBS limbs.

    A sum of floats depends on its order, and the edge of a nucleus would with it depend on batch, devices and program.
    A sum of integers does not, and its error does not grow with V.
    """
    limbs = []
    for _ in range(LIMBS):
        weights = weights * 2.0**LIMB_BITS
        whole = jnp.floor(weights)
        limbs.append(whole.astype(jnp.int32))  # CPUs have no vector conversion to uint32; the sums wrap alike
        weights = weights - whole  # exact, as the product is
    return limbs


def _sums(limbs: list[jax.Array]) -> list[jax.Array]:
    """Each limb's sum over the whole vocabulary, in one collective."""
    sums = [jnp.sum(limb, axis=-1, dtype=jnp.int32) for limb in limbs]
    return list(mesh.total(jnp.stack(sums), "V")) if mesh.parts("V") > 1 else sums


def _mass(limbs: list[jax.Array]) -> jax.Array:
    """Summed limbs as float32. It never falls when ids are added, because no limb does: what a search needs."""
    mass = jnp.zeros(limbs[0].shape, jnp.float32)
    for i, limb in enumerate(limbs, start=1):
        mass = mass + lax.bitcast_convert_type(limb, jnp.uint32).astype(jnp.float32) * 2.0 ** (-LIMB_BITS * i)
    return mass


def _search(enough: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest float32 of each row in [low, high] that is enough: low is, and above one that is not, none is.

    Bisection over int32 numbers in the order of the floats: exact after at most 32 steps, at any scale of the logits.
    """

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, and without the overflow of low + high
        kept = enough(_float(middle))
        return jnp.where(kept, middle, low), jnp.where(kept, high, middle - 1)

    low, _ = lax.while_loop(lambda state: jnp.any(state[0] < state[1]), halve, (_ordered(low), _ordered(high)))
    return _float(low)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order: as bits, negative floats count downwards."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(i: jax.Array) -> jax.Array:
    """The inverse of `_ordered`."""
    return lax.bitcast_convert_type(i ^ ((i >> 31) & 0x7FFFFFFF), jnp.float32)
