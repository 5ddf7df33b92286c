"""Params for a mesh: heads, widths and vocabulary repeated or padded until the `tensor` axis divides them. Exact.

Params and files are canonical; what is arranged is worked out from the config and undone by `canonical`.

- KV heads that do not divide are repeated lcm(K, tensor) / K times (with as many query heads as KV heads there is
  nothing to share, and both are padded instead); the query heads of a group are spread over its copies.
- Query heads are padded with heads of zeros, whose output meets zeros in `o`; F likewise.
- The vocabulary is padded with ids that no draw can choose: their logits are -inf.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import mesh as meshes
from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.models.params import letters

Sources = dict[str, np.ndarray]  # letter -> for each arranged index the canonical one, -1 for zeros


def arrange(params: dict[str, Any], config: ModelConfig, mesh: Any = None) -> tuple[dict[str, Any], ModelConfig]:
    """The params and config for a mesh (the ambient one unless given); themselves where everything divides."""
    other = arrange_config(config, mesh)
    return (params, config) if other is config else (remap(params, config, sources(other)), other)


def canonical(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The params and config as files have them: what `arrange` was given."""
    if config.canonical is None:
        return params, config
    back = [
        {letter: np.array([np.flatnonzero(a == i)[0] for i in range(a.max() + 1)]) for letter, a in table.items()}
        for table in sources(config)
    ]
    return remap(params, config, back), config.canonical


def arrange_config(config: ModelConfig, mesh: Any = None) -> ModelConfig:
    """The config of arranged params: layers with more heads and wider, and more rows in the embedding."""
    if config.canonical is not None:
        config = config.canonical
    parts = meshes.size_of("N", mesh)
    layers = tuple(arrange_layer(spec, parts) for spec in config.layers)
    rows = up(config.vocab_size, parts)
    if layers == config.layers and rows == config.vocab_size:
        return config
    return config.replace(layers=layers, vocab_rows=rows, canonical=config)


def arrange_layer(spec: LayerSpec, parts: int) -> LayerSpec:
    """A layer whose heads and width `parts` divides."""
    group = spec.num_heads // spec.num_kv_heads
    kv_heads = up(spec.num_kv_heads, parts) if group == 1 else math.lcm(spec.num_kv_heads, parts)
    copies = 1 if group == 1 else kv_heads // spec.num_kv_heads
    heads = kv_heads * -(-group // copies)
    wide = spec.replace(num_heads=heads, num_kv_heads=kv_heads, ffn_width=up(spec.ffn_width, parts))
    normed = (spec.num_heads, kv_heads if copies > 1 else spec.num_kv_heads)  # copies leave a mean as it is
    return spec if wide == spec else wide.replace(normed_heads=normed)


def up(size: int, parts: int) -> int:
    """The next multiple."""
    return -(-size // parts) * parts


def sources(config: ModelConfig) -> list[Sources]:
    """Of an arranged config: the sources of each layer's letters, then those of the model's own."""
    before = config.canonical
    assert before is not None
    tables = [layer_sources(old, new) for old, new in zip(before.layers, config.layers, strict=True)]
    return [*tables, {"V": padded(before.vocab_size, config.vocab_rows)}]


def layer_sources(old: LayerSpec, new: LayerSpec) -> Sources:
    """Where each head and each unit of the feed-forward comes from."""
    group = old.num_heads // old.num_kv_heads
    if group == 1:
        heads = kv_heads = padded(old.num_heads, new.num_heads)
    else:
        kv_heads = np.repeat(np.arange(old.num_kv_heads), new.num_kv_heads // old.num_kv_heads)
        room = new.num_heads // old.num_kv_heads  # query heads, with the padding, of one canonical group
        inside = np.arange(room)
        heads = np.where(inside < group, np.arange(old.num_kv_heads)[:, None] * group + inside, -1).reshape(-1)
    return {"N": heads, "K": kv_heads, "F": padded(old.ffn_width, new.ffn_width)}


def padded(old: int, new: int) -> np.ndarray:
    """0 .. old - 1, then zeros' -1."""
    return np.where(np.arange(new) < old, np.arange(new), -1)


def remap(params: dict[str, Any], config: ModelConfig, tables: list[Sources]) -> dict[str, Any]:
    """Each array with the indices of its letters taken from the tables."""
    words = letters(config)
    *layers, model = tables

    def leaf(table: Sources, x: jax.Array, word: str) -> jax.Array:
        for axis, letter in enumerate(word):
            if letter in table and not np.array_equal(table[letter], np.arange(x.shape[axis])):
                x = take(x, table[letter], axis)
        return x

    new = [
        jax.tree.map(lambda x, word, table=table: leaf(table, x, word), p, w)
        for table, p, w in zip(layers, params["layers"], words.pop("layers"), strict=True)
    ]
    rest = {name: value for name, value in params.items() if name != "layers"}
    return jax.tree.map(lambda x, word: leaf(model, x, word), rest, words) | {"layers": tuple(new)}


def take(x: Any, source: np.ndarray, axis: int) -> Any:
    """x with these indices along an axis; -1 gives zeros. numpy stays numpy."""
    if isinstance(x, np.ndarray):
        y = np.take(x, np.maximum(source, 0), axis)
        y[(slice(None),) * axis + (source < 0,)] = 0
        return y
    where = np.where(source < 0, x.shape[axis], source)
    return jnp.take(x, where, axis, mode="fill", fill_value=0)
