"""Rope as checkpoints describe it: every scaling rule becomes a vector of frequencies and one factor.

transformers v5 writes `rope_parameters` {rope_type, rope_theta, ...} (nested by layer type where layers differ); v4
wrote `rope_theta` and `rope_scaling` (with `rope_type`, or `type` before that). Both are read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxinfer.config import RopeSpec
from jaxinfer.models.reading import Reader

METADATA = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope_parameters(reader: Reader, theta: float = 10000.0) -> dict[str, Any]:
    """The one dict that both ways of writing mean: rope_type, rope_theta and what the type needs."""
    modern, scaling = reader.get("rope_parameters", {}), reader.get("rope_scaling", {})
    base = {"rope_theta": reader.get("rope_theta", theta), "rope_type": "default"}
    if (fraction := reader.get("partial_rotary_factor")) is not None:
        base["partial_rotary_factor"] = fraction
    merged = base | modern | scaling
    merged["rope_type"] = scaling.get("rope_type") or scaling.get("type") or modern.get("rope_type") or "default"
    return merged


def rope(reader: Reader, parameters: dict[str, Any], head_width: int) -> RopeSpec:
    """The RopeSpec of one kind of layer. An unknown rope_type, or a key that its rule does not read, is refused."""
    width = int(head_width * parameters.get("partial_rotary_factor", 1.0))
    frequency = parameters["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    kind = parameters["rope_type"]
    if kind not in RULES:
        raise ValueError(f"{reader.family} config has rope_type {kind!r}: only {', '.join(RULES)} are handled")
    rule, keys = RULES[kind]
    surplus = sorted(set(parameters) - METADATA - keys)
    if surplus:
        raise ValueError(f"{reader.family} config has rope keys that {kind!r} does not read: {', '.join(surplus)}")
    missing = sorted(key for key in REQUIRED.get(kind, ()) if parameters.get(key) is None)
    if missing:
        raise ValueError(f"{reader.family} config has rope_type {kind!r} without {', '.join(missing)}: add to config.json")
    return rule(frequency, parameters)


def plain(frequency: np.ndarray, parameters: dict[str, Any]) -> RopeSpec:
    """No scaling."""
    return RopeSpec(frequency=tuple(frequency.tolist()))


def linear(frequency: np.ndarray, parameters: dict[str, Any]) -> RopeSpec:
    """Position interpolation (Chen et al. 2023)."""
    return RopeSpec(frequency=tuple((frequency / parameters["factor"]).tolist()))


def llama3(frequency: np.ndarray, parameters: dict[str, Any]) -> RopeSpec:
    """Llama 3.1's rule: long wavelengths are stretched, short ones kept, those between blended."""
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = original * frequency / (2 * math.pi)  # how often the wave fits into the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return RopeSpec(frequency=tuple(((1 - smooth) * frequency / factor + smooth * frequency).tolist()))


RULES = {
    "default": (plain, set[str]()),
    "linear": (linear, {"factor"}),
    "llama3": (llama3, {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
REQUIRED = {kind: sorted(keys) for kind, (_, keys) in RULES.items()}
