"""SmolLM3: Llama's layer, every fourth one without rope; windows, where switched on, are on the layers without rope."""

from __future__ import annotations

from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import LLAMA
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import Reader

NAMES = LLAMA
DEFAULTS = {
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2000000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type smollm3."""
    reader = Reader(raw, "smollm3", DEFAULTS)
    reader.skip("max_window_layers")  # the released file has it; transformers does not read it
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
    ropes = turning(reader, reader.size("num_hidden_layers"))
    window = reader.get("sliding_window")
    window = window if reader.get("use_sliding_window", False) else None
    windows = reader.windows(window, [window is not None and not rope for rope in ropes])
    layers = [layer.replace(window=w, rope=layer.rope if r else None) for w, r in zip(windows, ropes, strict=True)]
    return reader.model(layers=tuple(layers), norm=norm)


def turning(reader: Reader, num_layers: int) -> list[bool]:
    """Which layers have rope: in `no_rope_layers`, a 1 says that a layer has it."""
    interval = reader.size("no_rope_layer_interval")
    listed = reader.get("no_rope_layers", [int((index + 1) % interval != 0) for index in range(num_layers)])
    if len(listed) < num_layers:
        raise ValueError(f"smollm3 config has {num_layers} layers but {len(listed)} no_rope_layers")
    return [bool(has) for has in listed[:num_layers]]
