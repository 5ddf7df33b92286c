"""What a model is, in numbers: frozen, hashable, without arrays and without families' names.

A `ModelConfig` is a static argument of every jitted function, so its hash is computed once and equal layers are one
object: comparing two configs of 80 layers costs no more than comparing two of their kinds of layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


class Frozen:
    """Base of the specs: a frozen dataclass whose hash is computed once."""

    def __hash__(self) -> int:
        cached = self.__dict__.get("_hash")
        if cached is None:
            fields = dataclasses.fields(self)  # type: ignore[arg-type]
            cached = hash((type(self).__name__, *(getattr(self, field.name) for field in fields)))
            object.__setattr__(self, "_hash", cached)
        return cached

    def __getstate__(self) -> dict[str, Any]:
        # str hashes differ between processes, so a pickled spec must not bring its own along.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def replace(self, **changes: Any):
        """The same spec with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec(Frozen):
    """Rotary position embedding of the first R entries of each head, halves rotated (Su et al. 2021; GPT-NeoX layout).

    Every scaling rule (linear, llama3, yarn, longrope) is a vector of angular frequencies and one factor, worked out by
    the recipe that reads the checkpoint.
    """

    frequency: tuple[float, ...]  # [R / 2] radians per position
    scale: float = 1.0  # multiplies cos and sin
    long_frequency: tuple[float, ...] = ()  # longrope: used instead when the cache holds more than `switch` positions
    long_scale: float = 1.0
    switch: int = 0

    __hash__ = Frozen.__hash__

    @property
    def width(self) -> int:
        """R: how many entries of a head are rotated."""
        return 2 * len(self.frequency)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSpec(Frozen):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last axis."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0  # the weight that multiplies is offset + scale: Gemma stores w of (1 + w)
    late_cast: bool = False  # multiply in float32 and cast after (Gemma, OLMo 2); Llama casts before it multiplies

    __hash__ = Frozen.__hash__


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec(Frozen):
    """One layer: attention and a feed-forward block, each with norms around it."""

    # attention
    num_heads: int  # N
    num_kv_heads: int  # K
    head_width: int  # H
    scale: float  # multiplies q.k
    rope: RopeSpec | None = None  # None: this layer sees no positions
    window: int | None = None  # W: a token sees itself and the W - 1 before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    qk_norm: Literal["none", "head", "projection"] = "none"  # over H, or over the whole projection, before rope
    qkv_bias: bool = False
    out_bias: bool = False
    # feed-forward
    ffn_width: int  # F
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    ffn_bias: bool = False
    # norms
    norm: NormSpec = NormSpec()
    pre_norm: bool = True  # on each block's input
    post_norm: bool = False  # on each block's output, before it is added
    # on a mesh
    normed_heads: tuple[int, int] | None = None  # N and K before padding: what a norm over a projection divides by

    __hash__ = Frozen.__hash__


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Frozen):
    """A decoder-only language model."""

    vocab_size: int  # V
    width: int  # D
    layers: tuple[LayerSpec, ...]
    norm: NormSpec = NormSpec()  # the last one
    tied: bool = False  # logits use the embedding
    embed_scale: float = 1.0
    num_positions: int = 0  # rows of a learned position table; 0: none
    softcap: float | None = None  # of the logits
    dtype: str = "float32"  # of the activations, and of the weights as loaded
    max_length: int = 0  # positions the model was made for; 0: unknown
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()  # ids that end a text, from generation_config.json or config.json
    vocab_rows: int = 0  # rows of the embedding where it is padded for a mesh; 0: V
    canonical: ModelConfig | None = None  # of params arranged for a mesh: the config that they had before

    __hash__ = Frozen.__hash__

    def __post_init__(self):
        one: dict[LayerSpec, LayerSpec] = {}
        object.__setattr__(self, "layers", tuple(one.setdefault(layer, layer) for layer in self.layers))

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding, and columns of the logits inside a program: V with the padding of a mesh."""
        return self.vocab_rows or self.vocab_size
