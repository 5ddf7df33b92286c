"""Random params, drawn where they will live."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import mesh
from jaxinfer.config import ModelConfig
from jaxinfer.models.arrange import Moves, moves_of, sources, take
from jaxinfer.models.params import letters, param_shapes


def init_params(config: ModelConfig, key: jax.Array, dtype=None, scale: float | None = None) -> dict[str, Any]:
    """Random params: products keep the size of what they multiply, norms are one, biases zero.

    Weights are normal with deviation 1 / sqrt(in) (or `scale`), the embedding with 1 / sqrt(D). On a mesh each device
    draws its own part; the values are those of one device, and of an arranged config those that `arrange` would give.
    """
    plain = config.canonical or config
    return draw_params(param_shapes(plain, dtype), letters(plain), config, key, scale)


def draw_params(
    shapes: Any, words: Any, config: ModelConfig, key: jax.Array, scale: float | None = None
) -> dict[str, Any]:
    """`init_params` of any tree with `layers`: shapes and words are of its canonical arrays, config says how."""
    plain = config.canonical or config
    tables = sources(config) if config.canonical else [{}] * (len(config.layers) + 1)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    names = jax.tree.leaves(words)

    def draw(index: int, path: tuple, word: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        table = tables[path[1].idx if path[0].key == "layers" else -1]
        inner = math.prod(shape.shape[1:]) if word[0] in "DV" else shape.shape[-1]
        deviation = 0.0 if name == "scale" or name.endswith("bias") else inner**-0.5 if scale is None else scale
        mean = float(1 - plain.norm.offset) if name == "scale" else 0.0
        return normal(
            jax.random.fold_in(key, index),
            shape.shape,
            shape.dtype,
            mean,
            deviation,
            word,
            name,
            moves_of(word, table, shape.shape),
        )

    arrays = [
        draw(index, path, word, leaf) for index, ((path, leaf), word) in enumerate(zip(leaves, names, strict=True))
    ]
    return jax.tree_util.tree_unflatten(treedef, arrays)


@functools.partial(jax.jit, static_argnums=range(1, 8))
def normal(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    mean: float,
    deviation: float,
    word: str,
    name: str,
    moved: Moves,
) -> jax.Array:
    """Normal draws in float32, cast inside one program, so that no float32 copy of a large weight is held."""
    drawn = jax.random.normal(key, shape) * deviation + mean if deviation else jnp.full(shape, mean)
    drawn = drawn.astype(dtype)
    for axis, source in moved:
        drawn = take(drawn, np.array(source), axis)
    return mesh.constrain(drawn, word, name)
