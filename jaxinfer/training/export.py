"""Params -> a Hugging Face directory that transformers reads unchanged."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxinfer import models
from jaxinfer.training.vocabulary import END_OF_TEXT
from jaxinfer.weights import stored_tensors, write_safetensors


def save_huggingface(
    directory: str | os.PathLike[str], params: Any, raw: dict[str, Any], tokenizer: Tokenizer | None = None
) -> None:
    """Writes config.json (`raw`), generation_config.json, model.safetensors and the tokenizer's two files.

    params are written in the dtype that they have, under the names of the family that `raw` names.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", raw)
    ends = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if key in raw}
    write_json(directory / "generation_config.json", ends)
    write_safetensors(directory / "model.safetensors", named_tensors(params, raw))
    if tokenizer is None:
        return
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # would turn " ." into ".", and Python source into something else
        "model_max_length": raw["max_position_embeddings"],
    }
    write_json(directory / "tokenizer_config.json", settings)


def named_tensors(params: Any, raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor under its name in a checkpoint, in the shape that it has there."""
    family = models.family(raw)
    made = stored_tensors(
        family.config(raw),
        family.NAMES,
        lambda part: find(params, part.path),
        lambda part: np.dtype(find(params, part.path).dtype),
    )
    return {name: np.asarray(array) for name, array in made.items()}


def find(params: Any, path: tuple[str | int, ...]) -> jax.Array:
    """The array at a path of keys and indices."""
    for key in path:
        params = params[key]
    return params


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
