"""Gemma 2: norms before and behind each block, softcaps, a window on every other layer, embeddings times sqrt(D)."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import FOUR_NORMS, LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import ACTIVATIONS, Reader

NAMES = dataclasses.replace(LLAMA, layer=LLAMA.layer | FOUR_NORMS)
DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type gemma2."""
    reader = Reader(raw, "gemma2", DEFAULTS)
    window = reader.get("sliding_window")
    reader.expect("sliding_window_size", window)  # the first files had both
    layer = gemma_layer(reader).replace(softcap=reader.get("attn_logit_softcapping"))
    layer = layer.replace(rope=rope(reader, rope_parameters(reader), layer.head_width))
    windows = reader.windows(window, [index % 2 == 0 for index in range(reader.size("num_hidden_layers"))])
    return gemma_model(reader, [layer.replace(window=window) for window in windows])


def gemma_layer(reader: Reader) -> LayerSpec:
    """What the layers of Gemma 2 and 3 share."""
    reader.expect("use_bidirectional_attention", False)
    activation = reader.activation("hidden_activation")
    reader.expect("hidden_act", *(name for name, kind in ACTIVATIONS.items() if kind == activation))
    bias = reader.get("attention_bias", False)
    return LayerSpec(
        **reader.heads() | {"scale": reader.need("query_pre_attn_scalar") ** -0.5},
        qkv_bias=bias,
        out_bias=bias,
        ffn_width=reader.size("intermediate_size"),
        activation=activation,
        norm=NormSpec(eps=reader.need("rms_norm_eps"), offset=1.0, late_cast=True),
        post_norm=True,
    )


def gemma_model(reader: Reader, layers: list[LayerSpec]) -> ModelConfig:
    """What the models share."""
    return reader.model(
        layers=tuple(layers),
        norm=layers[0].norm,
        embed_scale=reader.size("hidden_size") ** 0.5,
        softcap=reader.get("final_logit_softcapping"),
    )
