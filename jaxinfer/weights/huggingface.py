"""A Hugging Face directory -> (params, config)."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import hub, models
from jaxinfer.config import ModelConfig
from jaxinfer.models.names import Names, Tensor, set_leaf, tensors
from jaxinfer.weights.safetensors import Checkpoint, aligned_empty, read_json

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
FLOATS = ("float32", "bfloat16", "float16")


def load(name: str | os.PathLike[str], dtype=None) -> tuple[dict[str, Any], ModelConfig]:
    """The params and config of "builtin", a directory, or a hub id ("owner/name", fetched with huggingface_hub).

    dtype: what the weights are converted to, tensor by tensor; by default the dtype that they are stored in. Host
    memory stays under the loaded arrays plus two of the largest tensors.

    Raises FileNotFoundError or ValueError, in one line, for a file that is missing or damaged, a tensor that is
    missing, surplus or of a wrong shape, and a config that is not fully understood.
    """
    directory = hub.locate(os.fspath(name))
    raw = read_json(directory / "config.json")
    family = models.family(raw)
    config = family.config(raw)
    stop = stop_ids(directory)
    checkpoint = Checkpoint(directory)
    found = match(checkpoint, config, family.NAMES)
    dtype = jnp.dtype(dtype) if dtype is not None else checkpoint.entries[found[0][1]].dtype
    if dtype.name not in FLOATS:
        raise ValueError(f"dtype {dtype.name} cannot be computed in: take one of {', '.join(FLOATS)}")
    tree: dict[str, Any] = {}
    for tensor, stored in found:
        for path, array in convert(checkpoint.read(stored), tensor, dtype):
            set_leaf(tree, path, array)
    tree["layers"] = tuple(tree["layers"][index] for index in range(len(config.layers)))
    return tree, config.replace(dtype=dtype.name, stop_ids=config.stop_ids if stop is None else stop)


def match(checkpoint: Checkpoint, config: ModelConfig, names: Names) -> list[tuple[Tensor, str]]:
    """Each tensor that the config needs with its stored name; refuses what is missing, surplus or misshapen."""
    stored = {bare_name(name, names): name for name in checkpoint.entries}
    wanted = tensors(config, names)
    missing = [tensor.name for tensor in wanted if tensor.name not in stored]
    if missing:
        raise ValueError(
            f"{checkpoint.directory} lacks {listing(missing)}: the checkpoint does not fit its config.json"
        )
    ignored = [re.compile(pattern) for pattern in names.ignored]
    tied = set(names.bare) if config.tied else set()  # a tied head that was stored all the same
    surplus = set(stored) - {tensor.name for tensor in wanted} - tied
    surplus = sorted(name for name in surplus if not any(pattern.fullmatch(name) for pattern in ignored))
    if surplus:
        raise ValueError(
            f"{checkpoint.directory} holds {listing(surplus)} that its config.json has no place for: "
            "leaving a weight out would change what the model says"
        )
    for tensor in wanted:
        shape = checkpoint.entries[stored[tensor.name]].shape
        if shape != tensor.shape:
            raise ValueError(
                f"tensor {stored[tensor.name]!r} has shape {list(shape)} but config.json asks for {list(tensor.shape)}"
            )
    return [(tensor, stored[tensor.name]) for tensor in wanted]


def bare_name(name: str, names: Names) -> str:
    """A stored name without whichever prefix it has."""
    prefix = max((p for p in names.prefixes if name.startswith(p)), key=len, default="")
    return name.removeprefix(prefix)


def listing(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"


def convert(data: np.ndarray, tensor: Tensor, dtype: jnp.dtype):
    """The arrays of one stored tensor: split, seen with their letters, in the wanted dtype, on the device."""
    if data.dtype.kind in "iub" or data.dtype.itemsize == 1:
        raise ValueError(
            f"tensor {tensor.name!r} is stored as {data.dtype.name}: quantized checkpoints are not handled"
        )
    if tensor.transposed:
        data = data.T
    start = 0
    for part in tensor.parts:
        rows = data[start : start + part.stored[0]].reshape(part.shape)
        start += part.stored[0]
        if rows.dtype != dtype:  # on the host: on the device every shape would be a program
            stored, rows = rows, aligned_empty(part.shape, dtype)
            np.copyto(rows, stored, casting="unsafe")
        # A CPU device takes the host's memory over, but not a part of it, which would keep the whole alive. Waits, so
        # that no more than one tensor is on its way at a time.
        own = rows.dtype != data.dtype or len(tensor.parts) == 1
        yield part.path, jax.block_until_ready(jax.device_put(rows, may_alias=own))


def stop_ids(directory: pathlib.Path) -> tuple[int, ...] | None:
    """The ids that end a text, as generation_config.json lists them; None where it does not."""
    path = directory / "generation_config.json"
    stop = read_json(path).get("eos_token_id") if path.is_file() else None
    if stop is None:
        return None
    return tuple(stop) if isinstance(stop, list) else (stop,)


def sampling_defaults(name: str | os.PathLike[str]) -> dict[str, float]:
    """The sampling settings that a checkpoint recommends, as arguments of `Sampling`; empty where it has none."""
    path = hub.locate(os.fspath(name)) / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    settings = {key: raw[key] for key in SAMPLING if raw.get(key) is not None}
    if settings and raw.get("do_sample") is False:
        settings["temperature"] = 0.0
    return settings
