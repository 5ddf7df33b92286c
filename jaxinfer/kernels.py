"""The only room that says cpu, gpu or tpu: what each platform does best, decided once and by name."""

import jax
import jax.numpy as jnp

# XLA:CPU before 0.11.2 computes a write into a bfloat16 buffer in float32, and so rewrites the whole buffer.
CPU_WRITES_BFLOAT16 = (0, 11, 2)


def cache_dtype(dtype: str, platform: str | None = None) -> jnp.dtype:
    """The dtype in which a cache of a model in `dtype` is kept unless asked for: its own, except where writes cost."""
    platform = platform or jax.default_backend()
    version = tuple(int(part) for part in jax.__version__.split(".")[:3])
    if platform == "cpu" and dtype == "bfloat16" and version < CPU_WRITES_BFLOAT16:
        return jnp.dtype("float32")
    return jnp.dtype(dtype)
