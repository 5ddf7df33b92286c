"""Qwen 2 and 2.5: Llama's layer with biases on q, k and v; where windows are switched on, the upper layers have one."""

from __future__ import annotations

from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import Reader

NAMES = LLAMA
DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type qwen2."""
    reader = Reader(raw, "qwen2", DEFAULTS)
    reader.expect("use_mrope", False)
    heads = reader.heads()
    norm = NormSpec(eps=reader.need("rms_norm_eps"))
    layer = LayerSpec(
        **heads,
        rope=rope(reader, rope_parameters(reader), heads["head_width"]),
        qkv_bias=True,
        ffn_width=reader.size("intermediate_size"),
        activation=reader.activation("hidden_act"),
        norm=norm,
    )
    return reader.model(layers=tuple(layer.replace(window=window) for window in windows(reader)), norm=norm)


def windows(reader: Reader) -> list[int | None]:
    """W of each layer: from `max_window_layers` on, unless `layer_types` says otherwise, and only if switched on."""
    window, first = reader.get("sliding_window"), reader.need("max_window_layers")
    window = window if reader.get("use_sliding_window", False) else None
    slides = [window is not None and index >= first for index in range(reader.size("num_hidden_layers"))]
    return reader.windows(window, slides)
