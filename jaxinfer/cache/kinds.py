"""From a kind's name to a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxinfer import kernels, mesh
from jaxinfer.cache.base import Cache
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.none import Nothing
from jaxinfer.config import ModelConfig

KINDS = {"dense": Dense, "none": Nothing}


def init_cache(
    config: ModelConfig,
    rows: int,
    size: int,
    kind: str = "dense",
    *,
    dtype=None,
    max_rewind: int = 0,
    max_pending: int = 1,
) -> Cache:
    """An empty cache of `rows` rows (B) that hold up to `size` tokens (S) each.

    On a mesh it lies as its letters say, with inactive rows added until the devices of `data` divide B.

    kind: "dense" (every key and value, preallocated) or "none" (keeps nothing: training, scoring).
    dtype: of keys and values; by default that of the model, float32 where a platform writes bfloat16 slowly.
    max_rewind, max_pending: how many committed tokens `rewind` may take back, and how many tokens may be pending.
    Raises ValueError for an unknown kind, a size that no token fits in, and a cache that the free memory cannot hold.
    """
    options = {"dtype": dtype, "max_rewind": max_rewind, "max_pending": max_pending}
    if not isinstance(jax.device_put(np.float32(0)), Tracer):  # unlike jnp.zeros, it compiles nothing to find out
        check_memory(config, rows, size, kind, **options)
    return empty_cache(config, rows, size, kind, **options)


def check_memory(config: ModelConfig, rows: int, size: int, kind: str, **options) -> None:
    """Refuses a cache of which this process's free memory cannot hold its part."""
    shapes = jax.eval_shape(lambda: empty_cache(config, rows, size, kind, **options))
    needed, free = mesh.local_bytes(shapes, shapes.letters()), kernels.free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"a cache of {rows} x {size} tokens needs {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free: "
            "ask for fewer rows, a smaller size or a smaller dtype"
        )


def cache_bytes(config: ModelConfig, rows: int, size: int, kind: str = "dense", **options) -> int:
    """The bytes that `init_cache` would allocate, without allocating them."""
    shapes = jax.eval_shape(lambda: empty_cache(config, rows, size, kind, **options))
    return shapes.bytes


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames=("dtype", "max_rewind", "max_pending"))
def empty_cache(
    config: ModelConfig, rows: int, size: int, kind: str, *, dtype=None, max_rewind: int = 0, max_pending: int = 1
) -> Cache:
    """`init_cache` as one program, and without a look at the memory."""
    if kind not in KINDS:
        raise ValueError(f"cache kind {kind!r} is not known: take one of {', '.join(KINDS)}")
    if rows < 1 or size < 1:
        raise ValueError(f"a cache of {rows} rows of {size} tokens holds nothing: rows and size must be at least 1")
    if config.num_positions and size > config.num_positions:
        raise ValueError(
            f"the cache would hold {size} tokens but the model has {config.num_positions} learned positions: "
            f"ask for a size of at most {config.num_positions}"
        )
    dtype = jnp.dtype(dtype) if dtype is not None else kernels.cache_dtype(config.dtype)
    all_rows, slots = mesh.round_up(rows, "B"), mesh.round_up(size, "S")
    cache = Cache(
        tuple(KINDS[kind].init(spec, all_rows, slots, dtype) for spec in config.layers),
        jnp.zeros(all_rows, jnp.int32),
        size=size,
        max_rewind=max_rewind,
        max_pending=max_pending,
        padding=all_rows - rows,
    )
    return mesh.constrain_tree(cache, cache.letters())
