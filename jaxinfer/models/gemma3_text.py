"""Gemma 3: Gemma 2's layer with norms on q and k instead of softcaps, five local layers to one global, two ropes.

A multimodal checkpoint (model_type gemma3) is read as the text model in it: the vision tower is left out, by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.models.gemma2 import gemma_layer, gemma_model
from jaxinfer.models.names import FOUR_NORMS, LLAMA
from jaxinfer.models.positions import Parameters, complete, rope
from jaxinfer.models.reading import Reader

NAMES = dataclasses.replace(
    LLAMA,
    layer=LLAMA.layer | FOUR_NORMS,
    prefixes=("model.", "language_model.", "language_model.model.", "model.language_model."),
    ignored=(*LLAMA.ignored, r"(vision_tower|multi_modal_projector)\..*"),
)
DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
THETA = {"global": 1_000_000.0, "local": 10_000.0}
SIZES = {  # a multimodal file leaves out what it shares with these
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type gemma3_text, or the text part of a gemma3."""
    reader = Reader(text_part(raw) if raw.get("model_type") == "gemma3" else raw, "gemma3_text", DEFAULTS)
    reader.expect("attn_logit_softcapping", None)
    layer = gemma_layer(reader).replace(qk_norm="head")
    local, whole = (rope(reader, parameters, layer.head_width) for parameters in rope_pair(reader))
    window = reader.get("sliding_window")
    windows = reader.windows(window, slides(reader, reader.size("num_hidden_layers")))
    return gemma_model(reader, [layer.replace(window=w, rope=local if w else whole) for w in windows])


def slides(reader: Reader, num_layers: int) -> list[bool]:
    """Which layers are local where `layer_types` does not say it: all but every sixth, or what the older key says."""
    pattern = reader.size("sliding_window_pattern", 6)
    if reader.get("layer_types") is None:
        reader.expect("_sliding_window_pattern", pattern)  # written beside layer_types; transformers does not read it
    reader.skip("_sliding_window_pattern")
    return [(index + 1) % pattern != 0 for index in range(num_layers)]


def rope_pair(reader: Reader) -> tuple[Parameters, Parameters]:
    """The ropes of local and of global layers: nested since v5; before, scaling was of the global one alone."""
    nested, scaling = reader.get("rope_parameters", {}), reader.get("rope_scaling", {})
    if surplus := sorted(set(nested) - {"sliding_attention", "full_attention"}):
        raise ValueError(f"gemma3_text config has rope_parameters for {', '.join(surplus)}: they go by layer type here")
    local, whole = nested.get("sliding_attention") or {}, nested.get("full_attention") or {}
    return (
        complete(reader, reader.get("rope_local_base_freq", THETA["local"]), local),
        complete(reader, reader.get("rope_theta", THETA["global"]), {**whole, **scaling}),
    )


def text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The text model of a multimodal config.json, with what stands outside of it."""
    reader = Reader(raw, "gemma3")
    reader.skip("vision_config", "mm_tokens_per_image")
    reader.skip(*(f"{name}_token_{end}" for name in ("boi", "eoi", "image") for end in ("index", "id")))
    text = SIZES | reader.need("text_config")
    for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id"):
        if reader.get(key) is not None:
            text[key] = raw[key]
    reader.finish()
    Reader(text, "gemma3").expect("final_logit_softcapping", None)  # the multimodal class does not apply it
    return text
