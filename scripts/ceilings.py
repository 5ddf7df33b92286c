"""What this machine can do, measured: the ceilings that every result is a share of.

    limits = ceilings.measure()  # prints them
    limits.reached("read", line["gb_per_second"], "attention over int8")
    line["share"] = limits.share("read", line["gb_per_second"])

A ceiling is the most that anything reached: a program that is faster raises it, so no share is above 1. (One whose
arrays stay in the processor's caches may be faster than memory: take models and shapes that are larger than those.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import measured
from screen import size

READ = 2 * 10**9  # bytes
PASSES = 20
PRODUCTS = ("float32", "bfloat16", "int8")
PLAIN = ("float32", "bfloat16", "float16")  # what is no codes
CPU, LARGE = (512, 2048, 8192), (8192, 8192, 8192)  # rows, inputs, outputs
ROUNDS = 5


@dataclasses.dataclass
class Ceiling:
    """The most that was reached, in 1e9 bytes or FLOPs a second."""

    rate: float
    by: str
    measured: float  # before the programs that are judged by it ran


@dataclasses.dataclass
class Ceilings:
    """Of "read" (GB/s of memory) and of products in each dtype (GFLOP/s)."""

    of: dict[str, Ceiling]
    bytes_read: int

    def reached(self, name: str, rate: float, by: str) -> None:
        """A program reached so much; where it is more, the ceiling is that."""
        if rate > self.of[name].rate:
            self.of[name] = dataclasses.replace(self.of[name], rate=rate, by=by)

    def share(self, name: str, rate: float) -> float:
        """Of a ceiling as it is by now."""
        return rate / self.of[name].rate

    def chip(self, math: str) -> Any:
        """This machine as `roofline` takes a chip, whose products are in `math`."""
        from jaxinfer import kernels, roofline

        return roofline.Chip(self.of[math].rate * 1e9, self.of["read"].rate * 1e9, kernels.free_memory() or 0)

    def show_raised(self) -> None:
        """Prints a line for each ceiling that a program raised."""
        for name, ceiling in self.of.items():
            if ceiling.rate > ceiling.measured:
                print(
                    f"ceiling: {name} raised from {ceiling.measured:.1f} to {ceiling.rate:.1f} {unit(name)} by "
                    f"{ceiling.by}; in the JSON all shares are of that"
                )

    def told(self) -> dict[str, Any]:
        """For the JSON."""
        told = {name: dataclasses.asdict(ceiling) | {"unit": unit(name)} for name, ceiling in self.of.items()}
        read = told.pop("read") | {"bytes": self.bytes_read, "passes": PASSES}
        return {"read": read, "products": told, "product_shape": list(shape())}


def measure(products: Sequence[str] = PRODUCTS) -> Ceilings:
    """What this machine reads and, in each of these dtypes, multiplies in a second. Prints a line for each."""
    found = {}
    reads = measured.reads(room())
    moved = reads.moved
    found["read"] = show("read", best(moved, reads.ways, PASSES))
    del reads  # and the memory with it
    for dtype in products:
        found[dtype] = show(dtype, best(*programs(dtype), ROUNDS))
    return Ceilings(found, moved)


def room() -> int:
    """How many bytes to read: half of what is free, where that is less."""
    from jaxinfer import kernels

    free = kernels.free_memory()
    if free is None or free >= 2 * READ:
        return READ
    print(f"ceiling: reading {size(free // 2)}, not {size(READ)}, as {size(free)} of memory are free")
    return free // 2


def best(amount: float, ways: dict[str, Callable[[], object]], rounds: int) -> Ceiling:
    """The fastest round of the fastest way to do so many bytes or FLOPs."""
    took = {name: min(times) for name, times in measured.seconds(ways, rounds).items()}
    by = min(took, key=lambda name: took[name])
    rate = amount / took[by] / 1e9
    return Ceiling(rate, by, rate)


def show(name: str, ceiling: Ceiling) -> Ceiling:
    """Prints it."""
    what = "read" if name == "read" else f"products in {name}"
    print(f"ceiling: {what} {ceiling.rate:.1f} {unit(name)} ({ceiling.by})", flush=True)
    return ceiling


def unit(name: str) -> str:
    """Of a ceiling."""
    return "GB/s" if name == "read" else "GFLOP/s"


# --- products ------------------------------------------------------------------------------------------------------


def shape() -> tuple[int, int, int]:
    """Rows, inputs and outputs of a product that is large here."""
    import jax

    return CPU if jax.default_backend() == "cpu" else LARGE


def programs(dtype: str) -> tuple[float, dict[str, Callable[[], object]]]:
    """FLOPs of a large product in a dtype, and every program of ours that makes it.

    In int8 a CPU multiplies rows that it first rounds (`int8:dynamic`); elsewhere XLA multiplies codes with codes.
    """
    import jax
    import jax.numpy as jnp

    rows, inner, outer = shape()
    flops = 2 * rows * inner * outer
    if jax.default_backend() != "cpu" and dtype == "int8":
        x, w = jnp.ones((rows, inner), jnp.int8), jnp.ones((outer, inner), jnp.int8)
        codes = jax.jit(functools.partial(jnp.einsum, "BD,FD->BF", preferred_element_type=jnp.int32))
        return flops, {"xla": functools.partial(codes, x, w)}
    form = "int8:dynamic" if dtype == "int8" else dtype
    x = jax.random.normal(jax.random.key(0), (rows, inner), rows_of(form))
    w = weight(jax.random.key(1), outer, inner, form)
    names = {"kernel": "auto", "xla": "reference"} if jax.default_backend() == "cpu" else {"xla": "reference"}
    program = jax.jit(multiply, static_argnames="kernel")
    return flops, {name: functools.partial(program, x, w, kernel=kernel) for name, kernel in names.items()}


def rows_of(form: str) -> str:
    """The dtype of rows that meet weights in a form: bfloat16 meets bfloat16, and float32 all others."""
    return form if form in PLAIN else "float32"


def weight(key: Any, outer: int, inner: int, form: str) -> Any:
    """A weight [outer, inner] in a dtype or as codes."""
    import jax

    from jaxinfer.models import quantize_one
    from jaxinfer.quantization import parse_form

    if form in PLAIN:
        return jax.random.normal(key, (outer, inner), form)
    return quantize_one("up", jax.random.normal(key, (outer, inner)), parse_form(form), tied=False)


def multiply(x: Any, w: Any, kernel: str) -> Any:
    """x [B, D] times w [F, D] transposed, by a kernel or by XLA ("reference")."""
    import jax.numpy as jnp

    from jaxinfer import kernels, ops

    with kernels.use(kernels.KernelChoice(linear=kernel)):
        return ops.linear(x, w, "BD,FD->BF", dtype=jnp.float32)


def math_of(form: str | None, dtype: str) -> str:
    """The dtype whose products bound a program: rows of `dtype` with weights in `form`, or (None) as they are.

    A CPU widens codes to float32, or for many rows of bfloat16, where it has tiles for these, to it; where rows are
    rounded too, codes meet codes, and so they do in tiles where rows of float32 become digits.
    """
    import jax

    from jaxinfer.kernels import native
    from jaxinfer.quantization import parse_form

    if form is None or form in PLAIN or jax.default_backend() != "cpu":
        return dtype
    if parse_form(form).dynamic:
        return "int8"
    if native.best() != "amx":
        return "float32"
    return dtype if dtype == "bfloat16" else "int8" if form == "int8" else "float32"
