"""Llama 2, 3, 3.1 and 3.2: pre-norm, gated silu, grouped heads, rope (llama3 scaling from 3.1 on)."""

from __future__ import annotations

from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import Reader

NAMES = LLAMA
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type llama."""
    reader = Reader(raw, "llama", DEFAULTS)
    reader.expect("rope_interleaved", False)
    reader.skip("is_llama_config")
    heads = reader.heads()
    norm = NormSpec(eps=reader.need("rms_norm_eps"))
    bias = reader.get("attention_bias", False)
    layer = LayerSpec(
        **heads,
        rope=rope(reader, rope_parameters(reader), heads["head_width"]),
        qkv_bias=bias,
        out_bias=bias,
        ffn_width=reader.size("intermediate_size"),
        ffn_bias=reader.get("mlp_bias", False),
        activation=reader.activation("hidden_act"),
        norm=norm,
    )
    return reader.model(layers=(layer,) * reader.size("num_hidden_layers"), norm=norm)
