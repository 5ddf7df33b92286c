"""Noise and draws: what a row draws depends on its seed and the position, not on where or beside whom it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from jaxinfer import mesh
from jaxinfer.sampling.controls import GREEDY, Sampling
from jaxinfer.sampling.split import split

# What a draw is for. Two draws of one row and position with different purposes are independent.
TOKEN, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3


def noise(
    key: jax.Array, seed: jax.Array, position: jax.Array, purpose: int, vocab: int, first: jax.Array | int = 0
) -> jax.Array:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits). -> [B, vocab] float32, all finite

    seed, position [B] int32: the row's seed, and the index in its row of the token being drawn. Row b's noise belongs
    to fold_in(fold_in(fold_in(key, seed[b]), position[b]), purpose) and to nothing else, and its column v to v and not
    to `vocab`: a vocabulary padded for a mesh has the same noise, and a device makes that of its own slice alone, of
    the ids from `first` on.
    """
    rows = jax.vmap(_words, in_axes=(None, 0, 0, None))(key, seed, position, purpose)  # [B, 2]
    return jax.vmap(_gumbel, in_axes=(0, None))(
        rows, jnp.arange(vocab, dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
    )


def sample(
    logits: jax.Array, sampling: Sampling, key: jax.Array, position: jax.Array, purpose: int = TOKEN
) -> jax.Array:
    """Draws one id per row. logits [B, V] as `process` gives them; position [B] of the token being drawn. -> [B] int32

    A row with a temperature (which is in the logits already) gets argmax(logits + noise), a greedy one, with less than
    1e-5, argmax(logits). The lowest id wins a tie. A row that is -inf throughout, or that holds NaN, gives 0.
    """
    return choose(logits, None, sampling, key, position, purpose)[0]


def choose(
    logits: jax.Array,
    model: jax.Array | None,
    sampling: Sampling,
    key: jax.Array,
    position: jax.Array,
    purpose: int = TOKEN,
) -> tuple[jax.Array, jax.Array]:
    """`sample`, and log softmax(model)[id] of what was drawn: ([B], [B]); model [B, V] are the unprocessed logits.

    On a mesh both together take one collective, of five numbers a row and device. Without `model` the second is 0.
    """
    B = logits.shape[0]
    if not sampling.laid_out:
        sampling = sampling.rows(B)
    position = jnp.broadcast_to(position, (B,))
    key = jax.random.key_data(key)

    def local(logits: jax.Array, model: jax.Array | None, temperature: jax.Array, seed: jax.Array, key, position):
        V = logits.shape[-1]
        first = mesh.start("V", V)
        logits = logits.astype(jnp.float32)
        greedy = temperature < GREEDY

        def drawn() -> tuple[jax.Array, jax.Array]:
            gumbel = noise(key, seed, position, purpose, V, first)
            return _best(logits + jnp.where(greedy[:, None], 0.0, gumbel))

        # One hash per logit, which greedy decoding need not pay for.
        value, own = lax.cond(jnp.all(greedy), lambda: _best(logits), drawn)
        facts = [value, (first + own).astype(jnp.float32)]  # ids are under 2**24, so exact
        if model is not None:
            facts += _weights(model, own)
        parts = jnp.stack(facts, 1)[..., None]  # [B, 2 or 5, 1]
        return _join(mesh.gather(parts, "V"))

    words = ("BV", None if model is None else "BV", "B", "B", "_", "B")
    return split(local, words, ("B", "B"), logits, model, sampling.temperature, sampling.seed, key, position)


def candidates(
    logits: jax.Array, sampling: Sampling, key: jax.Array, position: jax.Array, purpose: int, count: int
) -> jax.Array:
    """Draws `count` different ids per row, best first: the first is that of `sample`. -> [B, count] int32

    The largest of logits + noise are a draw without replacement, in its order (Kool et al. 2019, Gumbel top-k).
    logits [B, V], sampling laid out and position [B] as in `sample`; a greedy row has no noise.
    """

    def local(logits: jax.Array, temperature: jax.Array, seed: jax.Array, key: jax.Array, position: jax.Array):
        V = logits.shape[-1]
        first = mesh.start("V", V)
        gumbel = noise(key, seed, position, purpose, V, first)
        value, own = lax.top_k(logits + jnp.where((temperature < GREEDY)[:, None], 0, gumbel), min(count, V))
        facts = mesh.gather(jnp.stack([value, (first + own).astype(jnp.float32)], 1), "V")  # [B, 2, parts count]
        _, best = lax.top_k(facts[:, 0], count)  # of equals the first, which has the lowest id
        return jnp.take_along_axis(facts[:, 1], best, 1).astype(jnp.int32)

    words = ("BV", "B", "B", "_", "B")
    data = jax.random.key_data(key)
    return split(local, words, "B_", logits, sampling.temperature, sampling.seed, data, position)


def logprobs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log softmax(logits)[ids] in float32, logits [B, V] being the model's own, unprocessed; ids [B] -> [B]."""

    def local(logits: jax.Array, ids: jax.Array) -> jax.Array:
        V = logits.shape[-1]
        own = ids - mesh.start("V", V)
        here = (own >= 0) & (own < V)
        logit, top, total = _weights(logits, jnp.where(here, own, 0))
        facts = jnp.stack([jnp.where(here, logit, 0), here.astype(jnp.float32), top, total], 1)[..., None]
        logit, here, top, total = jnp.unstack(mesh.gather(facts, "V"), axis=1)
        peak, mass = _mass(top, total)
        logit = jnp.where(here.any(-1), jnp.sum(logit, axis=-1), jnp.nan)
        return logit - peak - jnp.log(mass)

    return split(local, ("BV", "B"), "B", logits, ids)


def uniform(key: jax.Array, seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
    """A number in [0, 1) for each row, of 24 bits: for key, seed [B], position [B] and purpose as in `noise`. -> [B]"""
    words = jax.vmap(_words, in_axes=(None, 0, 0, None))(key, seed, position, purpose)
    zero = jnp.zeros_like(words[:, 0])
    high, _ = jax.vmap(threefry2x32_p.bind)(words[:, 0], words[:, 1], zero, zero)
    return (high >> 8).astype(jnp.float32) * 2.0**-24


def best_ids(x: jax.Array) -> jax.Array:
    """The lowest id of the largest value of each row, x [B, V] being a device's part or the whole. -> [B] int32"""
    value, own = _best(x)
    facts = jnp.stack([value, (mesh.start("V", x.shape[-1]) + own).astype(jnp.float32)], 1)[..., None]
    return _join(mesh.gather(facts, "V"))[0]


def _best(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest value of each row and its lowest place; NaN and 0 for a row with NaN. [B, V] -> ([B], [B] int32)

    lax.argmax reduces pairs, which XLA:CPU does one by one, and with them all that is fused into it: at V = 128256,
    noise and draw took 4.0 ms a row, and take 0.7 ms with two plain reductions. The barrier: both see the same bits.
    """
    x = lax.optimization_barrier(x)
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    top = jnp.max(x, axis=-1)  # which on CPU may step over NaN
    place = jnp.min(jnp.where(x != x, -1, jnp.where(x < top[:, None], x.shape[-1], ids)), axis=-1)
    return jnp.where(place < 0, jnp.nan, top), jnp.maximum(place, 0)


def _weights(model: jax.Array, own: jax.Array) -> list[jax.Array]:
    """Of each row [B]: the logit at `own`, the largest one, and the sum of exp(logit - largest)."""
    model = model.astype(jnp.float32)
    top = jnp.max(model, axis=-1)
    base = jnp.where(top == -jnp.inf, 0, top)  # a part may be padding throughout
    total = jnp.sum(jnp.exp(model - base[:, None]), axis=-1)
    return [jnp.take_along_axis(model, own[:, None], axis=-1)[:, 0], top, total]


def _join(parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `choose` gives, from what each part of the vocabulary found: [B, 2 or 5, parts] -> ([B], [B])."""
    value, ids, *rest = jnp.unstack(parts, axis=1)  # [B, parts] each
    best = jnp.max(value, axis=-1, keepdims=True)
    chosen = jnp.min(jnp.where(value < best, jnp.inf, ids), axis=-1, keepdims=True)
    token = jnp.where(jnp.isnan(best), 0, chosen)[:, 0].astype(jnp.int32)
    if not rest:
        return token, jnp.zeros(token.shape, jnp.float32)
    logit, top, total = rest
    peak, mass = _mass(top, total)
    logit = jnp.sum(jnp.where(ids == chosen, logit, 0), axis=-1)
    return token, jnp.where(jnp.isnan(best[:, 0]), jnp.nan, logit - peak - jnp.log(mass))


def _mass(top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of all parts together: the largest logit, and the sum of exp(logit - largest). [B, parts] each -> ([B], [B])"""
    peak = jnp.max(top, axis=-1)
    return peak, jnp.sum(total * jnp.where(top == -jnp.inf, 0, jnp.exp(top - peak[:, None])), axis=-1)


def _words(key: jax.Array, seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
    """The two words of a row's key. Threefry whatever kind `key` is: the bits of rbg depend on the batch's shape."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    key = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    for data in (seed, position, purpose):
        key = jax.random.fold_in(key, data)
    return jax.random.key_data(key)


def _gumbel(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise of ids [V] uint32, from the 64 bits of threefry2x32(key, (0, id)). -> [V] float32

    Not jax.random.gumbel, whose default has 23-bit uniforms, hence no noise above 16: ids of probability under 1e-7 are
    then drawn wrongly, and 128k of those are a share that counts. Its mode="high" has 46 bits, but draws them in the
    shape [2, V], so that column v changes with V, and throws half of each hash away (1.7 times slower on CPU).
    Here a uniform has 48 bits where it is small, which is where noise is large: from -2.9 to 34, always finite.
    """
    return _gumbel_of(*threefry2x32_p.bind(key[0], key[1], jnp.zeros_like(ids), ids))


def _gumbel_of(high: jax.Array, low: jax.Array) -> jax.Array:
    """uint32 bits -> Gumbel noise, which falls as the 64-bit number (high, low) rises."""
    # Scaled by powers of two, which is exact: a fused multiply-add, that not every program has, changes no bit.
    x = (high >> 8).astype(jnp.float32) * 2.0**-24
    rest = ((high & 0xFF) << 16 | low >> 16).astype(jnp.float32) * 2.0**-48
    # From 1/2 on float32 has no room for the rest, and could round x up to 1 (noise -inf); half a step keeps x off 0.
    x = jnp.where(x < 0.5, x + (rest + 2.0**-49), x)
    return -jnp.log(-jnp.log1p(-x))
