"""The only room that says cpu, gpu or tpu: what each platform does best, decided once and by name."""

from __future__ import annotations

import pathlib
import re

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


def free_memory() -> int | None:
    """Bytes that may still be allocated, over all local devices; None where the platform does not say."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        meminfo = pathlib.Path("/proc/meminfo")
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
        return int(found[1]) * 1024 if found else None
    stats = [device.memory_stats() for device in devices]
    if not all(stats):
        return None
    return sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats if s)
