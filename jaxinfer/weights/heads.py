"""A draft head on disk: config.json (its one layer in numbers, and whose head it is) and model.safetensors.

    {"model_type": "jaxinfer_head", "version": 1, "target": "D256-V4096-L8-...", "config": {...}}

Tensors bear the params' own paths ("layers.0.q", "hidden_norm.scale") and have the params' own shapes.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfer import mesh as meshes
from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.models.arrange import inverse, settle, sources
from jaxinfer.weights.config_json import config_from_json, config_to_json
from jaxinfer.weights.huggingface import FLOATS, listing
from jaxinfer.weights.safetensors import Checkpoint, read_json, write_safetensors

KIND, VERSION = "jaxinfer_head", 1
KEYS = {"model_type", "version", "target", "config"}
MADE = "a draft head is what scripts/distill.py --kind head writes"


def save_head(directory: str | os.PathLike[str], params: Any, config: ModelConfig, target: str) -> None:
    """Writes a head in bfloat16, in place of the one that is there; the directory appears whole or not at all.

    params, config: canonical, or arranged for a mesh, which is undone. target: the `models.fingerprint` of the model
    that it was trained for. Raises ValueError for a directory that holds something else. On a mesh of several processes
    all of them call this, and the first writes.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not is_head(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} holds something that is no head: save into an empty directory")
    arrays = meshes.fetch(params)
    if config.canonical is not None:
        words = models.head_letters(config)
        back = [{letter: inverse(table) for letter, table in tables.items()} for tables in sources(config)]
        arrays, config = settle(arrays, words, jax.tree.map(lambda _: None, words), back), config.canonical
    if jax.process_index() != 0:
        return
    draft = directory.with_name(directory.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    config = config.replace(dtype="bfloat16")
    notes = {"model_type": KIND, "version": VERSION, "target": target, "config": config_to_json(config)}
    (draft / "config.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    stored = {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in named(arrays).items()}
    write_safetensors(draft / "model.safetensors", stored)
    if directory.exists():
        shutil.rmtree(directory)
    os.replace(draft, directory)


def load_head(
    directory: str | os.PathLike[str], dtype=None, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig, str]:
    """(params, config, fingerprint of its target) of a head that `save_head` wrote.

    dtype: of the arrays and in the config; by default that of the file. mesh: where they go, the ambient one unless
    given; on a mesh both are arranged for it. Raises FileNotFoundError or ValueError, in one line, for a directory that
    is no head, or a damaged one. Whether it fits a target is for `models.fingerprint` to say.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}: {MADE}")
    raw = read_json(directory / "config.json")
    if raw.get("model_type") != KIND:
        raise ValueError(f"{directory} is no draft head (its model_type is {raw.get('model_type')!r}): {MADE}")
    if raw.get("version") != VERSION or raw.keys() != KEYS:
        raise ValueError(f"{directory} is a head of version {raw.get('version')!r}, not {VERSION}: update jaxinfer")
    config = config_from_json(raw["config"], str(directory / "config.json"))
    checkpoint = Checkpoint(directory)
    check(checkpoint, config)
    dtype = jnp.dtype(dtype) if dtype is not None else checkpoint.entries["fuse_hidden"].dtype
    if dtype.name not in FLOATS:
        raise ValueError(f"dtype {dtype.name} cannot be computed in: take one of {', '.join(FLOATS)}")
    config = config.replace(dtype=dtype.name)
    names = named(models.head_shapes(config))
    tree = jax.tree.structure(models.head_shapes(config))
    arrays = jax.tree.unflatten(tree, [checkpoint.read(name).astype(dtype) for name in names])
    mesh = mesh if mesh is not None else meshes.concrete()
    if mesh is None:
        return jax.tree.map(jnp.asarray, arrays), config, raw["target"]
    words, config = models.head_letters(config), models.arrange_config(config, mesh)
    tables = sources(config) if config.canonical is not None else None
    return settle(arrays, words, meshes.shardings(words, mesh), tables), config, raw["target"]


def is_head(directory: pathlib.Path) -> bool:
    """Whether a directory holds a draft head."""
    file = directory / "config.json"
    return file.is_file() and read_json(file).get("model_type") == KIND


def check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuses tensors that are not those of the config."""
    wanted = named(models.head_shapes(config))
    found = checkpoint.entries.keys()
    for verb, names in (("lacks", wanted.keys() - found), ("holds", found - wanted.keys())):
        if names:
            raise ValueError(f"{checkpoint.directory} {verb} {listing(sorted(names))}: its config.json is another's")
    for name, leaf in wanted.items():
        if checkpoint.entries[name].shape != leaf.shape:
            shape = list(checkpoint.entries[name].shape)
            raise ValueError(f"tensor {name!r} has shape {shape} but config.json asks for {list(leaf.shape)}")


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as layers.0.q."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves}
