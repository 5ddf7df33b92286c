"""Products of activations with weights, seen with their letters."""

import math

import jax
import jax.numpy as jnp


def linear(x: jax.Array, w: jax.Array, equation: str, bias: jax.Array | None = None, dtype=None) -> jax.Array:
    """The product that `equation` names ("BTD,NHD->BTNH"), summed in float32, in `dtype` (that of x unless given).

    Weights keep the checkpoint's [out, in] order. A lone row is multiplied as two: XLA gives a row of a product the same
    bits whatever the number of rows beside it, except when it is alone (and on CPU it would first rewrite a bfloat16
    weight in float32).
    """
    rows = equation.split(",")[0]
    inner = equation.split("->")[0].split(",")[1]
    alone = math.prod(size for size, letter in zip(x.shape, rows, strict=True) if letter not in inner) == 1
    y = dot(jnp.concatenate([x, x]) if alone else x, w, equation)
    y = (y[:1] if alone else y).astype(dtype or x.dtype)
    return y if bias is None else y + bias.astype(y.dtype)


def dot(x: jax.Array, y: jax.Array, equation: str) -> jax.Array:
    """An einsum that sums in float32, and multiplies in float32 where both sides are (no TF32)."""
    exact = x.dtype == y.dtype == jnp.float32
    return jnp.einsum(
        equation,
        x,
        y,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


def embed(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of `table` [V, D] for ids [...]: [..., D]. An id outside the table gives NaN, never another id's row."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
