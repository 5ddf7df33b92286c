"""Mistral: Llama's layer without biases; heads that need not fill the width (Nemo); a window everywhere (7B v0.1)."""

from __future__ import annotations

from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import Reader

NAMES = LLAMA
DEFAULTS = {
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,  # when absent; null, as from v0.2 on, is no window
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type mistral."""
    reader = Reader(raw, "mistral", DEFAULTS)
    heads = reader.heads()
    norm = NormSpec(eps=reader.need("rms_norm_eps"))
    layer = LayerSpec(
        **heads,
        rope=rope(reader, rope_parameters(reader), heads["head_width"]),
        window=reader.get("sliding_window"),
        ffn_width=reader.size("intermediate_size"),
        activation=reader.activation("hidden_act"),
        norm=norm,
    )
    return reader.model(layers=(layer,) * reader.size("num_hidden_layers"), norm=norm)
