"""Products on the CPU: XLA's own rewrite a lone bfloat16 row's weight in float32, and leave half the bandwidth unused.

The kernel (csrc/) is an XLA FFI handler that works on XLA's own threads. It sums in one order, whatever the number of
rows and threads: a row has the same bits alone and among any others. They may differ between instruction sets.

float32 is multiplied and summed as IEEE says, denormal numbers included. bfloat16 is widened to float32, which is
exact, and then treated alike, except where the machine has AVX-512 BF16, whose vdpbf16ps works at twice the rate, or
the tiles of AMX, at ten times that: these count denormal inputs and sums as zero, as XLA's own product does there.
Codes meet more than LONE rows of bfloat16 in these tiles, which sum in another order than what fewer rows go through,
and take what those are rounded to as numbers of bfloat16, as the plain form does.
Codes of eight bits meet rows of float32 in other tiles of AMX, as what those are to 30 bits, counted from the largest
number of a row, and are summed exactly: nearer to the truth than sums of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.native import BEST, CODED, GATED, ISAS, LINEAR, demand

BLOCK = 32  # numbers of x that share a scale where x is rounded
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2}  # which a kernel works out after two products
# Rows of bfloat16 that are multiplied with codes (of eight bits, or two of four) sooner as float32, or, rounded
# themselves, as codes: making numbers of bfloat16 of codes takes its time.
LONE = {("int8", False): 16, ("uint8", False): 12, ("int8", True): 10, ("uint8", True): 32}
UNIT = 32  # codes of four bits lie together, the first half of them in the low bits of 16 bytes


def linear(
    x: jax.Array,
    w: jax.Array,
    isa: str | None = None,
    threads: int | None = None,
    scale: jax.Array | None = None,
    dynamic: bool = False,
) -> jax.Array:
    """x [M, I] times w [O, I] transposed, both float32 or both bfloat16: [M, O] float32. The bare kernel.

    scale: w is codes, of which the kernel makes float32 numbers on the way (or AMX, beside int8, digits of x), and x is
    float32. It may be bfloat16: AMX makes numbers of bfloat16 of the codes, as exactly (two of one of four bits and its
    scale). [O] float32: w is int8.
    [O, I / g] float16, g a multiple of UNIT: w is [O, I / 2] uint8, two codes of four bits each, 0 to 15 for -8 to 7.
    dynamic: x is rounded to int8 first, BLOCK neighbours to a scale (`quantization.rounded`), and codes meet codes; or,
    of bfloat16 on AMX, what those say, in bfloat16, meets numbers of it.
    isa: one of ISAS, for tests; by default the best that the machine has. threads: by default as many as XLA has, or
    one where the product is small. RuntimeError if there is no kernel. Not differentiable: see `product`.
    """
    demand()
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    how = {"isa": np.int32(BEST if isa is None else ISAS[isa]), "threads": np.int32(threads or 0)}
    if scale is None:
        return jax.ffi.ffi_call(LINEAR, shape)(x, w, **how)
    return jax.ffi.ffi_call(CODED, shape)(x, w, scale, **how, dynamic=np.int32(dynamic))


def batched(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """kernel(x, *w), of rows x [M, I] and what they are multiplied with [O, ...], that vmap knows."""
    rows = jax.custom_batching.custom_vmap(kernel)

    @rows.def_vmap
    def rows_of_a_batch(size: int, batched: list[bool], x: jax.Array, *w: jax.Array) -> tuple[jax.Array, bool]:
        """A batch of x is more rows, which change no bits; a batch of w is multiplied one by one."""
        if not any(batched[1:]):
            return rows(x.reshape(-1, x.shape[-1]), *w).reshape(size, -1, w[0].shape[0]), True
        every = [a if many else jnp.broadcast_to(a, (size, *a.shape)) for a, many in zip((x, *w), batched, strict=True)]
        return jax.lax.map(lambda one: rows(*one), every), True

    return rows


def multiplied(dynamic: bool) -> Callable[..., jax.Array]:
    """`linear` of x and w, or of x, codes and scales."""
    return lambda x, w, *scale: linear(x, w, scale=scale[0] if scale else None, dynamic=dynamic)


ROWS = {dynamic: batched(multiplied(dynamic)) for dynamic in (False, True)}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def product(plain: Callable[..., jax.Array], dynamic: bool, x: jax.Array, *w: jax.Array) -> jax.Array:
    """`linear` in programs for the CPU, `plain(x, *w)` in those for other platforms, and in all derivatives.

    In a program that is jitted for a mesh without `jax.set_mesh`, XLA gathers x and w whole first: it cannot split it.
    """
    return jax.lax.platform_dependent(x, *w, cpu=ROWS[dynamic], default=plain)


@product.defjvp
def _tangent(plain, dynamic, primals, tangents):
    x, *w = primals
    dx, *dw = tangents
    out = product(plain, dynamic, *primals), plain(dx, *w)
    return out if len(w) > 1 else (out[0], out[1] + plain(x, *dw))  # codes do not move


def gated(
    x: jax.Array, gate: jax.Array, up: jax.Array, activation: str, isa: str | None = None, threads: int | None = None
) -> jax.Array:
    """activation(x gate) * (x up), x [M, I] and weights [O, I] bfloat16: [M, O] bfloat16. The bare kernel.

    It is one by AMX; without, two products and a sweep.

    activation: one of ACTIVATIONS. Sums and what is made of them are float32, rounded once. isa, threads, RuntimeError:
    as `linear`. Not differentiable: see `opened`.
    """
    demand()
    shape = jax.ShapeDtypeStruct((x.shape[0], gate.shape[0]), jnp.bfloat16)
    how = {"isa": np.int32(BEST if isa is None else ISAS[isa]), "threads": np.int32(threads or 0)}
    return jax.ffi.ffi_call(GATED, shape)(x, gate, up, activation=np.int32(ACTIVATIONS[activation]), **how)


def opening(activation: str) -> Callable[..., jax.Array]:
    """`gated` of x, gate and up."""
    return lambda x, gate, up: gated(x, gate, up, activation)


GATES = {name: batched(opening(name)) for name in ACTIVATIONS}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def opened(plain: Callable[..., jax.Array], activation: str, *arrays: jax.Array) -> jax.Array:
    """`gated` of (x, gate, up) in programs for the CPU, `plain` of them in others, and in all derivatives."""
    return jax.lax.platform_dependent(*arrays, cpu=GATES[activation], default=plain)


@opened.defjvp
def _opened_tangent(plain, activation, primals, tangents):
    return opened(plain, activation, *primals), jax.jvp(plain, primals, tangents)[1]
