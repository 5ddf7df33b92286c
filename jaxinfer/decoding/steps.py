"""The public steps: pure functions of (params, ids, cache), jitted, with the config static and the cache donated.

A cache, like a key, is spent once: after a call the old one is gone, and `jax.tree.map(jnp.copy, cache)` beforehand
keeps a branch. Inside the caller's own `jax.jit` nothing is donated but what the caller donates. Nothing is refused
here for want of room: what does not fit is dropped, and `cache.overflow` says so.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.model import Decoder
from jaxinfer.decoding.state import idle

door = functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))


@door
def forward(
    params: Any, config: ModelConfig, ids: jax.Array, cache: Cache, *, num: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Scores [B, T, V] float32 of the token after each of ids [B, T], and the cache with these tokens committed.

    Rows are right-padded: num [B] of the T ids are valid (all of them by default). A pad's scores are zeros; a row with
    num 0 changes nothing. May be called again on the cache it returned: prefill in chunks, or turn by turn.
    """
    rows, (ids, count) = ids.shape[0], idle(cache, ids, valid(ids, num, 2))
    scores, cache = Decoder(config).step(params, ids, cache, cache.step(count, ids.shape[1]))
    return scores[:rows, :, : config.vocab_size], cache.advance(count)


@door
def prefill(
    params: Any, config: ModelConfig, ids: jax.Array, cache: Cache, *, num: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Like `forward`, but scores only each row's last valid token: [B, V] float32."""
    rows, (ids, count) = ids.shape[0], idle(cache, ids, valid(ids, num, 2))
    scores, cache = Decoder(config).last(params, ids, cache, cache.step(count, ids.shape[1]))
    return scores[:rows, : config.vocab_size], cache.advance(count)


@door
def decode_step(
    params: Any, config: ModelConfig, ids: jax.Array, cache: Cache, *, num: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Feeds one id a row, ids [B], and scores the next: [B, V] float32. num [B] is 0 for rows that stand still."""
    rows, (ids, count) = ids.shape[0], idle(cache, ids, valid(ids, num, 1))
    scores, cache = Decoder(config).last(params, ids[:, None], cache, cache.step(count, 1))
    return scores[:rows, : config.vocab_size], cache.advance(count)


def valid(ids: jax.Array, num: jax.Array | None, rank: int) -> jax.Array:
    """num [B] int32, after checking the shapes of ids and num."""
    if ids.ndim != rank or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids have shape {ids.shape} and dtype {ids.dtype}: they must be integers of rank {rank}")
    if num is None:
        return jnp.full(ids.shape[0], ids.shape[1] if rank == 2 else 1, jnp.int32)
    if num.shape != ids.shape[:1]:
        raise ValueError(f"num has shape {num.shape} but ids have {ids.shape[0]} rows: give one number a row")
    return num.astype(jnp.int32)
