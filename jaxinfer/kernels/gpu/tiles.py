"""What kernels through Pallas and Triton are made of: which GPUs have them, and how a tile is read and written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

OLDEST = "8.0"  # compute capability for which Triton compiles products


def unavailable(device: Any) -> str | None:
    """Why programs for such a device cannot have the kernel, or None if they can."""
    if device.platform != "gpu":
        return f"programs here are for a {device.platform}"
    capability = getattr(device, "compute_capability", OLDEST)  # which a device that is not there does not say
    known = capability[0].isdigit() and float(capability) >= float(OLDEST)
    return None if known else f"this GPU is of compute capability {capability}"


def power(size: int) -> int:
    """The next power of two, at least the 16 that a product takes."""
    return max(16, 1 << (size - 1).bit_length())


def split(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """x // size and x % size of what is not negative, in one instruction each."""
    return jax.lax.div(x, jnp.int32(size)), jax.lax.rem(x, jnp.int32(size))


def load(
    ref: Any, where: tuple[Any, ...], mask: jax.Array | None, other: int | float = 0, evict: str | None = None
) -> jax.Array:
    """What lies there; `other` where the mask is not. No mask: all of it. evict: what caches are told of it."""
    from jax.experimental.pallas import triton

    at = tuple(jnp.broadcast_arrays(*where))
    if mask is None:
        return triton.load(ref.at[at], eviction_policy=evict)
    return triton.load(ref.at[at], mask=jnp.broadcast_to(mask, at[0].shape), other=other, eviction_policy=evict)


def store(ref: Any, where: tuple[Any, ...], mask: jax.Array, x: jax.Array) -> None:
    """Puts x there, where the mask is."""
    from jax.experimental.pallas import triton

    at = tuple(jnp.broadcast_arrays(*where))
    triton.store(ref.at[at], x.astype(ref.dtype), mask=jnp.broadcast_to(mask, x.shape))


def product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """x [r, i] times y along one of its axes, in float32: of float32 exactly (no TF32)."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)
