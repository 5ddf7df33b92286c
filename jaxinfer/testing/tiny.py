"""A tiny decoder with every parameter drawn at random: a bias of zero or a norm of one hides what it should show."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec, RopeSpec
from jaxinfer.models import param_shapes


def tiny_config(
    *, num_layers: int = 2, vocab_size: int = 101, width: int = 36, dtype="float32", **layer: Any
) -> ModelConfig:
    """Odd sizes that no mesh divides, grouped heads, H not D / N; `layer` overrides fields of every LayerSpec."""
    fields: dict[str, Any] = {
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_width": 10,
        "scale": 10**-0.5,
        "rope": RopeSpec(frequency=tuple(10000.0 ** -(i / 5) for i in range(5))),
        "ffn_width": 51,
        "norm": NormSpec(eps=1e-5),
    } | layer
    spec = LayerSpec(**fields)
    return ModelConfig(vocab_size=vocab_size, width=width, layers=(spec,) * num_layers, norm=spec.norm, dtype=dtype)


def tiny_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Every array normal: norms around one, biases around zero, weights so that logits are of order 1 to 10."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    key = jax.random.key(seed)

    def draw(index: int, path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape)
        scale = path[-1].key == "scale"
        return ((1 + 0.2 * noise) if scale else 0.4 * noise).astype(jnp.dtype(config.dtype))

    return jax.tree.unflatten(treedef, [draw(i, path, leaf) for i, (path, leaf) in enumerate(leaves)])


def tiny_model(seed: int = 0, **changes: Any) -> tuple[dict[str, Any], ModelConfig]:
    """(params, config) of `tiny_config(**changes)`."""
    config = tiny_config(**changes)
    return tiny_params(config, seed), config
