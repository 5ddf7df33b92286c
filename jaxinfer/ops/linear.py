"""Products of activations with weights, seen with their letters."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import kernels, mesh
from jaxinfer.config import NormSpec
from jaxinfer.ops.norm import norm
from jaxinfer.quantization import Weight


def linears(
    x: jax.Array,
    weights: Sequence[jax.Array | Weight],
    equations: Sequence[str],
    biases: Sequence[jax.Array | None],
    scale: dict[str, Any] | None,
    spec: NormSpec,
    dtype=None,
) -> list[jax.Array]:
    """Products of the same x [B, T, D] after a norm with `scale`, if there is one: as `linear` makes each.

    For a lone row on a GPU the norm and the products are one kernel, which rounds nothing in between.
    """
    outer = [outputs(equation) for equation in equations]
    if (once := fused(x, weights, outer, scale, spec, dtype=dtype)) is None:
        x = norm(x, scale, spec) if scale else x
        return [linear(x, *one, dtype=dtype) for one in zip(weights, equations, biases, strict=True)]
    made = [y.reshape(*x.shape[:-1], *w.shape[:n]) for y, w, n in zip(once, weights, outer, strict=True)]
    return [y if bias is None else y + bias.astype(y.dtype) for y, bias in zip(made, biases, strict=True)]


def linear(
    x: jax.Array,
    w: jax.Array | Weight,
    equation: str,
    bias: jax.Array | None = None,
    dtype=None,
    add: jax.Array | None = None,
) -> jax.Array:
    """The product that `equation` names ("BTD,NHD->BTNH"), summed in float32, in `dtype` (that of x unless given).

    add: what it is added to, of the same letters and dtype.

    Weights keep the checkpoint's [out, in] order, and are multiplied as that matrix: seen as [N, H, D] XLA:CPU would
    transpose the whole weight first. It is multiplied by the kernel that `kernels.choice()` names, or else plainly;
    either way a row has the same bits whatever the number of rows beside it. One in codes multiplies itself.
    """
    given, out = equation.split("->")
    left, right = given.split(",")
    outer = outputs(equation)
    if bias is None and (once := fused(x, [w], [outer], add=add, dtype=dtype)) is not None:
        return once[0].reshape(*x.shape[: x.ndim - len(right) + outer], *w.shape[:outer])
    if isinstance(w, Weight):
        y = coded(x, w, left, right, outer)
    else:
        matrix = seen(w, outer)
        rows = x.reshape(-1, matrix.shape[1])
        kernel = kernels.choice().product(rows, matrix)
        y = kernel(plain, False, rows, matrix) if kernel else plain(rows, matrix)
    y = y.astype(dtype or x.dtype).reshape(*x.shape[: x.ndim - len(right) + outer], *w.shape[:outer])
    y = mesh.constrain(y, out)
    y = y if bias is None else y + bias.astype(y.dtype)
    return y if add is None else add + y


def outputs(equation: str) -> int:
    """How many of a weight's first letters the answer has."""
    left, right = equation.partition("->")[0].split(",")
    return sum(letter not in left for letter in right)


def coded(x: jax.Array, w: Weight, left: str, right: str, outer: int) -> jax.Array:
    """The product with a weight in codes: each device of a mesh multiplies with its own part."""
    inner = right[outer:]

    def local(x: jax.Array, w: Weight) -> jax.Array:
        y = w.matrix(outer).multiply(x.reshape(-1, math.prod(w.shape[outer:])))
        for letter in inner:
            y = mesh.total(y, letter)
        return y.reshape(*x.shape[: x.ndim - len(inner)], *w.shape[:outer])

    return mesh.shard_map(local, (left, w.letters(right)), left[: len(left) - len(inner)] + right[:outer])(x, w)


def fused(
    x: jax.Array,
    weights: Sequence[jax.Array | Weight],
    outer: Sequence[int],
    scale: dict[str, Any] | None = None,
    spec: NormSpec | None = None,
    gate: Callable[[jax.Array], jax.Array] | None = None,
    add: jax.Array | None = None,
    dtype=None,
) -> tuple[jax.Array, ...] | None:
    """x times each weight (of `outer` letters of outputs), [M, O] each, in one kernel; None where there is none.

    scale, spec: of a norm of x before. gate: of two weights, gate(first) * second. add: what a lone one is added to.
    """
    inner = math.prod(weights[0].shape[outer[0] :])
    if x.size != inner or not inner or (spec is not None and spec.kind != "rms"):  # no lone row; another norm
        return None
    each = [seen(w, n) for w, n in zip(weights, outer, strict=True) if not isinstance(w, Weight)]
    if len(each) < len(weights):  # codes, whose lone row XLA multiplies faster
        return None
    rows = x.reshape(1, inner)
    if not kernels.choice().projects(rows, *each):
        return None
    around = kernels.Around(gate, spec.eps if spec else 0.0, spec.offset if spec else 0.0)
    twin = functools.partial(unfused, spec=spec, gate=gate, dtype=dtype)
    added = None if add is None else add.reshape(1, -1)
    return kernels.project(twin, around, dtype, rows, tuple(each), scale["scale"] if scale else None, added)


def unfused(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    scale: jax.Array | None,
    add: jax.Array | None,
    spec: NormSpec | None,
    gate: Callable[[jax.Array], jax.Array] | None,
    dtype=None,
) -> tuple[jax.Array, ...]:
    """What `fused` says, plainly, one step after the other: x [M, I], weights [O, I]."""
    x = x if scale is None or spec is None else norm(x, {"scale": scale}, spec)
    y = [plain(x, w).astype(dtype or x.dtype) for w in weights]
    y = [gate(y[0]) * y[1]] if gate else y
    return tuple(y if add is None else [add + y[0]])


def seen(w: jax.Array, outer: int) -> jax.Array:
    """A weight as [O, I], O being its first `outer` letters."""
    return w.reshape(math.prod(w.shape[:outer]), -1)


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
