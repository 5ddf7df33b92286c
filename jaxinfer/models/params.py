"""The parameters of a model: a nested dict, `layers` a tuple with one entry a layer.

Weights keep the checkpoint's [out, in] order and are seen with their letters, a free reshape: q is [N, H, D].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec


def letters(config: ModelConfig) -> dict[str, Any]:
    """The letters of every array, in a tree congruent with the params."""
    tree: dict[str, Any] = {
        "embed": "VD",
        "layers": tuple(layer_letters(spec) for spec in config.layers),
        "norm": norm_letters(config.norm, "D"),
    }
    if config.num_positions:
        tree["positions"] = "SD"
    if not config.tied:
        tree["head"] = "VD"
    return tree


def layer_letters(spec: LayerSpec) -> dict[str, Any]:
    """The letters of one layer's arrays."""
    tree: dict[str, Any] = {"q": "NHD", "k": "KHD", "v": "KHD", "o": "DNH", "up": "FD", "down": "DF"}
    if spec.gated:
        tree["gate"] = "FD"
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
    model = {"V": config.vocab_size, "D": config.width, "S": config.num_positions}

    def shape(word: str, size: dict[str, int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(size[letter] for letter in word), dtype)

    tree = letters(config)
    layers = []
    for spec, words in zip(config.layers, tree.pop("layers"), strict=True):
        size = model | {"N": spec.num_heads, "K": spec.num_kv_heads, "H": spec.head_width, "F": spec.ffn_width}
        layers.append(jax.tree.map(lambda word, size=size: shape(word, size), words))
    return jax.tree.map(lambda word: shape(word, model), tree) | {"layers": tuple(layers)}


def init_params(config: ModelConfig, key: jax.Array, dtype=None, scale: float | None = None) -> dict[str, Any]:
    """Random params: products keep the size of what they multiply, norms are one, biases zero.

    Weights are normal with deviation 1 / sqrt(in) (or `scale`), the embedding with 1 / sqrt(D).
    """
    shapes = param_shapes(config, dtype)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    words = jax.tree.leaves(letters(config))

    def draw(index: int, name: str, word: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if name == "scale":
            offset = config.norm.offset
            return jnp.full(shape.shape, 1 - offset, shape.dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        inner = math.prod(shape.shape[1:]) if word[0] in "DV" else shape.shape[-1]
        deviation = inner**-0.5 if scale is None else scale
        return normal(jax.random.fold_in(key, index), shape.shape, shape.dtype, deviation)

    arrays = [
        draw(index, path[-1].key, word, leaf)
        for index, ((path, leaf), word) in enumerate(zip(leaves, words, strict=True))
    ]
    return jax.tree_util.tree_unflatten(treedef, arrays)


def normal(key: jax.Array, shape: tuple[int, ...], dtype, deviation: float) -> jax.Array:
    """Normal draws in float32, cast inside one program, so that no float32 copy of a large weight is held."""
    return DRAW(key, shape, jnp.dtype(dtype), deviation)


DRAW = jax.jit(
    lambda key, shape, dtype, deviation: (jax.random.normal(key, shape) * deviation).astype(dtype),
    static_argnums=(1, 2),
)
