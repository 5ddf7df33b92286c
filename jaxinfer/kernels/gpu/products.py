"""Products of a lone row on NVIDIA GPUs, with what stands before and after them: one pass over the weights.

Decoding reads every weight once, and each kernel that XLA launches between two products (a norm, its rounding and a
second row to fill its tiles, a gate, a sum with the residual) costs as much as reading some megabytes. Here a program
multiplies some outputs of a weight, or of two that a gate brings together. A norm rests on one number, the mean of the
squares of x: it is summed beside the products and applied to what they come to. All is float32 but what comes and goes.

Measured on an H200, Llama 3 8B in bfloat16: 9 kernels a layer instead of 18, 4.61 ms a token instead of 4.95. There it
was faster than tiles for the tensor cores, which more rows would need, and than lines that a program reads one by one;
of weights in int8 XLA's own products were faster than any of these (benchmarks/gpu).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.gpu.tiles import load, power, store

OUTPUTS = 4  # of a program, of each weight that it multiplies with
BLOCK = 512  # numbers of each output that are read at once
MOST = 1 << 16  # outputs: of more, logits say, XLA finds products that read as fast, and nothing stands around them
FLOATS = (jnp.bfloat16, jnp.float16)


class Around(NamedTuple):
    """What stands before and after products."""

    gate: Callable[[jax.Array], jax.Array] | None = None  # two weights have one answer: gate(first) * second
    eps: float = 0.0  # of an RMSNorm of x before them: x / sqrt(mean(x^2) + eps) * (offset + scale)
    offset: float = 0.0

    def parts(self, num: int) -> list[tuple[int, ...]]:
        """Which of so many weights a program multiplies with: one, or the two of a gate."""
        return [tuple(range(num))] if self.gate else [(i,) for i in range(num)]


ALONE = Around()


def unknown(x: jax.Array, *weights: jax.Array) -> str | None:
    """Why the kernel cannot multiply x [M, I] with weights [O, I], or None if it can."""
    if x.dtype not in FLOATS:
        return f"it multiplies no {x.dtype}"
    if len(x) != 1:
        return f"it multiplies one row, and there are {len(x)}"
    for w in weights:
        if w.dtype != x.dtype:
            return f"it multiplies no {x.dtype} with {w.dtype}"
        if len(w) > MOST:
            return f"it makes {MOST} outputs at most, and there are {len(w)}"
    return None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def project(
    plain: Callable[..., tuple[jax.Array, ...]], around: Around, dtype: Any, x: jax.Array, weights: Any, *more: Any
) -> tuple[jax.Array, ...]:
    """`multiply` in programs for NVIDIA GPUs, `plain(x, weights, *more)` in all others, and in all derivatives."""
    kernel = functools.partial(multiply, around=around, dtype=dtype)
    return jax.lax.platform_dependent(x, weights, *more, cuda=kernel, default=plain)


@project.defjvp
def _tangent(plain: Any, around: Around, dtype: Any, primals: Any, tangents: Any) -> Any:
    return project(plain, around, dtype, *primals), jax.jvp(plain, primals, tangents)[1]


@functools.partial(jax.jit, static_argnames=("around", "dtype", "interpret"))  # traced once for all layers
def multiply(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    scale: jax.Array | None = None,
    add: jax.Array | None = None,
    around: Around = ALONE,
    dtype: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """x [1, I] times each weight [O, I] transposed: [1, O] each, in `dtype` (that of x unless given). The bare kernel.

    scale [I]: of a norm of x before them. add [1, O]: added to the answer of a lone weight. interpret: by XLA's own
    operations, on any platform, for tests.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    parts = around.parts(len(weights))
    answers = [len(weights[part[0]]) for part in parts]
    return pallas.pallas_call(
        functools.partial(work, around),
        out_shape=tuple(jax.ShapeDtypeStruct((1, num), dtype or x.dtype) for num in answers),
        grid=(sum(map(programs, answers)),),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="product",
    )(x, weights, scale, add)


def programs(outputs: int) -> int:
    """That make so many outputs."""
    return -(-outputs // OUTPUTS)


# --- a program -----------------------------------------------------------------------------------------------------


def work(around: Around, x: Any, weights: Any, scale: Any, add: Any, *out: Any) -> None:
    """The one whose outputs these are; all arrays as references."""
    from jax.experimental import pallas

    index, begin = pallas.program_id(0), 0
    for part, to in zip(around.parts(len(weights)), out, strict=True):
        num = programs(to.shape[1])
        own = functools.partial(outputs, around, x, [weights[i] for i in part], scale, add, to, index - begin)
        if len(out) == 1:
            own()
        else:
            pallas.when((index >= begin) & (index < begin + num))(own)
        begin += num


def outputs(around: Around, x: Any, weights: list[Any], scale: Any, add: Any, out: Any, index: jax.Array) -> None:
    """OUTPUTS rows of each weight times x."""
    inner, num = x.shape[1], out.shape[1]
    block = min(BLOCK, power(inner))
    steps, o = -(-inner // block), index * OUTPUTS + jnp.arange(OUTPUTS)
    there = o < num

    def columns(i: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Those of a step, and which of them there are, unless that is all."""
        column = i * block + jnp.arange(block)
        return column, None if inner % block == 0 else column < inner

    def read(i: jax.Array) -> list[jax.Array]:
        """What a step multiplies with, [OUTPUTS, block] of each weight."""
        column, known = columns(i)
        mask = None if num % OUTPUTS == 0 else there[:, None]
        if known is not None:
            mask = known[None] if mask is None else mask & known[None]
        return [load(w, (o[:, None], column[None]), mask, evict="evict_first") for w in weights]

    def step(i: jax.Array, state: Any) -> Any:
        """Adds products to the sums of each weight, and squares to those of x."""
        sums, squares, tiles = state
        after = read(jnp.minimum(i + 1, steps - 1))  # asked for before these are multiplied
        column, known = columns(i)
        row = load(x, (jnp.zeros_like(column), column), known).astype(jnp.float32)
        if scale is not None:
            squares += row * row
            row *= load(scale, (column,), known).astype(jnp.float32) + around.offset
        return (
            [own + tile.astype(jnp.float32) * row[None] for own, tile in zip(sums, tiles, strict=True)],
            squares,
            after,
        )

    sums = [jnp.zeros((OUTPUTS, block), jnp.float32) for _ in weights]
    state = sums, jnp.zeros(block, jnp.float32), read(jnp.int32(0))
    sums, squares, _ = jax.lax.fori_loop(0, steps, step, state)
    y = [own.sum(1) for own in sums]
    if scale is not None:
        size = jax.lax.rsqrt(squares.sum() / inner + around.eps)
        y = [one * size for one in y]
    answer, where = around.gate(y[0]) * y[1] if around.gate else y[0], (jnp.zeros_like(o), o)
    if add is not None:
        answer += load(add, where, there).astype(jnp.float32)
    store(out, where, there, answer)
