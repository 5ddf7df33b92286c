"""A Hugging Face directory -> a sharded checkpoint and back, tensor by tensor, bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import models
from jaxinfer.models.names import Part, Tensor, set_leaf
from jaxinfer.weights import orbax
from jaxinfer.weights.export import Later, stored_tensors, write_model
from jaxinfer.weights.files import copy_files, differences
from jaxinfer.weights.huggingface import FLOATS, match, read_model, stop_ids
from jaxinfer.weights.safetensors import Checkpoint, aligned_empty, read_json


def to_sharded(
    source: pathlib.Path, destination: pathlib.Path, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
    """Writes the text model of a Hugging Face directory as a sharded checkpoint, with its small files.

    dtype: what every tensor is converted to; by default each keeps its own. mesh: load all of it there and save from
    there, instead of tensor by tensor. Returns facts: tensors, bytes, dtypes, left_out. Raises ValueError or OSError,
    in one line, as `load` does.
    """
    raw = read_json(source / "config.json")
    family = models.family(raw)
    config = family.config(raw)
    checkpoint = Checkpoint(source)
    found = match(checkpoint, config, family.NAMES)
    kinds = sorted({checkpoint.entries[stored].dtype.name for _, stored in found})
    if dtype is None and (odd := sorted(set(kinds) - set(FLOATS))):
        raise ValueError(f"{source} holds {odd[0]} tensors: give a dtype, one of {', '.join(FLOATS)}, to convert to")
    if mesh is not None:
        if dtype is None and len(kinds) > 1:
            raise ValueError(f"{source} holds {' and '.join(kinds)} tensors: on a mesh all have one dtype, so give it")
        params, arranged, _ = read_model(source, dtype, mesh)
        orbax.save(destination, params, arranged, source)
    else:
        stop = stop_ids(source)
        first = dtype or checkpoint.entries[found[0][1]].dtype.name
        config = config.replace(dtype=first, stop_ids=config.stop_ids if stop is None else stop)
        params = later_params(checkpoint, found, len(config.layers), dtype)
        orbax.write(destination, params, config, source, mixed=dtype is None and len(kinds) > 1)
    sizes = (math.prod(tensor.shape) * checkpoint.entries[stored].dtype.itemsize for tensor, stored in found)
    if dtype is not None:
        sizes = (math.prod(tensor.shape) * jnp.dtype(dtype).itemsize for tensor, _ in found)
    return {
        "tensors": len(found),
        "bytes": sum(sizes),
        "dtypes": [dtype] if dtype else kinds,
        "left_out": len(checkpoint.entries) - len(found),
    }


def later_params(
    checkpoint: Checkpoint, found: list[tuple[Tensor, str]], num_layers: int, dtype: str | None
) -> dict[str, Any]:
    """The params of a Hugging Face directory, each read when it is written."""
    tree: dict[Any, Any] = {}
    for tensor, stored in found:
        start = 0
        for part in tensor.parts:
            kind = jnp.dtype(dtype or checkpoint.entries[stored].dtype)
            set_leaf(tree, part.path, later(checkpoint, stored, tensor, part, start, kind))
            start += part.stored[0]
    return tree | {"layers": tuple(tree["layers"][index] for index in range(num_layers))}


def later(checkpoint: Checkpoint, stored: str, tensor: Tensor, part: Part, start: int, dtype: np.dtype) -> Later:
    """An array of a stored tensor, whose rows begin at `start`, seen with its letters."""

    def make() -> np.ndarray:
        if tensor.transposed:
            rows = checkpoint.read(stored).T[start : start + part.stored[0]]
        else:
            rows = aligned_empty(part.stored, checkpoint.entries[stored].dtype)
            with checkpoint.open(stored) as read:
                read(start, rows)
        return np.ascontiguousarray(rows).reshape(part.shape).astype(dtype, copy=False)

    return Later(part.shape, dtype, make)


def to_huggingface(
    source: pathlib.Path, destination: pathlib.Path, dtype: str | None = None, max_bytes: int = 5 * 10**9
) -> dict[str, Any]:
    """Writes a sharded checkpoint that was saved with its model's files as a Hugging Face directory.

    The small files are copied byte for byte; only where the weights were converted to another dtype does config.json
    say so. dtype: what every tensor is converted to; by default each keeps its own. max_bytes: of tensors in a file.
    Returns facts, as `to_sharded`, and `files`. Raises ValueError or OSError, in one line, where the config.json is
    missing or another model's.
    """
    checkpoint = orbax.Sharded(source)
    if checkpoint.form is not None:
        raise ValueError(f"the weights of {source} are in codes ({checkpoint.form}): convert what they were made from")
    path = checkpoint.directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{source} was saved without its model's files: save it with tokenizer= their directory")
    raw, config, told = read_json(path), checkpoint.config, checkpoint.huggingface
    if why := differences(raw, config):
        raise ValueError(f"{source} holds the config.json of another model ({why}): save it with its own model's files")

    def kind(part: Part) -> np.dtype:
        return jnp.dtype(dtype or checkpoint.stored["/".join(map(str, part.path))].dtype)

    def find(part: Part) -> np.ndarray:
        return checkpoint.read_one(part.path, kind(part))

    arrays = stored_tensors(config, models.family(raw).NAMES, find, kind, told.get("names", {}))
    copy_files(checkpoint.directory, destination)
    now, before = dtype or config.dtype, told.get("dtype", config.dtype)
    if now != before:
        text = json.dumps(retyped(raw, now), indent=2) + "\n"
        (destination / "config.json").write_text(text, encoding="utf-8")
    files = write_model(destination, arrays, max_bytes)
    return {
        "tensors": len(arrays),
        "bytes": sum(array.nbytes for array in arrays.values()),
        "dtypes": sorted({array.dtype.name for array in arrays.values()}),
        "left_out": len(told.get("left_out", ())),
        "files": files,
    }


def retyped(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says this dtype wherever it said one."""
    return {
        key: dtype if key in ("dtype", "torch_dtype") else retyped(value, dtype) if isinstance(value, dict) else value
        for key, value in raw.items()
    }


@contextlib.contextmanager
def in_place_of(destination: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside the destination that takes its place when all went well, and is gone when it did not.

    What was there is first moved aside: whoever is killed between the two finds it under .NAME.old.
    """
    draft, old = (destination.parent / f".{destination.name}.{word}" for word in ("partial", "old"))
    for path in (draft, old) if destination.exists() else (draft,):
        shutil.rmtree(path, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if destination.exists():
            os.rename(destination, old)
        os.rename(draft, destination)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
