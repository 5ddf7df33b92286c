"""Params -> the tensors of a Hugging Face directory, made one at a time while their files are written."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.names import Names, Part, Tensor, tensors
from jaxinfer.weights.files import written_name
from jaxinfer.weights.safetensors import write_safetensors

Find = Callable[[Part], Any]  # an array of the params, canonical, by its path


@dataclasses.dataclass(frozen=True)
class Later:
    """An array that is made when somebody writes it, and not kept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.make()


def stored_tensors(
    config: ModelConfig, names: Names, find: Find, dtype_of: Callable[[Part], np.dtype], renamed: Mapping[str, str] = {}
) -> dict[str, Later]:
    """Every tensor under its name in a checkpoint of the family, in the shape and order that it has there.

    find: gives an array of the (canonical) params. renamed: names that differ from those the family's code writes.
    """

    def make(tensor: Tensor) -> np.ndarray:
        array = np.concatenate([np.asarray(find(part)).reshape(part.stored) for part in tensor.parts])
        return array.T if tensor.transposed else array

    return {
        renamed.get(tensor.name, written_name(tensor.name, names)): Later(
            tensor.shape, np.dtype(dtype_of(tensor.parts[0])), lambda tensor=tensor: make(tensor)
        )
        for tensor in tensors(config, names)
    }


def write_model(directory: pathlib.Path, arrays: Mapping[str, Any], max_bytes: int) -> list[str]:
    """model.safetensors, or shards of at most so many bytes with their index; a larger tensor has a file of its own.

    Returns the names of the files. Each tensor is made when its turn comes.
    """
    files = list(shards(arrays, max_bytes))
    if len(files) == 1:
        write_safetensors(directory / "model.safetensors", files[0])
        return ["model.safetensors"]
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, held in zip(names, files, strict=True):
        write_safetensors(directory / name, held)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": {tensor: name for name, held in zip(names, files, strict=True) for tensor in held},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, "model.safetensors.index.json"]


def shards(arrays: Mapping[str, Any], max_bytes: int) -> Iterator[dict[str, Any]]:
    """The arrays in their order, as many to a file as fit."""
    held: dict[str, Any] = {}
    for name, array in arrays.items():
        if held and sum(other.nbytes for other in held.values()) + array.nbytes > max_bytes:
            yield held
            held = {}
        held[name] = array
    yield held
