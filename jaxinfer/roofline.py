"""What a step must read and compute, from the config alone, and how long no chip can be faster than.

Decoding reads every weight and every cached token once a step, so its limit is bytes over bandwidth (Pope et al. 2022,
"Efficiently Scaling Transformer Inference", section 2). Python numbers only: nothing here makes an array.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator: dense bfloat16 FLOP/s, bytes of memory, and bytes a second read from it."""

    flops: float
    bandwidth: float
    memory: float


# Makers' figures, dense (no structured sparsity). GPUs: NVIDIA's data sheets, SXM parts. TPUs: the table of chips in
# "How to Scale Your Model" (Austin et al. 2025).
CHIPS = {
    "A100 40GB": Chip(312e12, 1.555e12, 40e9),
    "A100": Chip(312e12, 2.039e12, 80e9),
    "H100": Chip(989e12, 3.35e12, 80e9),
    "H200": Chip(989e12, 4.8e12, 141e9),
    "B200": Chip(2250e12, 8e12, 180e9),
    "L4": Chip(121e12, 0.3e12, 24e9),
    "TPU v4": Chip(275e12, 1.2e12, 32e9),
    "TPU v5e": Chip(197e12, 0.82e12, 16e9),
    "TPU v5p": Chip(459e12, 2.8e12, 96e9),
    "TPU v6e": Chip(920e12, 1.6e12, 32e9),
}
ALIASES = {"v5 lite": "v5e", "v6 lite": "v6e"}  # jax says device_kind "TPU v5 lite", and "TPU v5" for a v5p


def chip(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind` ("NVIDIA H200", "TPU v5 lite"); None for one that is not in the table."""
    for said, meant in ALIASES.items():
        device_kind = device_kind.replace(said, meant)
    words = re.sub(r"TPU v5$", "TPU v5p", device_kind).replace("-", " ").split()
    found = [name for name in CHIPS if set(name.split()) <= set(words)]
    return CHIPS[max(found, key=len)] if found else None


# --- sizes -------------------------------------------------------------------------------------------------------


def itemsize(dtype) -> float:
    """Bytes of a number: 2 of "bfloat16" or jnp.bfloat16, 0.5 of "int4". ValueError where the name has no width."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    width = re.match(r"(?:float|bfloat|int|uint)(\d+)", name)
    if not width:
        raise ValueError(f"dtype {name!r} has no width: give one such as float32, bfloat16, float8_e4m3fn or int4")
    return int(width[1]) / 8


def params_count(config: ModelConfig) -> int:
    """How many parameters the model has; tied embeddings count once."""
    tables = config.vocab_size * config.width * (1 if config.tied else 2) + config.num_positions * config.width
    return tables + norm_params(config.norm, config.width) + sum(layer_params(config, spec) for spec in config.layers)


def layer_params(config: ModelConfig, spec: LayerSpec) -> int:
    """The parameters of one layer: products, biases, norms."""
    D, F, N, K, H = config.width, spec.ffn_width, spec.num_heads, spec.num_kv_heads, spec.head_width
    count = product_params(config, spec)
    count += (N + 2 * K) * H if spec.qkv_bias else 0
    count += D if spec.out_bias else 0
    count += (2 if spec.gated else 1) * F + D if spec.ffn_bias else 0
    widths = {"none": (), "head": (H, H), "projection": (N * H, K * H)}[spec.qk_norm]
    widths += (D, D) * (spec.pre_norm + spec.post_norm)
    return count + sum(norm_params(spec.norm, width) for width in widths)


def product_params(config: ModelConfig, spec: LayerSpec) -> int:
    """The parameters of one layer that a token is multiplied with: q, k, v, o, up, down and, where gated, gate."""
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_width
    return config.width * (attention + (3 if spec.gated else 2) * spec.ffn_width)


def norm_params(spec: NormSpec, width: int) -> int:
    """A norm's scale, and LayerNorm's bias."""
    return width * (2 if spec.kind == "layer" else 1)


def weight_bytes(config: ModelConfig, dtype=None) -> int:
    """Bytes of all parameters in `dtype` (by default the config's)."""
    return round(params_count(config) * itemsize(dtype or config.dtype))


def cache_bytes(config: ModelConfig, rows: int, size: int, dtype=None) -> int:
    """Bytes of the keys and values of a dense cache: rows (B) of `size` (S) tokens, in `dtype` (the config's)."""
    return round(rows * size * token_width(config) * itemsize(dtype or config.dtype))


def token_width(config: ModelConfig) -> int:
    """How many numbers all layers keep of one token."""
    return sum(2 * spec.num_kv_heads * spec.head_width for spec in config.layers)


# --- one decode step ---------------------------------------------------------------------------------------------


def decode_bytes(
    config: ModelConfig,
    rows: int,
    length: int | Sequence[int],
    dtype=None,
    cache_dtype=None,
    windowed: bool = True,
) -> int:
    """Bytes that one step must read and write for `rows` rows that hold `length` tokens each (an int, or one a row).

    Every weight once (of an embedding that is not also the head: the rows' own vectors), the keys and values that the
    rows see, and the new token's. Activations stay in the chip. windowed: a layer with a window reads W tokens; False
    for an attention that goes over the whole length all the same, as a plain product over a dense cache does.
    For what a program over a preallocated cache reads without regard to what is valid, give its size as the length.
    """
    lengths = [length] * rows if isinstance(length, int) else list(length)
    if len(lengths) != rows:
        raise ValueError(f"length has {len(lengths)} entries but there are {rows} rows: give one number, or one a row")
    table = 0 if config.tied else config.vocab_size * config.width
    unread = table + config.num_positions * config.width
    looked_up = rows * config.width * (1 + bool(config.num_positions))
    weights = (params_count(config) - unread + looked_up) * itemsize(dtype or config.dtype)
    seen = sum(
        2 * spec.num_kv_heads * spec.head_width * sum(visible(spec, n) if windowed else n for n in lengths)
        for spec in config.layers
    )
    return round(weights + (seen + rows * token_width(config)) * itemsize(cache_dtype or config.dtype))


def decode_flops(config: ModelConfig, rows: int, length: int | Sequence[int]) -> int:
    """Floating-point operations (a multiply and an add are two) of one step's products, for rows that see `length`
    tokens each: weights 2 a parameter and row, attention 4 N H a token seen. Norms, rope and softmax are left out."""
    lengths = [length] * rows if isinstance(length, int) else list(length)
    total = 2 * rows * config.vocab_size * config.width
    for spec in config.layers:
        total += 2 * rows * product_params(config, spec)
        total += 4 * spec.num_heads * spec.head_width * sum(visible(spec, n) for n in lengths)
    return total


def visible(spec: LayerSpec, length: int) -> int:
    """How many of `length` tokens the newest one sees."""
    return length if spec.window is None else min(length, spec.window)


# --- the limit ---------------------------------------------------------------------------------------------------


def limit_seconds(num_bytes: float, flops: float, on: Chip, num_chips: int = 1) -> float:
    """No program that moves so many bytes and does so many FLOPs is faster (Williams et al. 2009, the roofline)."""
    return max(num_bytes / on.bandwidth, flops / on.flops) / num_chips


def share_of_limit(seconds: float, num_bytes: float, flops: float, on: Chip, num_chips: int = 1) -> float:
    """The limit's time over the measured time: 1 is the limit itself."""
    return limit_seconds(num_bytes, flops, on, num_chips) / seconds
