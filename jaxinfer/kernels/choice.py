"""Which kernels are used: one small choice, ambient, that every traced program depends on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxinfer.kernels import cpu

LINEAR = ("auto", "cpu", "reference")
Array = jax.Array


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """Which kernel each operation takes; `reference` is the plain product of `ops`, which XLA compiles.

    linear: "auto" is the CPU kernel where the default backend is the CPU and the kernel can be built (otherwise one
    line says why it cannot); "cpu" insists on it, and a program that would not have it is an error; "reference" is
    XLA's product. In programs for other platforms all three are XLA's product.
    """

    linear: str = "auto"

    def __post_init__(self) -> None:
        if self.linear not in LINEAR:
            raise ValueError(f"linear={self.linear!r} names no kernel: the choices are {', '.join(LINEAR)}")

    def product(self, x: Array, *w: Array) -> Callable[..., Array] | None:
        """The kernel that multiplies x [M, I] with w [O, I], called as (twin, dynamic, x, *w); None: the plain twin.

        w may be codes and their scales, see `cpu.linear`. Only shapes and dtypes are looked at. RuntimeError where
        linear="cpu" cannot be kept.
        """
        if self.linear == "reference" or (self.linear == "auto" and jax.default_backend() != "cpu"):
            return None
        reason, remedy = unknown(x, *w), "use float32 or bfloat16 for both"
        if reason is None and partitioned(x, *w):
            reason, remedy = "a mesh is set, and XLA cannot split a kernel", "use it in shard_map(check_vma=False)"
        if reason is None:
            reason, remedy = cpu.unavailable(), "install g++ or clang++"
        if reason is None:
            return cpu.product
        if self.linear == "cpu":
            raise RuntimeError(f"linear='cpu' is not to be had: {reason}: {remedy}, or choose linear='auto'")
        return None


def unknown(x: Array, w: Array, scale: Array | None = None) -> str | None:
    """Why the CPU kernel cannot multiply such arrays, or None if it can."""
    if scale is None:
        known = x.dtype == w.dtype and w.dtype in (jnp.float32, jnp.bfloat16)
    elif w.dtype == jnp.int8:
        known = x.dtype == scale.dtype == jnp.float32
    else:
        known = (x.dtype, w.dtype, scale.dtype) == (jnp.float32, jnp.uint8, jnp.float16)
        known = known and x.shape[1] % (scale.shape[1] * cpu.UNIT) == 0
    return None if known else f"it multiplies no {x.dtype} with {w.dtype}"


def partitioned(*arrays: Array) -> bool:
    """Whether these lie on a mesh in a way that a kernel knows nothing of.

    XLA may yet split them; or they are a device's part, and of a type that says along which axes it differs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    return not mesh.are_all_axes_manual or any(jax.typeof(a).manual_axis_type.varying for a in arrays)


# JAX keeps it in the key of its caches: a jitted function is traced anew under another choice.
_ambient = jax.make_user_context(default_value=KernelChoice())


def choice() -> KernelChoice:
    """The choice in force here: that of the innermost `use`."""
    return _ambient.value


@contextlib.contextmanager
def use(choice: KernelChoice) -> Iterator[None]:
    """Programs traced inside take these kernels; one that was traced under another choice is traced anew."""
    with _ambient(choice):
        yield
