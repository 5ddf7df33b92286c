"""Qwen 3: a norm over each head of q and k before rope, heads of 128 whatever the width; windows as in Qwen 2."""

from __future__ import annotations

from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.qwen2 import windows
from jaxinfer.models.reading import Reader

NAMES = LLAMA
DEFAULTS = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type qwen3."""
    reader = Reader(raw, "qwen3", DEFAULTS)
    heads = reader.heads()
    norm = NormSpec(eps=reader.need("rms_norm_eps"))
    bias = reader.get("attention_bias", False)
    layer = LayerSpec(
        **heads,
        rope=rope(reader, rope_parameters(reader), heads["head_width"]),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        ffn_width=reader.size("intermediate_size"),
        activation=reader.activation("hidden_act"),
        norm=norm,
    )
    return reader.model(layers=tuple(layer.replace(window=window) for window in windows(reader)), norm=norm)
