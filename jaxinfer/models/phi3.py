"""Phi-3, 3.5 and 4: Llama's layer with q, k, v and gate, up fused in the file (split at load), partial rope, longrope.

longrope has two sets of frequencies, for contexts up to the original one and for longer ones. Which one holds is chosen
once, from the cache's size, and keys rotated with one set cannot be read with the other: a cache of more than
`original_max_position_embeddings` tokens uses the long set from its first token on. transformers starts with the short
set and computes everything again when a text crosses the switch.
"""

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
    | dict.fromkeys(("q", "k", "v"), "layers.{}.self_attn.qkv_proj.weight")
    | dict.fromkeys(("gate", "up"), "layers.{}.mlp.gate_up_proj.weight"),
)
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
}
ALIASES = {"su": "longrope", "yarn": "longrope"}  # as transformers reads them
SWITCHED_OFF = ("attention_bias", "mlp_bias", "lm_head_bias")
ONE = ("full_attn_mod", "interpolate_factor")


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type phi3."""
    reader = Reader(raw, "phi3", DEFAULTS)
    for key in SWITCHED_OFF:
        reader.expect(key, False)
    for key in ONE:
        reader.expect(key, 1)
    heads = reader.heads()
    parameters = rope_parameters(reader, ALIASES)
    if parameters["rope_type"] not in ("default", "longrope"):
        raise ValueError(f"phi3 config has rope_type {parameters['rope_type']!r}: only default, longrope are handled")
    norm = NormSpec(eps=reader.need("rms_norm_eps"))
    layer = LayerSpec(
        **heads,
        rope=rope(reader, parameters, heads["head_width"], partial=True),
        window=reader.get("sliding_window"),
        ffn_width=reader.size("intermediate_size"),
        activation=reader.activation("hidden_act"),
        norm=norm,
    )
    return reader.model(layers=(layer,) * reader.size("num_hidden_layers"), norm=norm)
