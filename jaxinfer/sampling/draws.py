"""Noise and draws: what a row draws depends on its seed and the position, not on where or beside whom it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from jaxinfer.sampling.controls import GREEDY, Sampling

# What a draw is for. Two draws of one row and position with different purposes are independent.
TOKEN, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3


def noise(key: jax.Array, seed: jax.Array, position: jax.Array, purpose: int, vocab: int) -> jax.Array:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits). -> [B, vocab] float32, all finite

    seed, position [B] int32: the row's seed, and the index in its row of the token being drawn. Row b's noise belongs
    to fold_in(fold_in(fold_in(key, seed[b]), position[b]), purpose) and to nothing else, and its column v to v and not
    to `vocab`: a vocabulary padded for a mesh has the same noise, and a device makes that of its own slice alone.
    """
    rows = jax.vmap(_words, in_axes=(None, 0, 0, None))(key, seed, position, purpose)  # [B, 2]
    return jax.vmap(_gumbel, in_axes=(0, None))(rows, jnp.arange(vocab, dtype=jnp.uint32))


def sample(
    logits: jax.Array, sampling: Sampling, key: jax.Array, position: jax.Array, purpose: int = TOKEN
) -> jax.Array:
    """Draws one id per row. logits [B, V] as `process` gives them; position [B] of the token being drawn. -> [B] int32

    A row with a temperature (which is in the logits already) gets argmax(logits + noise), a greedy one, with less than
    1e-5, argmax(logits). The lowest id wins a tie. A row that is -inf throughout, or that holds NaN, gives 0.
    """
    B, V = logits.shape
    if not sampling.laid_out:
        sampling = sampling.rows(B)
    logits = logits.astype(jnp.float32)
    greedy = sampling.temperature < GREEDY

    def drawn() -> jax.Array:
        gumbel = noise(key, sampling.seed, jnp.broadcast_to(position, (B,)), purpose, V)
        return _argmax(logits + jnp.where(greedy[:, None], 0.0, gumbel))

    # One hash per logit, which greedy decoding need not pay for.
    return lax.cond(jnp.all(greedy), lambda: _argmax(logits), drawn)


def logprobs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log softmax(logits)[ids] in float32, logits [B, V] being the model's own, unprocessed; ids [B] -> [B]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _argmax(x: jax.Array) -> jax.Array:
    """The lowest id of the largest value of each row. [B, V] -> [B] int32

    lax.argmax reduces pairs, which XLA:CPU does one by one, and with them all that is fused into it: at V = 128256,
    noise and draw took 4.0 ms a row, and take 0.7 ms with two plain reductions. The barrier: both see the same bits.
    """
    x = lax.optimization_barrier(x)
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    behind = x < jnp.max(x, axis=-1, keepdims=True)  # nobody in a row with NaN, which gives 0
    return jnp.min(jnp.where(behind, x.shape[-1], ids), axis=-1)


def _words(key: jax.Array, seed: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
    """The two words of a row's key. Threefry whatever kind `key` is: the bits of rbg depend on the batch's shape."""
    key = jax.random.wrap_key_data(jax.random.key_data(key)[..., :2], impl="threefry2x32")
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
