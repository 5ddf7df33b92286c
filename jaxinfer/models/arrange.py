"""Params for a mesh: heads, widths and vocabulary repeated or padded until the `tensor` axis divides them. Exact.

Params and files are canonical; what is arranged is worked out from the config and undone by `canonical`.

- KV heads that do not divide are repeated lcm(K, tensor) / K times (with as many query heads as KV heads there is
  nothing to share, and both are padded instead); the query heads of a group are spread over its copies.
- Query heads are padded with heads of zeros, whose output meets zeros in `o`; F likewise.
- The vocabulary is padded with ids that no draw can choose: their logits are -inf.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer import mesh as meshes
from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.models.params import letters, param_shapes

Sources = dict[str, np.ndarray]  # letter -> for each arranged index the canonical one, -1 for zeros
Moves = tuple[tuple[int, tuple[int, ...]], ...]  # (axis, where each of its indices comes from; -1: zeros)


def arrange(params: dict[str, Any], config: ModelConfig, mesh: Any = None) -> tuple[dict[str, Any], ModelConfig]:
    """The params and config for a mesh (the ambient one unless given); themselves where everything divides."""
    other = arrange_config(config, mesh)
    if other is config:
        return params, config
    words = letters(config)
    return settle(params, words, jax.tree.map(lambda _: None, words), sources(other)), other


def canonical(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The params and config as files have them: what `arrange` was given. On a mesh they are split over it still."""
    if config.canonical is None:
        return params, config
    words, before = letters(config), config.canonical

    def home(keys: Any, x: Any, word: str, shape: Any) -> Any:
        where = getattr(x, "sharding", None)
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return resting(shape.shape, word, path, where.mesh) if isinstance(where, NamedSharding) else None

    homes = jax.tree_util.tree_map_with_path(home, params, words, param_shapes(before))
    back = [{letter: inverse(table) for letter, table in tables.items()} for tables in sources(config)]
    return settle(params, words, homes, back), before


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


def inverse(table: np.ndarray) -> np.ndarray:
    """For each canonical index the first that holds it."""
    return np.array([np.flatnonzero(table == i)[0] for i in range(table.max() + 1)])


def settle(params: Any, words: Any, homes: Any, tables: list[Sources] | None) -> Any:
    """Every array with the indices of its letters taken from the tables, where it is to be."""
    *layers, model = tables or [{}] * (len(params["layers"]) + 1)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, meshes.Parts))
    if any(isinstance(x, meshes.Parts) for _, x in leaves):
        raise ValueError("params in codes keep the arrangement they have: load them for this mesh, then quantize")
    rest = zip(structure.flatten_up_to(words), structure.flatten_up_to(homes), strict=True)
    settled = []
    del params  # only `leaves` holds them now, and lets go of each
    for (keys, x), (word, home) in zip(drained(leaves), rest, strict=True):
        table = layers[keys[1].idx] if getattr(keys[0], "key", None) == "layers" else model
        settled.append(moved(x, word, home, table))
        del x
    return jax.tree.unflatten(structure, settled)


def drained(items: list[Any]) -> Any:
    """The items one by one, each dropped from the list when it is given."""
    items.reverse()
    while items:
        yield items.pop()


def moved(x: Any, word: str, home: Any, table: Sources) -> Any:
    """One array, arranged and at home (None: where the operations leave it)."""
    moves = moves_of(word, table, x.shape)
    if not moves:
        return x if home is None or getattr(x, "sharding", None) == home else jax.device_put(x, home)
    if not isinstance(home, NamedSharding):
        for axis, source in moves:
            x = take(x, np.array(source), axis)
        return x
    with jax.set_mesh(home.mesh):  # pyright: ignore[reportArgumentType]
        return jax.device_put(taken(x, moves, home), home)


def moves_of(word: str, table: Sources, shape: tuple[int, ...]) -> Moves:
    """What a table asks of an array with these letters, hashable."""
    return tuple(
        (axis, tuple(table[letter].tolist()))
        for axis, letter in enumerate(word)
        if letter in table and not np.array_equal(table[letter], np.arange(shape[axis]))
    )


@functools.partial(jax.jit, static_argnames=("moves", "home"))
def taken(x: jax.Array, moves: Moves, home: NamedSharding) -> jax.Array:
    """x with these indices along these axes, on its mesh."""
    for axis, source in moves:
        x = take(x, np.array(source), axis)
    return jax.lax.with_sharding_constraint(x, home)


def resting(shape: tuple[int, ...], word: str, path: str, mesh: Any) -> NamedSharding:
    """Where a canonical array lies on a mesh: as its letters say; an axis that does not divide splits another one."""
    axes = list(meshes.spec(word, path, mesh))
    for place, axis in enumerate(axes):
        if axis is None or shape[place] % mesh.shape[axis] == 0:
            continue
        axes[place] = None
        free = [i for i, size in enumerate(shape) if i != place and axes[i] is None and size % mesh.shape[axis] == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = axis
    return NamedSharding(mesh, PartitionSpec(*axes))


def take(x: Any, source: np.ndarray, axis: int) -> Any:
    """x with these indices along an axis; -1 gives zeros. numpy stays numpy."""
    if isinstance(x, np.ndarray):
        y = np.take(x, np.maximum(source, 0), axis)
        y[(slice(None),) * axis + (source < 0,)] = 0
        return y
    where = np.where(source < 0, x.shape[axis], source)
    return jnp.take(x, where, axis, mode="fill", fill_value=0)
