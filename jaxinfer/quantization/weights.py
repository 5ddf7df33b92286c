"""Weights in codes of eight or four bits, rounded to the nearest, that are multiplied as codes.

A leaf of the params may be one of these instead of an array. It has the letters of the weight, and no program that
multiplies with it writes its numbers out: a kernel or XLA widens them on the way, or a block at a time.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import kernels, mesh
from jaxinfer.quantization.codes import divisor

BLOCK = 1 << 18  # numbers that XLA:CPU widens at a time
FEW = 16  # rows of x for which a GPU widens a weight as it reads it: on an H200 1.00 (1 row) to 1.05 (8) of its bytes
UNIT = kernels.UNIT


@dataclasses.dataclass(frozen=True)
class Form:
    """In how many bits, and of four how many neighbours share a scale."""

    bits: int
    group: int = 32
    dynamic: bool = False  # what they are multiplied with is rounded to eight bits too

    @property
    def name(self) -> str:
        """As `parse_form` reads it."""
        options = [f"group={self.group}"] * (self.bits == 4) + ["dynamic"] * self.dynamic
        return f"int{self.bits}" + ":" * bool(options) + ",".join(options)


def parse_form(text: str) -> Form:
    """ "int8", "int4" or "int4:group=G", each with ":dynamic" or ",dynamic"; ValueError for anything else."""
    kind, *options = text.replace(":", ",", 1).split(",")
    dynamic = options[-1:] == ["dynamic"]
    options = options[: len(options) - dynamic]
    if kind == "int8" and not options:
        return Form(8, dynamic=dynamic)
    name, _, value = options[0].partition("=") if options else ("group", "=", "32")
    if kind == "int4" and len(options) < 2 and name == "group" and value.isdecimal():
        group = int(value)
        if group < 2 or group % 2:
            raise ValueError(f"{text}: a group of {group} codes is not to be had: take an even number, 32 say")
        return Form(4, group, dynamic)
    raise ValueError(
        f"weights cannot be quantized to {text!r}: take int8, int4 or int4:group=G, and add :dynamic (or ,dynamic) to "
        "round activations too"
    )


class Weight(mesh.Parts):
    """A weight [*out, *in] in codes: a frozen struct of arrays whose first axes are those of the weight."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""

    @abc.abstractmethod
    def matrix(self, outer: int) -> Weight:
        """As [O, I], O being the first `outer` axes."""

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """The weight, nearly, in float32."""

    @property
    @abc.abstractmethod
    def arrays(self) -> tuple[jax.Array, ...]:
        """The codes, and what scales them."""

    @staticmethod
    @abc.abstractmethod
    def plain(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        """x [M, I] times a matrix [O, I] of such arrays, transposed: [M, O] float32. What kernels are compared with."""

    dynamic: bool = False  # x is rounded to eight bits before it is multiplied

    def multiply(self, x: jax.Array) -> jax.Array:
        """x [M, I] times this matrix [O, I] transposed: [M, O] float32."""
        twin, choice = self.rounding if self.dynamic else self.plain, kernels.choice()
        read = choice.readable(x, self.arrays[0], self.dynamic)
        kernel = choice.product(read, *self.arrays)
        return kernel(twin, self.dynamic, read, *self.arrays) if kernel else twin(x, *self.arrays)

    @classmethod
    def rounding(cls, x: jax.Array, *arrays: jax.Array) -> jax.Array:
        """`plain` of x as its codes say it."""
        return cls.plain(rounded(x), *arrays)

    def rows(self, ids: jax.Array) -> jax.Array:
        """The rows [..., D] of a weight [V, D], in float32; NaN where there is none."""
        raise NotImplementedError(f"{type(self).__name__} has no rows to look up")


@struct.dataclass
class Int8(Weight):
    """Eight bits a number, one float32 scale an output: off by at most scale / 2."""

    codes: jax.Array  # [*out, *in] int8
    scale: jax.Array  # [*out] float32
    dynamic: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, w: jax.Array, outer: int, dynamic: bool = False) -> Int8:
        """The codes of a weight whose first `outer` axes are its outputs."""
        axes = tuple(range(outer, w.ndim))
        w = w.astype(jnp.float32)
        scale = jnp.abs(w).max(axes) / 127
        step = jnp.where(scale > 0, scale, 1).reshape(*scale.shape, *(1,) * len(axes))
        return cls(jnp.round(w / step).astype(jnp.int8), scale, dynamic)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight`."""
        return self.codes.shape

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """See `Weight`."""
        return self.codes, self.scale

    def letters(self, word: str) -> Int8:
        """See `Parts`."""
        return Int8(word, word[: self.scale.ndim], self.dynamic)  # type: ignore[arg-type]

    def matrix(self, outer: int) -> Int8:
        """See `Weight`."""
        return Int8(self.codes.reshape(math.prod(self.shape[:outer]), -1), self.scale.reshape(-1), self.dynamic)

    def decode(self) -> jax.Array:
        """See `Weight`."""
        return self.codes * self.scale.reshape(*self.scale.shape, *(1,) * (self.codes.ndim - self.scale.ndim))

    def rows(self, ids: jax.Array) -> jax.Array:
        """See `Weight`."""
        take = functools.partial(dict, mode="fill", wrap_negative_indices=False)
        codes = self.codes.at[ids].get(**take(fill_value=0))
        return codes * self.scale.at[ids].get(**take(fill_value=jnp.nan))[..., None]

    @staticmethod
    def plain(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        """See `Weight`."""

        def whole(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
            return dot(x, codes.astype(x.dtype)) * scale

        return jax.lax.platform_dependent(x, *arrays, cpu=by_blocks(whole), default=whole)


@struct.dataclass
class Int4(Weight):
    """Four bits a number, symmetric, a float16 scale a group of neighbours along the last axis.

    A code c stands for (c - 8) * scale; the scale is such that the number furthest from zero is -8 of it (Q4_0 of
    GGUF). Off by at most scale / 2, by a scale at the other end. codes are int4 (c - 8), where a machine reads these
    well; or two to a byte, UNIT (or a group, if that is smaller) of them together, the first half in the low bits.
    """

    codes: jax.Array  # [*out, *in] int4, or [*out, *in / 2] uint8
    scale: jax.Array  # [*out, *in / group] float16
    dynamic: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, w: jax.Array, group: int, packed: bool, dynamic: bool = False) -> Int4:
        """The codes of a weight, whose last axis `group` divides."""
        groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, group)
        furthest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(-1, keepdims=True), -1)[..., 0]
        scale = (furthest / -8).astype(jnp.float16)
        step = jnp.where(scale != 0, scale, 1).astype(jnp.float32)[..., None]
        codes = jnp.clip(jnp.round(groups / step), -8, 7).astype(jnp.int8).reshape(w.shape)
        return cls(pack(codes, unit(group)) if packed else codes.astype(jnp.int4), scale, dynamic)

    @property
    def packed(self) -> bool:
        """Whether two codes lie in a byte."""
        return self.codes.dtype == jnp.uint8

    @property
    def group(self) -> int:
        """How many codes share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    def repacked(self, packed: bool) -> Int4:
        """The same, with its codes two to a byte or in an array of their own."""
        if packed == self.packed:
            return self
        codes = pack(self.codes, unit(self.group)) if packed else unpack(self.codes, unit(self.group)).astype(jnp.int4)
        return Int4(codes, self.scale, self.dynamic)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Weight`."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (2 if self.packed else 1))

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """See `Weight`."""
        return self.codes, self.scale

    def letters(self, word: str) -> Int4:
        """See `Parts`."""
        return Int4(word, word, self.dynamic)  # type: ignore[arg-type]

    def matrix(self, outer: int) -> Int4:
        """See `Weight`."""
        num = math.prod(self.shape[:outer])
        return Int4(self.codes.reshape(num, -1), self.scale.reshape(num, -1), self.dynamic)

    def decode(self) -> jax.Array:
        """See `Weight`."""
        return widened(self.codes, self.scale).reshape(self.shape)

    @staticmethod
    def plain(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        """See `Weight`. For few rows a product and a sum, which XLA does in one kernel that reads codes and scales."""

        def whole(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
            w = widened(codes, scale)  # [O, groups, group]
            if len(x) <= FEW:
                return (x.astype(jnp.float32).reshape(len(x), 1, *w.shape[1:]) * w).sum((2, 3))
            return dot(x, w.reshape(len(w), -1).astype(x.dtype))

        def block(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
            return dot(x.astype(jnp.float32), widened(codes, scale).reshape(len(codes), -1))

        return jax.lax.platform_dependent(x, *arrays, cpu=by_blocks(block), default=whole)


def rounded(x: jax.Array) -> jax.Array:
    """x [M, I] as the nearest codes of eight bits say it, BLOCK neighbours to a scale; NaN where a block has one."""
    inner = x.shape[1]
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -inner % kernels.BLOCK))).reshape(len(x), -1, kernels.BLOCK)
    most = jnp.where(jnp.isnan(wide).any(-1, keepdims=True), jnp.nan, jnp.abs(wide).max(-1, keepdims=True))
    scale = most / 127
    inverse = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, 1 / scale, 0)
    said = jnp.where(inverse > 0, jnp.round(wide * inverse) * scale, jnp.where(jnp.isfinite(scale), 0, scale))
    return said.reshape(len(x), -1)[:, :inner].astype(x.dtype)


