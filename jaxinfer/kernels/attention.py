"""Attention on the CPU, of queries to a cache: XLA's own reads all that is allocated, and codes as floats first.

The kernel (csrc/attend.h) reads the slots that some query sees, each once, in the form in which it lies: in a row, or
in pages of a pool. Scores, softmax and sums are float32, and what is float32 is not rounded. Queries of bfloat16 meet a
cache of it with weights that are rounded to it, as in the plain form, where AVX-512 BF16 or AMX multiplies pairs of
them. They meet int8 as integers of 16 bits, which their weights become too, times the largest of a query and of a
block: finer than bfloat16, and summed exactly. A query has the same bits alone and among any others, whatever the
number of rows, queries and threads; but where the processor has AMX, up to FEW queries of bfloat16 a row
(csrc/amxfew.cc) and more than those (csrc/amxattend.cc) are summed in different orders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels import gpu
from jaxinfer.kernels.kept import Kept, Rule
from jaxinfer.kernels.native import ATTENTION, BEST, ISAS, demand

FOUR = 4  # slots whose scores are made at once
FEW = 16  # queries of a row: of more the products are better made as such, once for all


def attend(
    q: jax.Array, position: jax.Array, kept: Kept, rule: Rule, isa: str | None = None, threads: int | None = None
) -> jax.Array:
    """q [B, T, N, H] at `position` [B, T] int32, over what is kept: [B, T, N, H], as q. The bare kernel.

    q: float32; or bfloat16, and then weights may be rounded to it where the cache is no float32; or, as float32,
    another. A query that sees nothing (a position past all slots) gives zeros. isa, threads, RuntimeError: as
    `products.linear`.
    """
    demand()
    more = [*(kept.scales or ()), *(x for x in (kept.slot, kept.table) if x is not None)]
    x = q if q.dtype == jnp.bfloat16 else q.astype(jnp.float32)
    call = jax.ffi.ffi_call(ATTENTION, jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    out = call(
        x, kept.k, kept.v, position, *more,
        scale=np.float32(rule.scale), cap=np.float32(rule.softcap or 0), window=np.int64(rule.window or 0),
        sinks=np.int64(rule.sinks), slots=kept.slot is not None, paged=kept.table is not None,
        isa=np.int32(BEST if isa is None else ISAS[isa]), threads=np.int32(threads or 0),
    )  # fmt: skip
    return out.astype(q.dtype)


class Keeper(Protocol):
    """A pytree that says how its keys and values lie."""

    @property
    def kept(self) -> Kept | None: ...


KERNELS = {"cpu": attend, "cuda": gpu.attention.attend}  # by the platform of the programs that have them


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def attended(
    plain: Callable[..., jax.Array], platform: str, rule: Rule, q: jax.Array, position: jax.Array, keeper: Any
) -> jax.Array:
    """The kernel in programs for its platform, `plain(q, position, keeper)` in all others, and in all derivatives."""

    def kernel(q: jax.Array, position: jax.Array, keeper: Keeper) -> jax.Array:
        assert keeper.kept is not None
        return KERNELS[platform](q, position, keeper.kept, rule).astype(q.dtype)

    return jax.lax.platform_dependent(q, position, keeper, default=plain, **{platform: kernel})


@attended.defjvp
def _tangent(plain: Callable[..., jax.Array], platform: str, rule: Rule, primals: Any, tangents: Any) -> Any:
    return attended(plain, platform, rule, *primals), jax.jvp(plain, primals, tangents)[1]


def crowds(q: jax.Array, kept: Kept) -> bool:
    """Whether tiles for bfloat16 could look with more than FEW such queries a row too."""
    return q.dtype == kept.dtype == jnp.bfloat16 and kept.scales is None


def unknown(kept: Kept) -> str | None:
    """Why the CPU kernel cannot look at such arrays, or None if it can."""
    if kept.table is not None and kept.k.shape[3] % FOUR:
        return f"it reads no pages of {kept.k.shape[3]} slots, but of a multiple of {FOUR}"
    known = ("float32", "bfloat16", "uint16") if kept.scales is None else ("int8",)
    return None if kept.v.dtype == kept.k.dtype and kept.k.dtype in known else f"it reads no caches of {kept.k.dtype}"
