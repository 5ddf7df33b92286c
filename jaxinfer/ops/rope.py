"""Rotary position embedding (Su et al. 2021), halves rotated."""

import jax
import jax.numpy as jnp

from jaxinfer.config import RopeSpec


def angles(position: jax.Array, spec: RopeSpec, size: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, R/2] float32 of positions [B, T].

    longrope has two sets of frequencies. Which one holds is chosen once, from `size`, the number of positions that the
    cache can hold: keys that were rotated with one set cannot be read with the other.
    """
    long = bool(spec.long_frequency) and size > spec.switch
    frequency, scale = (spec.long_frequency, spec.long_scale) if long else (spec.frequency, spec.scale)
    # f32: bf16 rounds 257 to 256, and sin(257) is not sin(256)
    angle = position.astype(jnp.float32)[..., None] * jnp.asarray(frequency, jnp.float32)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def turn_back(q: jax.Array, by: jax.Array, spec: RopeSpec, size: int) -> jax.Array:
    """q [B, T, N, H], rotated already, as if its position were smaller by [B, T]; size: see `angles`."""
    cos, sin = angles(-by, spec, size)
    scale = spec.long_scale if spec.long_frequency and size > spec.switch else spec.scale
    return rotate(q, cos / scale, sin / scale)  # the scale is in q


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first R entries of every head of x [B, T, N, H]; the rest of the head passes through."""
    half = cos.shape[-1]
    cos, sin = (a.astype(x.dtype)[:, :, None] for a in (cos, sin))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
