"""The parameters of a model: a nested dict, `layers` a tuple with one entry a layer.

Weights keep the checkpoint's [out, in] order and are seen with their letters, a free reshape: q is [N, H, D].
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec

WEIGHTS = {  # what is multiplied with, or looked up in: the letters of its outputs, and of its inputs
    "q": ("NH", "D"), "k": ("KH", "D"), "v": ("KH", "D"), "o": ("D", "NH"),
    "up": ("F", "D"), "gate": ("F", "D"), "down": ("D", "F"), "embed": ("V", "D"), "head": ("V", "D"),
}  # fmt: skip


def letters(config: ModelConfig) -> dict[str, Any]:
    """The letters of every array, in a tree congruent with the params."""
    tree: dict[str, Any] = {
        "embed": word("embed"),
        "layers": tuple(layer_letters(spec) for spec in config.layers),
        "norm": norm_letters(config.norm, "D"),
    }
    if config.num_positions:
        tree["positions"] = "SD"
    if not config.tied:
        tree["head"] = word("head")
    return tree


def word(name: str) -> str:
    """The letters of a weight: outputs first, as checkpoints have them."""
    return "".join(WEIGHTS[name])


def layer_letters(spec: LayerSpec) -> dict[str, Any]:
    """The letters of one layer's arrays."""
    tree: dict[str, Any] = {name: word(name) for name in ("q", "k", "v", "o", "up", "down")}
    if spec.gated:
        tree["gate"] = word("gate")
    if spec.qkv_bias:
        tree |= {"q_bias": "NH", "k_bias": "KH", "v_bias": "KH"}
    if spec.out_bias:
        tree["o_bias"] = "D"
    if spec.ffn_bias:
        tree |= {"up_bias": "F", "down_bias": "D"} | ({"gate_bias": "F"} if spec.gated else {})
    if spec.qk_norm == "head":
        tree |= {"q_norm": norm_letters(spec.norm, "H"), "k_norm": norm_letters(spec.norm, "H")}
    if spec.qk_norm == "projection":
        tree |= {"q_norm": norm_letters(spec.norm, "NH"), "k_norm": norm_letters(spec.norm, "KH")}
    if spec.pre_norm:
        tree |= {"attention_norm": norm_letters(spec.norm, "D"), "ffn_norm": norm_letters(spec.norm, "D")}
    if spec.post_norm:
        tree |= {"attention_post_norm": norm_letters(spec.norm, "D"), "ffn_post_norm": norm_letters(spec.norm, "D")}
    return tree


def norm_letters(spec: NormSpec, over: str) -> dict[str, str]:
    """A norm has a scale; LayerNorm has a bias too."""
    return {"scale": over, "bias": over} if spec.kind == "layer" else {"scale": over}


def param_shapes(config: ModelConfig, dtype=None) -> dict[str, Any]:
    """The params as `jax.ShapeDtypeStruct`: nothing is allocated."""
    dtype = jnp.dtype(dtype or config.dtype)
    model = {"V": config.padded_vocab, "D": config.width, "S": config.num_positions}

    def shape(word: str, size: dict[str, int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(size[letter] for letter in word), dtype)

    tree = letters(config)
    layers = []
    for spec, words in zip(config.layers, tree.pop("layers"), strict=True):
        size = model | {"N": spec.num_heads, "K": spec.num_kv_heads, "H": spec.head_width, "F": spec.ffn_width}
        layers.append(jax.tree.map(lambda word, size=size: shape(word, size), words))
    return jax.tree.map(lambda word: shape(word, model), tree) | {"layers": tuple(layers)}
