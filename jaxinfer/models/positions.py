"""Rope as checkpoints describe it: every scaling rule becomes a vector of frequencies and one factor.

transformers v5 writes `rope_parameters` {rope_type, rope_theta, ...} (nested by layer type where layers differ); v4
wrote `rope_theta` and `rope_scaling` (with `rope_type`, or `type` before that). Both are read, as transformers 5 reads
them: `rope_scaling` wins, and what stands beside it (rope_theta, partial_rotary_factor) fills what it leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxinfer.config import RopeSpec
from jaxinfer.models.reading import Reader

Parameters = dict[str, Any]
ORIGINAL = "original_max_position_embeddings"
METADATA = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope_parameters(reader: Reader, aliases: Mapping[str, str] | None = None) -> Parameters:
    """The one dict that both ways of writing mean: rope_type, rope_theta and what the type needs.

    aliases: names that the family gives to a rope_type.
    """
    scaling, modern = reader.get("rope_scaling"), reader.get("rope_parameters")
    return complete(reader, reader.need("rope_theta"), scaling or modern or {}, aliases)


def complete(
    reader: Reader, theta: float, given: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> Parameters:
    """What a config gives for one kind of layer, with what stands elsewhere in the config filled in."""
    kind = given.get("rope_type") or given.get("type") or "default"
    parameters: Parameters = {"rope_theta": theta}
    parameters |= {key: value for key, value in given.items() if value is not None}
    parameters["rope_type"] = (aliases or {}).get(kind, kind)
    parameters.setdefault("partial_rotary_factor", reader.get("partial_rotary_factor", 1.0))
    longest = reader.get("max_position_embeddings")
    original = reader.get(ORIGINAL)  # of Phi-3, outside the dict: it wins over the one inside
    if ORIGINAL in RULES.get(parameters["rope_type"], (None, ()))[1]:
        parameters[ORIGINAL] = original = original or parameters.get(ORIGINAL) or longest
    if parameters["rope_type"] == "longrope" and original and longest:
        parameters.setdefault("factor", longest / original)
    return parameters


def rope(reader: Reader, parameters: Parameters, head_width: int, partial: bool = False) -> RopeSpec:
    """The RopeSpec of one kind of layer. An unknown rope_type, or a key that its rule does not read, is refused.

    partial: whether the family can rotate a part of each head only.
    """
    kind, fraction = parameters["rope_type"], parameters["partial_rotary_factor"]
    if kind not in RULES:
        raise ValueError(f"{reader.family} config has rope_type {kind!r}: only {', '.join(RULES)} are handled")
    if fraction != 1 and not partial:
        raise ValueError(f"{reader.family} config has partial_rotary_factor = {fraction}: only 1.0 is handled")
    rule, needed, optional = RULES[kind]
    if surplus := sorted(set(parameters) - METADATA - needed - optional):
        raise ValueError(f"{reader.family} config has rope keys that {kind!r} does not read: {', '.join(surplus)}")
    if missing := sorted(key for key in needed if parameters.get(key) is None):
        raise ValueError(f"{reader.family} config has rope_type {kind!r} without {', '.join(missing)}: add it")
    width = int(head_width * fraction)
    frequency = parameters["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    return rule(frequency, parameters)


def plain(frequency: np.ndarray, parameters: Parameters) -> RopeSpec:
    """No scaling."""
    return RopeSpec(frequency=tuple(frequency.tolist()))


def linear(frequency: np.ndarray, parameters: Parameters) -> RopeSpec:
    """Position interpolation (Chen et al. 2023)."""
    return RopeSpec(frequency=tuple((frequency / parameters["factor"]).tolist()))


def llama3(frequency: np.ndarray, parameters: Parameters) -> RopeSpec:
    """Llama 3.1's rule: long wavelengths are stretched, short ones kept, those between blended."""
    factor, original = parameters["factor"], parameters[ORIGINAL]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = original * frequency / (2 * math.pi)  # how often the wave fits into the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return RopeSpec(frequency=tuple(((1 - smooth) * frequency / factor + smooth * frequency).tolist()))


def yarn(frequency: np.ndarray, parameters: Parameters) -> RopeSpec:
    """YaRN (Peng et al. 2023, 3.2 and 3.4): frequencies that turn less than beta_slow times in the original context are
    stretched, those that turn more than beta_fast times are kept; cos and sin grow with the logarithm of the factor.
    """
    factor, original = parameters["factor"], parameters[ORIGINAL]
    width, theta = 2 * len(frequency), parameters["rope_theta"]

    def index(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(parameters.get("beta_fast") or 32), index(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretched = np.clip((np.arange(len(frequency)) - low) / ((high - low) or 0.001), 0, 1)
    blend = stretched * frequency / factor + (1 - stretched) * frequency
    return RopeSpec(frequency=tuple(blend.tolist()), scale=yarn_scale(parameters))


def yarn_scale(parameters: Parameters) -> float:
    """What multiplies cos and sin (scores get its square)."""
    given, factor = parameters.get("attention_factor"), parameters["factor"]
    if given is not None:
        return given
    own, whole = parameters.get("mscale"), parameters.get("mscale_all_dim")
    growth = 0.1 * math.log(max(factor, 1))
    return (growth * own + 1) / (growth * whole + 1) if own and whole else growth + 1


def longrope(frequency: np.ndarray, parameters: Parameters) -> RopeSpec:
    """LongRoPE (Ding et al. 2024): a factor for each frequency, one set for caches of up to the original context and
    one for longer ones. The set is chosen once, from the cache's size (`ops.angles`).
    """
    sets = []
    for key in ("short_factor", "long_factor"):
        factors = parameters[key]
        if len(factors) != len(frequency):
            raise ValueError(f"config has {len(factors)} numbers in {key} but {len(frequency)} rope frequencies")
        sets.append(tuple((frequency / np.asarray(factors, np.float64)).tolist()))
    factor, original = parameters["factor"], parameters[ORIGINAL]
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeSpec(frequency=sets[0], scale=scale, long_frequency=sets[1], long_scale=scale, switch=original)


RULES: dict[str, tuple[Callable[[np.ndarray, Parameters], RopeSpec], set[str], set[str]]] = {  # rule, needed, optional
    "default": (plain, set(), set()),
    "linear": (linear, {"factor"}, set()),
    "llama3": (llama3, {"factor", ORIGINAL, "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": (
        yarn,
        {"factor", ORIGINAL},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (longrope, {"factor", ORIGINAL, "short_factor", "long_factor"}, {"attention_factor"}),
}
