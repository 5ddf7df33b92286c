"""How vectors of numbers are kept: as they are, or as codes of few bits with their scales.

Codes are arrays whose first axes are those of what is kept, so that what moves, cuts or gathers along these treats all
arrays alike (`jax.tree.map`).
"""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from flax import struct

FLOAT8 = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(FLOAT8).max)  # 448
WIDEST = float(jnp.finfo(jnp.float16).max)


class Codes(abc.ABC):
    """Vectors of H numbers in some form. A form is a frozen struct of arrays [..., (units of) vectors, ...]."""

    tokens = 1  # vectors that are coded together

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """In which they are read."""

    @property
    def form(self) -> str:
        """What they are called: a dtype, in which they are kept."""
        return jax.tree.leaves(self)[0].dtype.name

    @abc.abstractmethod
    def encode(self, x: jax.Array) -> Codes:
        """x [..., H] in this form; [..., tokens, H] where several are coded together."""

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """What the codes say: what `encode` was given, nearly."""

    @property
    def flat(self) -> tuple[jax.Array, jax.Array | None] | None:
        """Numbers or codes [..., H], and what scales each vector of them, where that is all there is."""
        return None

    @abc.abstractmethod
    def letters(self, word: str) -> Codes:
        """The letters of the arrays, congruent with them; `word` are those of the first axes."""


