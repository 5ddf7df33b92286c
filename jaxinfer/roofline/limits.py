"""How long a pass takes at least, on one chip or on a mesh of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import ceil

from jaxinfer import mesh as meshes
from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.roofline.chips import Chip, known
from jaxinfer.roofline.keeping import CacheKind, kind_of, row_bytes
from jaxinfer.roofline.passes import forward_bytes, forward_flops, spread
from jaxinfer.roofline.sizes import multiplied_bytes, product_params, weight_bytes

SUM = 4  # bytes: partial sums travel as float32
SIZES = {"N": "num_heads", "K": "num_kv_heads", "F": "ffn_width"}


@dataclasses.dataclass(frozen=True)
class Limit:
    """What one pass costs at least (Williams et al. 2009, the roofline): computing, reading and sending overlap, and
    the slowest of them is all the time it takes. Counts are of the busiest chip."""

    flops: int
    bytes: int  # read from and written to its memory
    sent: int  # bytes to other chips
    held: int  # bytes of weights and cache that it has to hold
    tokens: int  # new tokens of all rows
    rows: int
    critical_batch: float  # tokens of a pass above which weights cost more arithmetic than reading
    compute_seconds: float
    memory_seconds: float
    communication_seconds: float
    fits: bool  # whether its memory holds `held`

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    @property
    def seconds(self) -> float:
        """Of the pass; of a prefill, the time to the first token."""
        return max(self.memory_seconds, self.compute_seconds, self.communication_seconds)

    @property
    def bound(self) -> str:
        """What the pass waits for: "memory", "compute" or "communication"."""
        for name in ("memory", "compute"):
            if getattr(self, f"{name}_seconds") == self.seconds:
                return name
        return "communication"

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.tokens / self.seconds

    @property
    def latency(self) -> float:
        """Seconds a token of one row."""
        return self.seconds * self.rows / self.tokens

    def share(self, seconds: float) -> float:
        """The limit's time over a measured time of the pass: 1 is the limit itself."""
        return self.seconds / seconds


def prefill(
    config: ModelConfig,
    rows: int,
    length: int,
    chip: Chip | str,
    axes: Mapping[str, int] | None = None,
    *,
    weights=None,
    cache: CacheKind | str = "dense",
    math: str = "bfloat16",
) -> Limit:
    """The limit of taking in prompts of `length` tokens, and scoring each one's last. See `forward`."""
    return forward(config, rows, length, 0, chip, axes, weights=weights, cache=cache, math=math, scored=1)


def decode(
    config: ModelConfig,
    rows: int,
    length: int | Sequence[int],
    chip: Chip | str,
    axes: Mapping[str, int] | None = None,
    *,
    weights=None,
    cache: CacheKind | str = "dense",
    math: str = "bfloat16",
) -> Limit:
    """The limit of one step: one token for each row, which held `length` (an int, or one a row). See `forward`."""
    return forward(config, rows, 1, length, chip, axes, weights=weights, cache=cache, math=math)


