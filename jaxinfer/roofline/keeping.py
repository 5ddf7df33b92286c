"""What the cache kinds keep of a row's tokens, in bytes; and kinds that no config field asks for yet, by number."""

from __future__ import annotations

import dataclasses

from jaxinfer.cache import Kind
from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.roofline.sizes import itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheKind:
    """How keys and values are kept: of which tokens, and in what numbers. The two combine freely.

    Keys and values of one head and token are coded in groups that share a scale and a zero; with a residual, keys are
    grouped along tokens instead, a channel at a time, and the newest tokens are plain: `residual` of them, and those of
    a group that is not full yet (KIVI, Liu et al. 2024, whose code flushes keys and values each in their own rhythm).
    """

    ring: bool = False  # a layer with a window keeps W tokens, not all
    budget: int | None = None  # an evicting kind keeps so many (StreamingLLM, H2O, SnapKV); 0: nothing
    page: int = 1  # Z: memory is taken in pages of so many tokens
    dtype: str | None = None  # of numbers that are no codes; None: the model's
    bits: float = 0  # of a code; 0: no codes
    group: int = 0  # codes of a group; 0: the whole head, H
    scale_bits: float = 0
    zero_bits: float = 0
    residual: int = 0  # tokens


def kind_of(kind: CacheKind | str) -> CacheKind:
    """A kind by the name that `init_cache` knows it by, or itself. ValueError for a name that is not known.

    "ring" may stand for any model. Of "snapkv" it is what is left of a prompt, without what comes after.
    """
    return kind if isinstance(kind, CacheKind) else spelled(Kind.read(kind))


def spelled(kind: Kind) -> CacheKind:
    """A kind of cache, by what it keeps and in which numbers."""
    options: dict = dict(kind.options)
    match kind.layout:
        case "dense":
            kept: dict = {}
        case "none":
            kept = {"budget": 0}
        case "ring" if options["window"]:
            kept = {"ring": True, "budget": options["window"] + options["sinks"]}
        case "paged":
            kept = {"ring": True, "page": options["page"]}
        case "streaming":
            kept = {"ring": True, "budget": options["sinks"] + options["recent"]}
        case "h2o" | "snapkv":
            kept = {"ring": True, "budget": options["budget"]}
        case _:
            kept = {"ring": True}
    match kind.numbers:
        case "int8" | "float8":
            kept |= {"bits": 8, "scale_bits": 32}  # a float32 scale a token and head, of keys and of values
        case "int4":
            kept |= {"bits": 4, "group": options["group"], "scale_bits": 16, "zero_bits": 16}
            kept |= {"residual": options["residual"]}
    return CacheKind(**kept)


def cache_bytes(config: ModelConfig, rows: int, size: int, dtype=None, kind: CacheKind | str = "dense") -> int:
    """Bytes of the keys and values of `rows` rows (B) of `size` tokens (S), in `dtype` (the kind's, or the config's).

    What is kept of so many tokens: with size=1 a token's bytes. Evicting kinds' scores are not in it.
    """
    return round(rows * row_bytes(config, size, kind_of(kind), dtype))


def row_bytes(config: ModelConfig, length: int, kind: CacheKind, dtype=None) -> float:
    """Bytes that all layers keep of one row of `length` tokens."""
    plain = itemsize(dtype or kind.dtype or config.dtype)
    return sum(
        layer_bytes(spec, kind, length, slots(kind, length, kept(spec, kind, length)), plain) for spec in config.layers
    )


def kept(spec: LayerSpec, kind: CacheKind, length: int) -> int:
    """How many of `length` tokens one layer keeps."""
    count = length if kind.budget is None else min(length, kind.budget)
    return min(count, spec.window) if kind.ring and spec.window is not None else count


def slots(kind: CacheKind, length: int, newest: int) -> int:
    """How many slots the pages have that hold the newest of `length` tokens. What evicts closes its gaps."""
    first = length - newest if kind.budget is None else 0
    return newest and -(-(first % kind.page + newest) // kind.page) * kind.page


def layer_bytes(spec: LayerSpec, kind: CacheKind, length: int, newest: int, plain: float) -> float:
    """Bytes of one layer's keys and values of the newest of a row's `length` tokens; `plain`: of a number, uncoded."""
    K, H = spec.num_kv_heads, spec.head_width
    if not kind.bits:
        return 2 * K * H * newest * plain
    group = kind.group or H
    coded = length if not kind.residual else max(length - kind.residual, 0) // group * group
    fresh = min(newest, length - coded)
    coded = newest - fresh
    scales = H * -(-coded // group) if kind.residual else -(-H // group) * coded
    scales += -(-H // group) * coded
    codes = 2 * coded * H * kind.bits + scales * (kind.scale_bits + kind.zero_bits)
    return K * (codes / 8 + 2 * fresh * H * plain)


def written_bytes(spec: LayerSpec, kind: CacheKind, num: int, length: int, plain: float) -> float:
    """Bytes that one layer writes for `num` tokens after `length`: what is kept of them, once; with a residual, the
    newest of them in plain numbers and each one, then or later, as codes."""
    K, H = spec.num_kv_heads, spec.head_width
    num = min(num, kept(spec, kind, length + num))
    if not kind.bits:
        return 2 * K * H * num * plain
    per_group = kind.scale_bits + kind.zero_bits
    codes = H * kind.bits + per_group * (-(-H // (kind.group or H)))
    return 2 * K * (num * codes / 8 + min(num, kind.residual) * H * plain)


def token_width(config: ModelConfig) -> int:
    """How many numbers all layers keep of one token."""
    return sum(2 * spec.num_kv_heads * spec.head_width for spec in config.layers)


# --- by number -----------------------------------------------------------------------------------------------------


def latent_cache_bytes(layers: int, latent: int, rotary: int, tokens: int = 1, size: float = 2) -> float:
    """Bytes of a latent cache: one vector of C and one rotated key of R numbers a token and layer, shared by all heads
    (MLA, DeepSeek-V2, section 2.1)."""
    return layers * (latent + rotary) * tokens * size


def latent_attention_flops(heads: int, latent: int, rotary: int, seen: int) -> int:
    """FLOPs of one query over `seen` tokens of a latent cache in one layer, absorbed: scores against C + R numbers and
    a sum of C, for each of N heads. What takes a query into the latent space and back is not in it."""
    return 2 * heads * (latent + rotary) * seen + 2 * heads * latent * seen


def shared_cache_bytes(
    layers: int, share: int, kv_heads: int, head_width: int, tokens: int = 1, size: float = 2
) -> float:
    """Bytes of a cache whose keys and values every `share` layers have in common (CLA, Brandon et al. 2024). What is
    read need not be less: each layer reads them."""
    return -(-layers // share) * 2 * kv_heads * head_width * tokens * size