@struct.dataclass
class Plain(Codes):
    """The numbers themselves."""

    x: jax.Array  # [..., H]

    @classmethod
    def empty(cls, shape: tuple[int, ...], H: int, dtype: jnp.dtype) -> Plain:
        """Zeros, never uninitialised memory (0 * NaN would reach a sum)."""
        return cls(jnp.zeros((*shape, H), dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """See `Codes`."""
        return self.x.dtype

    def encode(self, x: jax.Array) -> Plain:
        """See `Codes`."""
        return Plain(x.astype(self.x.dtype))

    def decode(self) -> jax.Array:
        """See `Codes`."""
        return self.x

    @property
    def flat(self) -> tuple[jax.Array, None]:
        """See `Codes`."""
        return self.x, None

    def letters(self, word: str) -> Plain:
        """See `Codes`."""
        return Plain(f"{word}H")  # type: ignore[arg-type]


@struct.dataclass
class Bits(Codes):
    """Numbers of bfloat16 by their bits: XLA:CPU before 0.11.2 rewrites a whole buffer of bfloat16 to write one."""

    bits: jax.Array  # [..., H] uint16

    @classmethod
    def empty(cls, shape: tuple[int, ...], H: int) -> Bits:
        """Zeros."""
        return cls(jnp.zeros((*shape, H), jnp.uint16))

    @property
    def dtype(self) -> jnp.dtype:
        """See `Codes`."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def form(self) -> str:
        """See `Codes`."""
        return "bfloat16"

    def encode(self, x: jax.Array) -> Bits:
        """See `Codes`."""
        return Bits(jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16))

    def decode(self) -> jax.Array:
        """See `Codes`."""
        return jax.lax.bitcast_convert_type(self.bits, jnp.bfloat16)

    @property
    def flat(self) -> tuple[jax.Array, None]:
        """See `Codes`."""
        return self.bits, None

    def letters(self, word: str) -> Bits:
        """See `Codes`."""
        return Bits(f"{word}H")  # type: ignore[arg-type]


@struct.dataclass
class Scaled(Codes):
    """Eight bits a number and one float32 scale a vector: int8 up to 127, or float8 (e4m3) up to 448, symmetric."""

    codes: jax.Array  # [..., H] int8, or uint8: the bits of a float8, which XLA:CPU cannot write in place
    scale: jax.Array  # [...] float32
    kind: str = struct.field(pytree_node=False, default="float32")  # the dtype in which they are read

    @classmethod
    def empty(cls, shape: tuple[int, ...], H: int, dtype: jnp.dtype, float8: bool = False) -> Scaled:
        """Zeros."""
        bits = jnp.uint8 if float8 else jnp.int8
        return cls(jnp.zeros((*shape, H), bits), jnp.zeros(shape, jnp.float32), jnp.dtype(dtype).name)

    @property
    def dtype(self) -> jnp.dtype:
        """See `Codes`."""
        return jnp.dtype(self.kind)

    @property
    def form(self) -> str:
        """See `Codes`."""
        return "float8" if self.codes.dtype == jnp.uint8 else "int8"

    @property
    def most(self) -> float:
        """The largest code."""
        return LARGEST if self.codes.dtype == jnp.uint8 else 127.0

    def encode(self, x: jax.Array) -> Scaled:
        """See `Codes`. Off by at most scale / 2 (int8), or by 1/16 of itself and a little (float8)."""
        x = x.astype(jnp.float32)
        scale = jnp.abs(x).max(-1) / self.most
        code = x / jnp.where(scale > 0, scale, 1)[..., None]
        if self.codes.dtype == jnp.uint8:
            bits = jax.lax.bitcast_convert_type(jnp.clip(code, -LARGEST, LARGEST).astype(FLOAT8), jnp.uint8)
        else:
            bits = jnp.clip(jnp.round(code), -127, 127).astype(jnp.int8)
        return Scaled(bits, scale, self.kind)

    def decode(self) -> jax.Array:
        """See `Codes`."""
        float8 = self.codes.dtype == jnp.uint8
        code = jax.lax.bitcast_convert_type(self.codes, FLOAT8) if float8 else self.codes
        return (code.astype(jnp.float32) * self.scale[..., None]).astype(self.kind)

    @property
    def flat(self) -> tuple[jax.Array, jax.Array]:
        """See `Codes`."""
        return self.codes, self.scale

    def letters(self, word: str) -> Scaled:
        """See `Codes`."""
        return Scaled(f"{word}H", word, self.kind)  # type: ignore[arg-type]


@struct.dataclass
class Grouped(Codes):
    """Four bits a number, a float16 scale and zero a group, asymmetric (KIVI, Liu et al. 2024, section 3).

    `tokens` vectors are coded together. by="channel": a group is one entry of all of them (of keys, whose outliers
    stay in their channels); by="token": `group` neighbouring entries of one (of values). Two codes to a byte, the
    vector t of the first half with t of the second.
    """

    codes: jax.Array  # [..., tokens / 2, H] uint8
    scale: jax.Array  # [..., 1, H] or [..., tokens, H / group] float16
    zero: jax.Array  # like scale: what code 0 stands for
    by: str = struct.field(pytree_node=False, default="channel")
    kind: str = struct.field(pytree_node=False, default="float32")

    @classmethod
    def empty(cls, shape: tuple[int, ...], H: int, dtype: jnp.dtype, tokens: int, by: str) -> Grouped:
        """Zeros. A group of values has as many entries as one of keys has tokens, or fewer, where these divide H."""
        scales = (*shape, 1, H) if by == "channel" else (*shape, tokens, H // divisor(H, tokens))
        zeros = jnp.zeros(scales, jnp.float16)
        return cls(jnp.zeros((*shape, tokens // 2, H), jnp.uint8), zeros, zeros, by, jnp.dtype(dtype).name)

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """See `Codes`."""
        return 2 * self.codes.shape[-2]

    @property
    def dtype(self) -> jnp.dtype:
        """See `Codes`."""
        return jnp.dtype(self.kind)

    @property
    def form(self) -> str:
        """See `Codes`."""
        return "int4"

    def grouped(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, H] with the entries of a group along the last axis of [..., scale's axes, group]."""
        if self.by == "channel":
            return x.swapaxes(-1, -2)[..., None, :, :]
        return x.reshape(*x.shape[:-1], self.scale.shape[-1], -1)

    def encode(self, x: jax.Array) -> Grouped:
        """x [..., tokens, H]. Off by at most scale / 2, and what a float16 scale and zero are off."""
        groups = self.grouped(x.astype(jnp.float32))
        low, high = groups.min(-1), groups.max(-1)
        zero = jnp.clip(low, -WIDEST, WIDEST).astype(jnp.float16)
        scale = jnp.clip((high - zero.astype(jnp.float32)) / 15, 0, WIDEST).astype(jnp.float16)
        step = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
        code = jnp.clip(jnp.round((groups - zero.astype(jnp.float32)[..., None]) / step), 0, 15).astype(jnp.uint8)
        code = code[..., 0, :, :].swapaxes(-1, -2) if self.by == "channel" else code.reshape(x.shape)
        low_bits, high_bits = jnp.split(code, 2, axis=-2)
        return Grouped(low_bits | high_bits << 4, scale, zero, self.by, self.kind)

    def decode(self) -> jax.Array:
        """See `Codes`: [..., tokens, H]."""
        code = jnp.concatenate([self.codes & 15, self.codes >> 4], -2)
        groups = self.grouped(code.astype(jnp.float32))
        x = groups * self.scale.astype(jnp.float32)[..., None] + self.zero.astype(jnp.float32)[..., None]
        x = x[..., 0, :, :].swapaxes(-1, -2) if self.by == "channel" else x.reshape(code.shape)
        return x.astype(self.kind)

    def letters(self, word: str) -> Grouped:
        """See `Codes`."""
        return Grouped(f"{word}_H", f"{word}_H", f"{word}_H", self.by, self.kind)  # type: ignore[arg-type]


def divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)
