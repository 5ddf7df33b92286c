"""How many tokens are worth drafting: what a round is expected to emit, over what it costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BEGIN = 0.7  # of a row that has drafted nothing yet: most drafts of ours are accepted more often than not
MEMORY = 0.9  # how much an earlier draft counts beside a later one
REST = 0.997  # the same of a round without a draft: a row that has given up tries one again every few dozen tokens


def emitted(rate: jax.Array, J: jax.Array | int) -> jax.Array:
    """Tokens a round of J drafts emits when each is accepted with probability `rate` (Leviathan et al. 2023, eq. 1)."""
    return jnp.where(rate < 1, (1 - rate ** (J + 1)) / jnp.where(rate < 1, 1 - rate, 1), J + 1)


def speedup(rate: jax.Array, cost: jax.Array | float, J: jax.Array | int) -> jax.Array:
    """Over plain decoding, where a draft's pass takes `cost` of the target's (ibid., theorem 3.8)."""
    return emitted(rate, J) / (J * cost + 1)


def chosen(rate: jax.Array, cost: jax.Array, most: int) -> jax.Array:
    """The J from 0 to `most` that is fastest for each rate [B], the smallest of equals."""
    J = jnp.arange(most + 1)
    return jnp.argmax(speedup(rate[:, None], cost, J), axis=1).astype(jnp.int32)


def learned(rate: jax.Array, num: jax.Array, kept: jax.Array) -> jax.Array:
    """The rate [B] after a round of `num` [B] drafts of which the first `kept` [B] were accepted."""
    tried = jnp.minimum(kept + 1, num)  # what comes after the first that failed was not looked at
    share = jnp.minimum(kept, num) / jnp.maximum(tried, 1)
    after = share + (rate - share) * MEMORY**tried
    return jnp.where(tried > 0, after, BEGIN + (rate - BEGIN) * REST)
