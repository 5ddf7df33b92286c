"""Which kernels are used: one small choice, ambient, that every traced program depends on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.kernels import attention, gpu, native, products
from jaxinfer.kernels.kept import Kept

KERNELS = {"linear": ("auto", "cpu", "gpu", "reference"), "attention": ("auto", "cpu", "gpu", "reference")}
Array = jax.Array


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """Which kernel each operation takes; `reference` is the plain form of `ops`, which XLA compiles.

    "auto" is the kernel for the platform at hand: on the CPU, where it can be built (otherwise one line says why it
    cannot), and on NVIDIA GPUs. "cpu" and "gpu" insist on that one, and a program that would not have it is an error
    (but for products of several rows, which no kernel of ours makes on a GPU). In programs for other platforms than the
    kernel's all are the plain form.

    linear: products with weights; "gpu", of a lone row in bfloat16 or float16 with weights in the same, together with
    the norm before and what is added after. attention: "cpu", of up to `attention.FEW` queries a row to a cache in
    float32, bfloat16 or int8 (of more the plain form makes products, unless the processor has tiles for bfloat16);
    "gpu", of any number to one of these or float16, in pages too.
    """

    linear: str = "auto"
    attention: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = getattr(self, field.name)
            if name not in KERNELS[field.name]:
                known = ", ".join(KERNELS[field.name])
                raise ValueError(f"{field.name}={name!r} names no kernel: the choices are {known}")

    def product(self, x: Array, *w: Array) -> Callable[..., Array] | None:
        """The kernel that multiplies x [M, I] with w [O, I], called as (twin, dynamic, x, *w); None: the plain twin.

        w may be codes and their scales, see `products.linear`. Only shapes and dtypes are looked at. RuntimeError
        where linear="cpu" cannot be kept.
        """
        reason, remedy = unknown(x, *w), "use float32 or bfloat16 for both"
        return products.product if self.taken("linear", "cpu", reason, remedy, x, *w) else None

    def readable(self, x: Array, codes: Array, dynamic: bool) -> Array:
        """x [M, I] as `product` takes it beside codes: float32, or bfloat16 as it is where AMX multiplies it with them.

        It does where there are more rows than LONE: fewer are sooner multiplied otherwise.
        """
        lone = products.LONE.get((codes.dtype.name, dynamic))
        many = x.dtype == jnp.bfloat16 and lone is not None and len(x) > lone
        return x if many and self.tiled("linear") else x.astype(jnp.float32)

    def gates(self, x: Array, *weights: Array) -> Callable[..., Array] | None:
        """The kernel that makes activation(x gate) * (x up), called as (twin, activation, x [M, I], gate, up [O, I]).

        It is AMX's, of bfloat16. None: two products and what XLA makes of them.
        """
        if not all(a.dtype == jnp.bfloat16 for a in (x, *weights)) or not self.tiled("linear"):
            return None
        return products.opened if self.taken("linear", "cpu", None, "", x, *weights) else None

    def projects(self, x: Array, *weights: Array) -> bool:
        """Whether the GPU's kernel multiplies rows x [M, I] with weights [O, I], and does what stands around that.

        Only shapes and dtypes are looked at. RuntimeError where linear="gpu" cannot be kept for a lone row of a layer.
        """
        if len(x) != 1 or max(map(len, weights)) > gpu.products.MOST:
            return False
        remedy = "use bfloat16 or float16 for both"
        return self.taken("linear", "gpu", gpu.products.unknown(x, *weights), remedy, x, *weights)

    def attends(self, q: Array, kept: Kept) -> str | None:
        """The platform whose kernel is to look with q [B, T, N, H] at what is kept, on each device of a mesh, or None.

        It is a name that `attention.attended` knows. Only shapes and dtypes are looked at. RuntimeError where
        attention="cpu" or "gpu" cannot be kept.
        """
        remedy = "use a cache of float32, bfloat16 or int8"
        suits = q.shape[1] <= attention.FEW or (attention.crowds(q, kept) and self.tiled("attention"))
        if suits and self.taken("attention", "cpu", attention.unknown(kept), remedy, q, kept.k):
            return "cpu"
        return "cuda" if self.taken("attention", "gpu", gpu.attention.unknown(q, kept), remedy, q, kept.k) else None

    def asks(self, field: str, kernel: str) -> bool:
        """Whether that kernel is asked for: by name, or as that of the platform at hand."""
        name = getattr(self, field)
        return name == kernel or (name == "auto" and device().platform == kernel)

    def tiled(self, field: str) -> bool:
        """Whether the CPU's kernel is asked for, and has tiles for bfloat16."""
        return self.asks(field, "cpu") and native.best() == "amx"

    def taken(self, field: str, kernel: str, reason: str | None, remedy: str, *arrays: Array) -> bool:
        """Whether that kernel is; `reason` says why these arrays are not for it. RuntimeError where it must be."""
        if not self.asks(field, kernel):
            return False
        if reason is None and (varying(*arrays) if field == "attention" else partitioned(*arrays)):
            reason, remedy = "a mesh is set, and XLA cannot split a kernel", "use it in shard_map(check_vma=False)"
        if reason is None and kernel == "cpu":
            reason, remedy = native.unavailable(), "install g++ or clang++"
        if reason is None and kernel == "gpu":
            reason, remedy = gpu.unavailable(device()), "run it on an NVIDIA GPU of compute capability 8.0 or more"
        if reason is not None and getattr(self, field) == kernel:
            raise RuntimeError(f"{field}={kernel!r} is not to be had: {reason}: {remedy}, or choose {field}='auto'")
        return reason is None


def device() -> Any:
    """What programs here are for: the first device there is, or one that is compiled for without being there."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def unknown(x: Array, w: Array, scale: Array | None = None) -> str | None:
    """Why the CPU kernel cannot multiply such arrays, or None if it can."""
    if scale is None:
        known = x.dtype == w.dtype and w.dtype in (jnp.float32, jnp.bfloat16)
    else:
        known = x.dtype in (jnp.float32, jnp.bfloat16)
        known = known and (w.dtype, scale.dtype) in ((jnp.int8, jnp.float32), (jnp.uint8, jnp.float16))
        known = known and (scale.ndim == 1 or x.shape[1] % (scale.shape[1] * products.UNIT) == 0)
    return None if known else f"it multiplies no {x.dtype} with {w.dtype}"


def partitioned(*arrays: Array) -> bool:
    """Whether these lie on a mesh in a way that a kernel knows nothing of.

    XLA may yet split them; or they are a device's part, and of a type that says along which axes it differs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    return not mesh.are_all_axes_manual or varying(*arrays)


def varying(*arrays: Array) -> bool:
    """Whether these are a device's part, and of a type that says along which axes it differs."""
    return any(jax.typeof(a).manual_axis_type.varying for a in arrays)


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
