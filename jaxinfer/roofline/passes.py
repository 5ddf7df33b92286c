"""What one pass of T new tokens a row computes and moves. Decoding is a pass with one, verifying with J + 1."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.roofline.keeping import CacheKind, kept, kind_of, layer_bytes, slots, written_bytes
from jaxinfer.roofline.sizes import itemsize, product_params, read_bytes


def matmul_flops(m: int, k: int, n: int) -> int:
    """FLOPs of [m, k] times [k, n]; a multiply and an add are two."""
    return 2 * m * k * n


def matmul_bytes(m: int, k: int, n: int, size: float = 2) -> float:
    """Bytes of [m, k] times [k, n], both read and the result written; `size`: of a number."""
    return (m * k + k * n + m * n) * size


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def forward_flops(
    config: ModelConfig,
    num: int,
    lengths: Sequence[int],
    scored: int | None = None,
    cache: CacheKind | str = "dense",
    causal: bool = True,
    seq: int = 1,
) -> int:
    """FLOPs of the products of a pass: `num` (T) new tokens in each row, which held `lengths` [B] before.

    Every matrix 2 a parameter and token, logits for the last `scored` tokens of each row (default: all), and attention
    over what is seen (`attention_flops`), of which one of `seq` equal parts is counted.
    """
    B, kind = len(lengths), kind_of(cache)
    logits = matmul_flops(B * (num if scored is None else scored), config.width, config.padded_vocab)
    matrices = sum(2 * B * num * product_params(config, spec) for spec in config.layers)
    seen = sum(count * attention_flops(spec, num, held(kind, n), causal) for spec, n, count in cells(config, lengths))
    return logits + matrices + -(-seen // seq)


def cells(config: ModelConfig, lengths: Sequence[int]) -> list[tuple[LayerSpec, int, int]]:
    """Every layer with every row's length, and how many pairs of them are such: equal ones are worked out once."""
    layers, rows = Counter(config.layers), Counter(lengths)
    return [(spec, n, layers[spec] * rows[n]) for spec in layers for n in rows]


def attention_flops(spec: LayerSpec, num: int, length: int, causal: bool = True) -> int:
    """FLOPs of one layer's scores and weighted values for one row: 4 N H a pair of query and position (`pairs`)."""
    return 4 * spec.num_heads * spec.head_width * pairs(spec, num, length, causal)


def pairs(spec: LayerSpec, num: int, length: int, causal: bool = True) -> int:
    """How many pairs there are of a new token and a position that it sees, `num` tokens after `length` others.

    causal: a token sees itself, the ones before, and of them no more than the window; False: every token meets every
    position, which is what a plain product computes and a mask then hides.
    """
    if not causal:
        return num * (length + num)
    if spec.window is None:
        return num * length + num * (num + 1) // 2
    rising = max(0, min(num, spec.window - length))  # queries whose window is not yet full
    return rising * length + rising * (rising + 1) // 2 + (num - rising) * spec.window


def visible(spec: LayerSpec, length: int) -> int:
    """How many of `length` tokens the newest one sees."""
    return length if spec.window is None else min(length, spec.window)


def held(kind: CacheKind, length: int) -> int:
    """How many of a row's tokens are there to be seen."""
    return length if kind.budget is None else min(length, kind.budget)


# --- bytes ---------------------------------------------------------------------------------------------------------


def forward_bytes(
    config: ModelConfig,
    num: int,
    lengths: Sequence[int],
    weights=None,
    cache: CacheKind | str = "dense",
    windowed: bool = True,
    seq: int = 1,
) -> int:
    """Bytes that a pass must read and write: `num` (T) new tokens in each row, which held `lengths` [B] before.

    Every weight once (`weights`: a dtype or `Packed`; of an embedding that is not also the head the tokens' own
    vectors), the keys and values that the new tokens see, in whole pages, and the new ones written. Of the positions
    one of `seq` equal parts is read. windowed: a layer with a window reads no more than that; False for an attention
    that goes over the whole length all the same, as a plain product over a dense cache does.
    """
    kind = kind_of(cache)
    plain = itemsize(kind.dtype or config.dtype)
    seen = written = 0.0
    for spec, n, count in cells(config, lengths):
        newest = slots(kind, n, past(spec, kind, n, windowed))
        seen += count * layer_bytes(spec, kind, held(kind, n), newest, plain)
        written += count * written_bytes(spec, kind, num, n, plain)
    return round(read_bytes(config, num * len(lengths), weights) + seen / seq + written)


def past(spec: LayerSpec, kind: CacheKind, length: int, windowed: bool = True) -> int:
    """How many of a row's `length` tokens its next one reads in one layer: itself it does not read."""
    count = kept(spec, kind, length)
    return min(count, spec.window - 1) if windowed and spec.window is not None else count


# --- one decode step -----------------------------------------------------------------------------------------------


def decode_bytes(
    config: ModelConfig,
    rows: int,
    length: int | Sequence[int],
    dtype=None,
    cache_dtype=None,
    windowed: bool = True,
    cache: CacheKind | str = "dense",
) -> int:
    """`forward_bytes` of one token for `rows` rows that hold `length` tokens each (an int, or one a row).

    cache_dtype: of what a kind of cache keeps in plain numbers.

    For what a program over a preallocated cache reads without regard to what is valid, give its size as the length.
    """
    kind = dataclasses.replace(kind_of(cache), dtype=cache_dtype)
    return forward_bytes(config, 1, spread(rows, length), dtype, kind, windowed)


def decode_flops(config: ModelConfig, rows: int, length: int | Sequence[int]) -> int:
    """`forward_flops` of one token for `rows` rows that hold `length` tokens each: it sees these and itself."""
    return forward_flops(config, 1, spread(rows, length))


def spread(rows: int, length: int | Sequence[int]) -> list[int]:
    """One length a row. ValueError where there are more or fewer."""
    lengths = [length] * rows if isinstance(length, int) else list(length)
    if len(lengths) != rows:
        raise ValueError(f"length has {len(lengths)} entries but there are {rows} rows: give one number, or one a row")
    return lengths
