"""model_type -> recipe."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from jaxinfer.config import ModelConfig
from jaxinfer.models.names import Names

FAMILIES = {  # model_type: the file of its recipe
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma3_text": "gemma3_text",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}


class Family(Protocol):
    """What a recipe file holds."""

    NAMES: Names

    def config(self, raw: dict[str, Any]) -> ModelConfig:
        """Reads the family's config.json."""
        ...


def family(raw: dict[str, Any]) -> Family:
    """The recipe of a config.json, by its model_type. Raises ValueError for a family that is not known."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json has model_type {kind!r}: only {', '.join(FAMILIES)} are handled")
    return importlib.import_module(f"jaxinfer.models.{FAMILIES[kind]}")  # type: ignore[return-value]


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json (as transformers v4 or v5 writes it)."""
    return family(raw).config(raw)
