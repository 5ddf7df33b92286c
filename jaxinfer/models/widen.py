"""A larger model that computes the same function: what a pass costs can be chosen, what it says cannot."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig


def widen(
    params: dict[str, Any], config: ModelConfig, ffn_width: int, num_layers: int, key: jax.Array
) -> tuple[dict[str, Any], ModelConfig]:
    """Params and config with F = `ffn_width` in every layer and `num_layers` of them, whose scores are the same.

    New columns of `down` and the whole of `o` and `down` of new layers are zero, all else that is new is random (Chen
    et al. 2016, Net2Net, with zeros in place of copies): it is stored, read and multiplied like any other weight.
    Canonical params only. Raises ValueError for sizes below the model's own, and for layers with output biases.
    """
    spec = config.layers[-1]
    if num_layers < len(config.layers) or any(ffn_width < layer.ffn_width for layer in config.layers):
        raise ValueError(
            f"the model has {len(config.layers)} layers of width {spec.ffn_width}, so it cannot be widened to "
            f"{num_layers} of {ffn_width}: ask for at least as many"
        )
    if spec.out_bias or spec.ffn_bias or (spec.post_norm and spec.norm.kind == "layer"):
        raise ValueError("the layers add biases to what they give, so a new one would change it: widen another model")
    layers = [wide(p, ffn_width, jax.random.fold_in(key, i)) for i, p in enumerate(params["layers"])]
    for i in range(len(layers), num_layers):
        own = redrawn(layers[-1], jax.random.fold_in(key, i))
        layers.append(own | {name: jnp.zeros_like(own[name]) for name in ("o", "down")})
    specs = tuple(layer.replace(ffn_width=ffn_width) for layer in config.layers)
    specs += specs[-1:] * (num_layers - len(specs))
    return params | {"layers": tuple(layers)}, config.replace(layers=specs)


def wide(p: dict[str, Any], ffn_width: int, key: jax.Array) -> dict[str, Any]:
    """A layer with more units in its feed-forward, to which nobody listens."""
    more = ffn_width - p["down"].shape[1]
    grown = {}
    for i, name in enumerate(name for name in ("gate", "up") if name in p):
        D = p[name].shape[1]
        new = jax.random.normal(jax.random.fold_in(key, i), (more, D), jnp.float32) * D**-0.5
        grown[name] = jnp.concatenate([p[name], new.astype(p[name].dtype)])
    silent = jnp.zeros((p["down"].shape[0], more), p["down"].dtype)
    return p | grown | {"down": jnp.concatenate([p["down"], silent], 1)}


def redrawn(p: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """A layer with random matrices of the same size."""
    leaves, tree = jax.tree.flatten(p)
    drawn = [
        (jax.random.normal(jax.random.fold_in(key, i), x.shape) * x.shape[-1] ** -0.5).astype(x.dtype)
        if x.ndim > 1
        else x
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)
