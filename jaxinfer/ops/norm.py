"""RMSNorm and LayerNorm, in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import NormSpec


def norm(x: jax.Array, p: dict[str, Any], spec: NormSpec, axes: int = 1, share: float = 1.0) -> jax.Array:
    """Normalises over the last `axes` axes of x (2: a norm over a whole projection [N, H]); in the dtype of x.

    share: of the entries that are not padding with zeros (RMSNorm alone): what the mean is over.
    """
    over = tuple(range(-axes, 0))
    y = x.astype(jnp.float32)
    if spec.kind == "layer":
        y = y - y.mean(over, keepdims=True)
    square = jnp.mean(jnp.square(y), over, keepdims=True)
    y = y * jax.lax.rsqrt((square if share == 1 else square / share) + spec.eps)
    if spec.kind == "layer":
        y = y * p["scale"].astype(jnp.float32) + p["bias"].astype(jnp.float32)
        return y.astype(x.dtype)
    if spec.late_cast:
        return (y * (spec.offset + p["scale"].astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * (spec.offset + p["scale"]).astype(x.dtype)
