"""The small files of a model, which travel with its weights, and what they say about where the weights came from."""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

from jaxinfer import hub, models
from jaxinfer.config import ModelConfig
from jaxinfer.models.names import Names
from jaxinfer.text.files import FILES
from jaxinfer.weights.huggingface import match
from jaxinfer.weights.safetensors import Checkpoint, read_json

SMALL = (*FILES, "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "LICENSE*", "LICENCE*", "NOTICE*")
WRITTEN = ("*.index.json", "jaxinfer.json")  # anew, with the weights: a copy would describe other files


def located(source: Any) -> pathlib.Path | None:
    """The directory of a `Tokenizer`, a path or a hub id, of which only small files are fetched; None for None."""
    if source is None or isinstance(source, str | os.PathLike):
        return None if source is None else hub.locate(source, SMALL)
    return pathlib.Path(source.directory)


def copy_files(source: Any, directory: pathlib.Path) -> None:
    """Copies a model's small files, byte for byte."""
    home = located(source)
    if home is None:
        return
    found = {path for pattern in SMALL for path in home.glob(pattern) if path.is_file()}
    for path in sorted(found - {path for pattern in WRITTEN for path in home.glob(pattern)}):
        target = directory / path.relative_to(home)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def origin(source: Any, config: ModelConfig) -> dict[str, Any]:
    """What is remembered of the Hugging Face directory that params of this config came from; {} for another model's.

    dtype: of its tensors. names: canonical name -> its own, where that is not the family's first. left_out: stored
    tensors that are no parameters of the text model.
    """
    home = located(source)
    if home is None or not (home / "config.json").is_file():
        return {}
    raw = read_json(home / "config.json")
    if differences(raw, config):
        return {}
    notes = next((path for path in (home / "current/jaxinfer.json", home / "jaxinfer.json") if path.is_file()), None)
    if notes is not None:
        return read_json(notes).get("huggingface", {})
    if not any((home / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return {}
    names, checkpoint = models.family(raw).NAMES, Checkpoint(home)
    found = match(checkpoint, config, names)
    return {
        "dtype": checkpoint.entries[found[0][1]].dtype.name,
        "names": {tensor.name: stored for tensor, stored in found if stored != written_name(tensor.name, names)},
        "left_out": sorted(checkpoint.entries.keys() - {stored for _, stored in found}),
    }


def differences(raw: dict[str, Any], config: ModelConfig) -> str:
    """Why a config.json does not describe this model, in a few words; "" where it does."""
    try:
        other = models.config_from_hf(raw).replace(dtype=config.dtype, stop_ids=config.stop_ids)
    except ValueError as error:
        return str(error)
    fields = ("vocab_size", "width", "layers", "norm", "tied", "embed_scale", "num_positions", "softcap", "max_length")
    wrong = [name for name in (*fields, "bos_id") if getattr(other, name) != getattr(config, name)]
    return f"its {wrong[0]} differs" if wrong else ""


def written_name(name: str, names: Names) -> str:
    """The name that a tensor has in the files that a family's own code writes."""
    return name if name in names.bare else names.prefixes[0] + name
