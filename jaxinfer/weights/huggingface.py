"""A Hugging Face directory -> (params, config)."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import hub, models
from jaxinfer import mesh as meshes
from jaxinfer.config import ModelConfig
from jaxinfer.models.names import Names, Tensor, set_leaf, tensors
from jaxinfer.quantization import parse_form
from jaxinfer.weights.safetensors import Checkpoint, read_json
from jaxinfer.weights.shards import check_memory, read_arrays, slots

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
FLOATS = ("float32", "bfloat16", "float16")


def load(
    name: str | os.PathLike[str], dtype=None, *, quantize: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """The params and config of "builtin", a directory, or a hub id ("owner/name", fetched with huggingface_hub).

    A directory is Hugging Face's, or a sharded checkpoint that `save` wrote, on whatever mesh that was.
    dtype: what the weights are converted to, block by block; by default the dtype that they are stored in.
    quantize: "int8" or "int4:group=32", what weights become as they are read (`models.quantize`).
    mesh: where the arrays go, the ambient mesh unless given; without either, the default device. On a mesh both are
    arranged for it (`models.arrange`), and this process reads what its own devices hold of the weights, each byte once.
    Host memory holds a block of 16 MB beside the arrays, and what one tensor sends to devices with their own memory.

    Raises FileNotFoundError or ValueError, in one line, for a file that is missing or damaged, a tensor that is
    missing, surplus or of a wrong shape, a config that is not fully understood, and weights that the free memory cannot
    hold.
    """
    from jaxinfer.weights import orbax  # imported here: it stands on this file

    directory = hub.locate(os.fspath(name))
    if orbax.holds(directory):
        params, config = orbax.restore(directory, dtype, mesh)
        wanted = quantize not in (None, models.form_of(params))  # what is in codes already stays in them
        return (models.quantize(params, quantize, mesh) if wanted and quantize else params), config
    params, config, _ = read_model(directory, dtype, mesh, quantize)
    return params, config


def shapes(
    name: str | os.PathLike[str], dtype=None, *, quantize: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig] | None:
    """What `load` will give, with `jax.ShapeDtypeStruct`s in place of arrays: to compile for it while it is loaded.

    Headers are read, and no weights; raises what `load` raises for these. None for a sharded checkpoint that `save`
    wrote.
    """
    from jaxinfer.weights import orbax  # imported here: it stands on this file

    directory = hub.locate(os.fspath(name))
    if orbax.holds(directory):
        return None
    mesh = mesh if mesh is not None else meshes.concrete()
    _, config, _ = opened(directory, dtype, mesh)
    tree = models.param_shapes(config)
    if quantize:
        form = quantize
        tree = jax.eval_shape(lambda params: models.quantize(params, form, mesh), tree)
    return meshes.shapes(tree, models.letters(config), mesh), config


def read_model(
    directory: pathlib.Path, dtype=None, mesh: jax.sharding.Mesh | None = None, quantize: str | None = None
) -> tuple[dict[str, Any], ModelConfig, int]:
    """What `load` gives for a Hugging Face directory, and how many bytes of its tensors were read."""
    mesh = mesh if mesh is not None else meshes.concrete()
    checkpoint, config, found = opened(directory, dtype, mesh)
    check_memory(config, mesh, quantize)
    places = slots(config, mesh)
    tree: dict[str, Any] = {}
    form = parse_form(quantize) if quantize else None

    def made(path: Any, array: jax.Array) -> Any:
        return models.quantize_one(path[-1], array, form, config.tied, mesh) if form else array

    for tensor, stored in found:
        for path, array in read_arrays(checkpoint, stored, tensor, places):
            set_leaf(tree, path, made(path, array))
    tree["layers"] = tuple(tree["layers"][index] for index in range(len(config.layers)))
    return tree, config, checkpoint.bytes_read


def opened(
    directory: pathlib.Path, dtype: Any, mesh: jax.sharding.Mesh | None
) -> tuple[Checkpoint, ModelConfig, list[tuple[Tensor, str]]]:
    """A Hugging Face directory, its config arranged for the mesh, and each tensor with its stored name."""
    raw = read_json(directory / "config.json")
    family = models.family(raw)
    config = family.config(raw)
    stop = stop_ids(directory)
    checkpoint = Checkpoint(directory)
    found = match(checkpoint, config, family.NAMES)
    dtype = jnp.dtype(dtype) if dtype is not None else checkpoint.entries[found[0][1]].dtype
    if dtype.name not in FLOATS:
        raise ValueError(f"dtype {dtype.name} cannot be computed in: take one of {', '.join(FLOATS)}")
    config = config.replace(dtype=dtype.name, stop_ids=config.stop_ids if stop is None else stop)
    return checkpoint, config if mesh is None else models.arrange_config(config, mesh), found


def match(checkpoint: Checkpoint, config: ModelConfig, names: Names) -> list[tuple[Tensor, str]]:
    """Each tensor that the config needs with its stored name; refuses others, and those that do not fit."""
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
        entry = checkpoint.entries[stored[tensor.name]]
        if entry.shape != tensor.shape:
            asked = list(tensor.shape)
            raise ValueError(
                f"tensor {stored[tensor.name]!r} has shape {list(entry.shape)} but config.json asks for {asked}"
            )
        if entry.dtype.kind in "iub" or entry.dtype.itemsize == 1:
            raise ValueError(
                f"tensor {tensor.name!r} is stored as {entry.dtype.name}: quantized checkpoints are not handled"
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
