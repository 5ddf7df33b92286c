"""What memory there is, and in which form caches and codes lie in it best."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp

from jaxinfer.kernels import native
from jaxinfer.kernels.choice import choice

# XLA:CPU before 0.11.2 computes a write into a bfloat16 buffer in float32, and so rewrites the whole buffer.
CPU_WRITES_BFLOAT16 = (0, 11, 2)


def cache_dtype(dtype: str, platform: str | None = None) -> jnp.dtype:
    """The dtype in which a cache of a model in `dtype` is kept unless asked for: its own, except where reading costs.

    XLA:CPU reads bfloat16 by writing it out in float32 first; the kernel does not.
    """
    if (platform or jax.default_backend()) == "cpu" and dtype == "bfloat16":
        plain = choice().attention == "reference" or native.unavailable() is not None
        return jnp.dtype("float32" if plain else dtype)
    return jnp.dtype(dtype)


def keeps_bits(dtype: jnp.dtype, platform: str | None = None) -> bool:
    """Whether numbers of a dtype that are written a few at a time are best kept by their bits, as integers."""
    cpu = (platform or jax.default_backend()) == "cpu"
    return cpu and dtype == jnp.bfloat16 and jax.__version_info__[:3] < CPU_WRITES_BFLOAT16


def packs_int4(platform: str | None = None) -> bool:
    """Whether codes of four bits are best packed two to a byte: XLA:CPU gives an int4 a byte, GPUs unpack in a copy."""
    return (platform or jax.default_backend()) == "cpu"


def free_memory() -> int | None:
    """Bytes that may still be allocated, over all local devices; None where the platform does not say."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return min(host_memory(), default=None)
    stats = [device.memory_stats() for device in devices]
    if not all(stats):
        return None
    return sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats if s)


def host_memory(proc: pathlib.Path = pathlib.Path("/proc"), cgroup: pathlib.Path = pathlib.Path("/sys/fs/cgroup")):
    """The host's free bytes, then what a container's limit leaves (cgroup v2, v1), as far as Linux says them."""
    meminfo = proc / "meminfo"
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    if found:
        yield int(found[1]) * 1024
    v1 = cgroup / "memory"
    for limit, used, stat, cached in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat", "file"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat", "total_cache"),
    ):
        most = limit.read_text().strip() if limit.is_file() else "max"
        if most != "max":  # pages of files are counted as used, and given back when they are needed
            pages = re.search(rf"^{cached} (\d+)", stat.read_text(), re.MULTILINE) if stat.is_file() else None
            yield int(most) - int(used.read_text()) + (int(pages[1]) if pages else 0)
