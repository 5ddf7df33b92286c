"""Products of activations with weights, seen with their letters."""

import math

import jax
import jax.numpy as jnp

from jaxinfer import kernels, mesh
from jaxinfer.quantization import Weight


def linear(x: jax.Array, w: jax.Array | Weight, equation: str, bias: jax.Array | None = None, dtype=None) -> jax.Array:
    """The product that `equation` names ("BTD,NHD->BTNH"), summed in float32, in `dtype` (that of x unless given).

    Weights keep the checkpoint's [out, in] order, and are multiplied as that matrix: seen as [N, H, D] XLA:CPU would
    transpose the whole weight first. It is multiplied by the kernel that `kernels.choice()` names, or else plainly;
    either way a row has the same bits whatever the number of rows beside it. One in codes multiplies itself.
    """
    given, out = equation.split("->")
    left, right = given.split(",")
    outer = sum(letter not in left for letter in right)
    if isinstance(w, Weight):
        y = coded(x, w, left, right, outer)
    else:
        matrix = w.reshape(math.prod(w.shape[:outer]), -1)
        rows = x.reshape(-1, matrix.shape[1])
        kernel = kernels.choice().product(rows, matrix)
        y = kernel(plain, False, rows, matrix) if kernel else plain(rows, matrix)
    y = y.astype(dtype or x.dtype).reshape(*x.shape[: x.ndim - len(right) + outer], *w.shape[:outer])
    y = mesh.constrain(y, out)
    return y if bias is None else y + bias.astype(y.dtype)


def coded(x: jax.Array, w: Weight, left: str, right: str, outer: int) -> jax.Array:
    """The product with a weight in codes: each device of a mesh multiplies with its own part."""
    inner = right[outer:]

    def local(x: jax.Array, w: Weight) -> jax.Array:
        y = w.matrix(outer).multiply(x.reshape(-1, math.prod(w.shape[outer:])))
        for letter in inner:
            y = mesh.total(y, letter)
        return y.reshape(*x.shape[: x.ndim - len(inner)], *w.shape[:outer])

    return mesh.shard_map(local, (left, w.letters(right)), left[: len(left) - len(inner)] + right[:outer])(x, w)


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, I] times w [O, I] transposed, in float32, as XLA multiplies: what every kernel is compared with.

    A lone row is multiplied as two: XLA gives a row of a product the same bits whatever the number of rows beside it,
    except when it is alone (and on CPU it would first rewrite a bfloat16 weight in float32).
    """
    y = dot(jnp.concatenate([x, x]) if len(x) == 1 else x, w, "MI,OI->MO")
    return y[: len(x)]


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


def embed(table: jax.Array | Weight, ids: jax.Array) -> jax.Array:
    """Rows of `table` [V, D] for ids [...]: [..., D]. An id outside the table gives NaN, never another id's row."""
    if isinstance(table, Weight):
        return table.rows(ids)
    # Held back: XLA:CPU before 0.11.2 would convert a whole bfloat16 table to float32 ahead of a loop.
    held, ids = jax.lax.optimization_barrier((table, ids))
    return held.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
