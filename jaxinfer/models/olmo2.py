"""OLMo 2: norms behind each block and none before it, and norms over the whole of the q and k projections."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import Reader

NAMES = dataclasses.replace(
    LLAMA,
    layer=LLAMA.layer
    | {
        "attention_post_norm": "layers.{}.post_attention_layernorm.weight",
        "ffn_post_norm": "layers.{}.post_feedforward_layernorm.weight",
    },
)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 50279,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type olmo2."""
    reader = Reader(raw, "olmo2", DEFAULTS)
    heads = reader.heads()
    norm = NormSpec(eps=reader.need("rms_norm_eps"), late_cast=True)
    bias = reader.get("attention_bias", False)
    layer = LayerSpec(
        **heads,
        rope=rope(reader, rope_parameters(reader), heads["head_width"]),
        qk_norm="projection",
        qkv_bias=bias,
        out_bias=bias,
        ffn_width=reader.size("intermediate_size"),
        activation=reader.activation("hidden_act"),
        norm=norm,
        pre_norm=False,
        post_norm=True,
    )
    return reader.model(layers=(layer,) * reader.size("num_hidden_layers"), norm=norm)
