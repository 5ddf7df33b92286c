"""GPT-2: LayerNorm, learned positions, no rope and no gate, biases everywhere; matrices lie [in, out] in the file."""

from __future__ import annotations

from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.models.names import Names
from jaxinfer.models.reading import Reader

NAMES = Names(
    top={
        "embed": "wte.weight",
        "positions": "wpe.weight",
        "norm": "ln_f.weight",
        "head": "lm_head.weight",
    },
    layer={
        "attention_norm": "h.{}.ln_1.weight",
        "q": "h.{}.attn.c_attn.weight",
        "k": "h.{}.attn.c_attn.weight",
        "v": "h.{}.attn.c_attn.weight",
        "o": "h.{}.attn.c_proj.weight",
        "ffn_norm": "h.{}.ln_2.weight",
        "up": "h.{}.mlp.c_fc.weight",
        "down": "h.{}.mlp.c_proj.weight",
    },
    prefixes=("transformer.",),  # the released files have none
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    transposed=frozenset({"q", "k", "v", "o", "up", "down"}),
)
DEFAULTS = {
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

UNREAD = tuple(f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj"))


def config(raw: dict[str, Any]) -> ModelConfig:
    """Reads a config.json of model_type gpt2."""
    reader = Reader(renamed(raw), "gpt2", DEFAULTS)
    reader.skip("n_ctx", *UNREAD)
    reader.skip("reorder_and_upcast_attn")  # scores in float32, which is how they are made here anyway
    width, num_heads, num_positions = reader.size("n_embd"), reader.size("n_head"), reader.size("n_positions")
    if width % num_heads:
        raise ValueError(f"gpt2 config has n_embd = {width} and n_head = {num_heads}: the heads must divide the width")
    norm = NormSpec(kind="layer", eps=reader.need("layer_norm_epsilon"))
    scale = (width // num_heads) ** -0.5 if reader.get("scale_attn_weights", False) else 1.0
    layer = LayerSpec(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_width=width // num_heads,
        scale=scale,
        qkv_bias=True,
        out_bias=True,
        ffn_width=reader.size("n_inner", 4 * width),
        ffn_bias=True,
        gated=False,
        activation=reader.activation("activation_function"),
        norm=norm,
    )
    layers = (layer,) * reader.size("n_layer")
    if reader.get("scale_attn_by_inverse_layer_idx", False):
        layers = tuple(layer.replace(scale=scale / (index + 1)) for index in range(len(layers)))
    return reader.model(width=width, layers=layers, norm=norm, num_positions=num_positions, max_length=num_positions)


def renamed(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with GPT-2's own names for keys that may be written with everyone's."""
    for other, own in ALIASES.items():
        if other in raw and raw.get(own, raw[other]) != raw[other]:
            raise ValueError(f"gpt2 config has {own} = {raw[own]} and {other} = {raw[other]}: they are the same thing")
    return {ALIASES.get(key, key): value for key, value in raw.items()}