def unit(group: int) -> int:
    """How many codes of four bits are packed together."""
    return UNIT if group % UNIT == 0 else group


def pack(codes: jax.Array, unit: int) -> jax.Array:
    """Codes [..., n] of -8 to 7 as [..., n / 2] uint8."""
    low, high = jnp.split((codes.astype(jnp.int8) + 8).astype(jnp.uint8).reshape(*codes.shape[:-1], -1, unit), 2, -1)
    return (low | high << 4).reshape(*codes.shape[:-1], -1)


def unpack(codes: jax.Array, unit: int) -> jax.Array:
    """What `pack` was given."""
    pairs = codes.reshape(*codes.shape[:-1], -1, unit // 2)
    both = jnp.concatenate([pairs & 15, pairs >> 4], -1).astype(jnp.int8) - 8
    return both.reshape(*codes.shape[:-1], -1)


def widened(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """The numbers [..., groups, group] of codes of four bits, in float32."""
    numbers = codes.shape[-1] * (2 if codes.dtype == jnp.uint8 else 1)
    codes = unpack(codes, unit(numbers // scale.shape[-1])) if codes.dtype == jnp.uint8 else codes
    return codes.reshape(*scale.shape, -1).astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, I] times w [O, I] transposed, summed in float32, and multiplied in it where both sides are.

    A lone row is multiplied as two: XLA gives a row the same bits beside any others, but not alone.
    """
    rows = jnp.concatenate([x, x]) if len(x) == 1 else x
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("MI,OI->MO", rows, w, preferred_element_type=jnp.float32, precision=exact)[: len(x)]


def by_blocks(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A product (x, codes [O, ...], scale [O, ...]) made for some outputs at a time: XLA:CPU writes what it widens."""

    def blocks(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        num = len(codes)
        many = divisor(num, max(BLOCK // x.shape[1], 1)) if num and x.shape[1] else 1
        parts: Any = (a.reshape(num // many, many, *a.shape[1:]) for a in (codes, scale))
        y = jax.lax.map(lambda part: product(x, *part), tuple(parts))  # [O / many, M, many]
        return y.transpose(1, 0, 2).reshape(len(x), num)

    return blocks
