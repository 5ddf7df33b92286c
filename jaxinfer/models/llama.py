"""Llama 2, 3, 3.1 and 3.2: pre-norm, gated silu, grouped heads, rope (llama3 scaling from 3.1 on)."""

from __future__ import annotations

from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import Reader

NAMES = LLAMA


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type llama."""
    reader = Reader(raw, "llama")
    width, num_heads = reader.need("hidden_size"), reader.need("num_attention_heads")
    head_width = reader.get("head_dim", width // num_heads)
    norm = NormSpec(eps=reader.get("rms_norm_eps", 1e-6))
    bias = reader.get("attention_bias", False)
    layer = LayerSpec(
        num_heads=num_heads,
        num_kv_heads=reader.get("num_key_value_heads", num_heads),
        head_width=head_width,
        scale=head_width**-0.5,
        rope=rope(reader, rope_parameters(reader), head_width),
        qkv_bias=bias,
        out_bias=bias,
        ffn_width=reader.need("intermediate_size"),
        ffn_bias=reader.get("mlp_bias", False),
        activation=reader.activation("hidden_act", "silu"),
        norm=norm,
    )
    return reader.model(width=width, layers=(layer,) * reader.need("num_hidden_layers"), norm=norm)