def forward(
    config: ModelConfig,
    rows: int,
    num: int,
    length: int | Sequence[int],
    chip: Chip | str,
    axes: Mapping[str, int] | None = None,
    *,
    weights=None,
    cache: CacheKind | str = "dense",
    math: str = "bfloat16",
    scored: int | None = None,
) -> Limit:
    """The limit of a pass: `num` (T) new tokens in each of `rows` (B) rows that hold `length`; verifying J drafts has
    num = J + 1, a chunk of a prompt its size.

    chip: a name (`CHIPS`, or what jax calls it) or measured numbers. axes: of a mesh ({"data": 2, "tensor": 4}):
    weights and heads are split over `tensor`, rows over `data` (the last chip may have fewer), cached positions over
    `seq`; what other axes split is not in a dense model. weights: a dtype or `Packed`, the config's unless given.
    cache: a kind's name, as `init_cache` has it, or a `CacheKind`. math: what products are computed in, see
    `Chip.rate`. scored: how many tokens of each row get logits (default: all).

    ValueError for an unknown chip, kind or axis, no rows or tokens, more tokens than learned positions, heads or widths
    that their axis does not divide, and a mesh of chips whose interconnect is not known.
    """
    on, kind, axes = known(chip), kind_of(cache), dict(axes or {})
    lengths = spread(rows, length)
    check(config, rows, num, lengths, scored, axes)
    own, seq, data = part(config, axes), parts("S", axes), parts("B", axes)
    each = -(-rows // data)
    batches = [lengths[start : start + each] for start in range(0, rows, each)]
    crit = critical_batch(own, on, weights, math) * data

    def of(batch: list[int]) -> Limit:
        flops = forward_flops(own, num, batch, scored, kind, seq=seq)
        moved = forward_bytes(own, num, batch, weights, kind, seq=seq)
        sent = sent_bytes(config, num * len(batch), axes)
        if sent and not on.interconnect:
            raise ValueError(f"this chip's interconnect is not known, and mesh {axes} sends {sent} bytes: give it")
        keeps = sum(row_bytes(own, n + num, kind) for n in batch)
        total = weight_bytes(own, weights) + ceil(keeps / seq)
        return Limit(
            flops=flops,
            bytes=moved,
            sent=sent,
            held=total,
            tokens=rows * num,
            rows=rows,
            critical_batch=crit,
            compute_seconds=flops / on.rate(math),
            memory_seconds=moved / on.bandwidth,
            communication_seconds=sent / on.interconnect if sent else 0.0,
            fits=total <= on.memory,
        )

    return max(map(of, batches), key=lambda limit: limit.seconds)


def critical_batch(config: ModelConfig, chip: Chip | str, weights=None, math: str = "bfloat16") -> float:
    """From how many tokens a pass on, multiplying with the matrices (head included) takes longer than reading them.

    Of weights and products in bfloat16 it is the chip's ridge; of int8 weights multiplied in bfloat16 half of that.
    """
    on = known(chip)
    params = sum(product_params(config, spec) for spec in config.layers) + config.padded_vocab * config.width
    return multiplied_bytes(config, weights) * on.rate(math) / (2 * params * on.bandwidth)


# --- a mesh --------------------------------------------------------------------------------------------------------


def parts(letter: str, axes: Mapping[str, int]) -> int:
    """Over how many chips a letter is split."""
    return axes.get(meshes.RULES.get(letter, ""), 1)


def part(config: ModelConfig, axes: Mapping[str, int]) -> ModelConfig:
    """One chip's part of a model is a smaller model: fewer heads, a narrower ffn, a smaller vocabulary.

    ValueError for sizes that do not divide.
    """
    if not any(parts(letter, axes) > 1 for letter in (*SIZES, "V")):
        return config

    def divided(letter: str, size: int) -> int:
        count = parts(letter, axes)
        if size % count:
            raise ValueError(
                f"{letter} = {size} does not divide over {meshes.RULES[letter]} = {count}: "
                "take another mesh, or the config that models.arrange_config pads for this one"
            )
        return size // count

    def narrow(spec: LayerSpec) -> LayerSpec:
        return spec.replace(**{name: divided(letter, getattr(spec, name)) for letter, name in SIZES.items()})

    vocab = divided("V", config.padded_vocab)
    layers = tuple(narrow(spec) for spec in config.layers)
    return config.replace(layers=layers, vocab_size=vocab, vocab_rows=0, canonical=None)


def sent_bytes(config: ModelConfig, tokens: int, axes: Mapping[str, int]) -> int:
    """Bytes that each chip sends in a pass over its `tokens` tokens: all-reduces round a ring, float32.

    | where                                 | axis   | how many      | floats a token                      |
    |---------------------------------------|--------|---------------|-------------------------------------|
    | embedding                             | tensor | one           | D                                   |
    | o, down                               | tensor | two a layer   | D each                              |
    | norms over the projections of q and k | tensor | one a layer   | 2                                   |
    | softmax over split slots              | seq    | three a layer | N, N and N x H, of the chip's own N |
    Logits stay where they are: a draw needs few of them.
    """
    tensor, seq = parts("N", axes), parts("S", axes)
    sums = config.width + sum(2 * config.width + 2 * (spec.qk_norm == "projection") for spec in config.layers)
    merged = sum(spec.num_heads // tensor * (spec.head_width + 2) for spec in config.layers)
    return ceil(SUM * tokens * (around(tensor) * sums + around(seq) * merged))


def around(count: int) -> float:
    """How often each chip of a ring sends what the ring sums: a reduce-scatter and an all-gather, both (X - 1) / X."""
    return 2 * (count - 1) / count


def check(
    config: ModelConfig, rows: int, num: int, lengths: Sequence[int], scored: int | None, axes: Mapping[str, int]
) -> None:
    """Refuses what cannot be asked."""
    if rows < 1 or num < 1 or min(lengths) < 0:
        raise ValueError(f"a pass of {num} tokens for {rows} rows does nothing: both must be at least 1, lengths 0")
    if scored is not None and not 1 <= scored <= num:
        raise ValueError(f"{scored} of {num} new tokens cannot be scored: take 1 to {num}")
    longest = max(lengths) + num
    if config.num_positions and longest > config.num_positions:
        raise ValueError(
            f"a row would hold {longest} tokens but the model has {config.num_positions} learned positions: shorten it"
        )
    for name, size in axes.items():
        if name not in meshes.AXES or size < 1:
            raise ValueError(f"mesh axis {name} = {size} cannot be: take some of {', '.join(meshes.AXES)}, at least 1")


# --- from counts -----------------------------------------------------------------------------------------------------


def limit_seconds(num_bytes: float, flops: float, on: Chip, num_chips: int = 1) -> float:
    """No program that moves so many bytes and does so many FLOPs is faster (Williams et al. 2009, the roofline)."""
    return max(num_bytes / on.bandwidth, flops / on.flops) / num_chips


def share_of_limit(seconds: float, num_bytes: float, flops: float, on: Chip, num_chips: int = 1) -> float:
    """The limit's time over the measured time: 1 is the limit itself."""
    return limit_seconds(num_bytes, flops, on, num_chips) / seconds
