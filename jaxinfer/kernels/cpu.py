"""Products on the CPU: XLA's own rewrite a lone bfloat16 row's weight in float32, and leave half the bandwidth unused.

The kernel (csrc/) is an XLA FFI handler that works on XLA's own threads. It sums in one order, whatever the number of
rows and threads: a row has the same bits alone and among any others. They may differ between instruction sets.

float32 is multiplied and summed as IEEE says, denormal numbers included. bfloat16 is widened to float32, which is
exact, and then treated alike, except where the machine has AVX-512 BF16: its vdpbf16ps, at twice the rate, counts
denormal inputs and sums as zero, as XLA's own product does there.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels import build

# The number changes with what a handler is given: a program from a persistent cache never calls another version's.
TARGET, CODED = "jaxinfer_linear_v1", "jaxinfer_coded_v2"
BLOCK = 32  # numbers of x that share a scale where x is rounded
UNIT = 32  # codes of four bits lie together, the first half of them in the low bits of 16 bytes
ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512bf16": 3}
BEST = -1

_lock = threading.Lock()


def linear(
    x: jax.Array,
    w: jax.Array,
    isa: str | None = None,
    threads: int | None = None,
    scale: jax.Array | None = None,
    dynamic: bool = False,
) -> jax.Array:
    """x [M, I] times w [O, I] transposed, both float32 or both bfloat16: [M, O] float32. The bare kernel.

    scale: w is codes, of which the kernel makes float32 numbers on the way; x is float32. [O] float32: w is int8.
    [O, I / g] float16, g a multiple of UNIT: w is [O, I / 2] uint8, two codes of four bits each, 0 to 15 for -8 to 7.
    dynamic: x is rounded to int8 first, BLOCK neighbours to a scale (`quantization.rounded`), and codes meet codes.
    isa: one of ISAS, for tests; by default the best that the machine has. threads: by default as many as XLA has, or
    one where the product is small. RuntimeError if there is no kernel. Not differentiable: see `product`.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"there is no CPU kernel: {reason}")
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    how = {"isa": np.int32(BEST if isa is None else ISAS[isa]), "threads": np.int32(threads or 0)}
    if scale is None:
        return jax.ffi.ffi_call(TARGET, shape)(x, w, **how)
    return jax.ffi.ffi_call(CODED, shape)(x, w, scale, **how, dynamic=np.int32(dynamic))


def batched(dynamic: bool) -> Callable[..., jax.Array]:
    """`linear` of x and w, or codes and scales, that vmap knows."""

    @jax.custom_batching.custom_vmap
    def rows(x: jax.Array, *w: jax.Array) -> jax.Array:
        return linear(x, w[0], scale=w[1] if len(w) > 1 else None, dynamic=dynamic)

    @rows.def_vmap
    def rows_of_a_batch(size: int, batched: list[bool], x: jax.Array, *w: jax.Array) -> tuple[jax.Array, bool]:
        """A batch of x is more rows, which change no bits; a batch of w is multiplied one by one."""
        if not any(batched[1:]):
            return rows(x.reshape(-1, x.shape[-1]), *w).reshape(size, -1, w[0].shape[0]), True
        every = [a if many else jnp.broadcast_to(a, (size, *a.shape)) for a, many in zip((x, *w), batched, strict=True)]
        return jax.lax.map(lambda one: rows(*one), every), True

    return rows


ROWS = {dynamic: batched(dynamic) for dynamic in (False, True)}


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


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine has and the kernel knows, best last. BuildError if there is no kernel."""
    best = ctypes.CDLL(str(build.library())).jaxinfer_best_isa()
    return tuple(name for name, number in ISAS.items() if number <= best)


def unavailable() -> str | None:
    """Why there is no kernel, or None if there is; builds, loads and registers it the first time it is asked.

    Where that fails, one line (a warning of the logger `jaxinfer`, which is stderr unless configured) says so, once.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> str | None:
    try:
        handle = ctypes.CDLL(str(build.library()))
        for name, handler in ((TARGET, handle.jaxinfer_linear), (CODED, handle.jaxinfer_coded)):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    except (build.BuildError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        logging.getLogger("jaxinfer").warning(
            "No CPU kernel: %s. Products go through XLA, at about half the speed; g++ or clang++ would change that.",
            reason,
        )
        return reason
    return None
