"""A ModelConfig as JSON, from which the same one is built again, and nothing else."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig

WRITTEN = "the checkpoint is damaged, or a newer jaxinfer wrote it: save it again, or update jaxinfer"


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of a canonical config; each kind of layer once, and for each layer the number of its kind.

    Floats come back bit for bit (Python writes the shortest decimal that reads as the same float64). Raises ValueError
    for the config of arranged params.
    """
    if config.canonical is not None:
        raise ValueError("this is the config of params arranged for a mesh: take the canonical one")
    kinds = list(dict.fromkeys(config.layers))
    names = [field.name for field in dataclasses.fields(config) if field.name not in ("canonical", "vocab_rows")]
    fields: dict[str, Any] = {name: getattr(config, name) for name in names}
    fields |= {"norm": dataclasses.asdict(config.norm), "layers": [kinds.index(layer) for layer in config.layers]}
    return fields | {"kinds": [dataclasses.asdict(kind) for kind in kinds]}


def config_from_json(raw: Any, where: str) -> ModelConfig:
    """The config that was written; a field that is absent has its default.

    Raises ValueError, in one line that begins with `where`, for an unknown field and for a value of a wrong type.
    """
    match raw:
        case {"kinds": list(kinds), "layers": list(numbers), **rest}:
            layers = tuple(fitted(LayerSpec, kind, f"{where}: kinds") for kind in kinds)
        case _:
            raise ValueError(f"{where} has no layers and kinds of layers: {WRITTEN}")
    if not all(type(i) is int and 0 <= i < len(layers) for i in numbers):
        raise ValueError(f"{where} has layers {numbers}, and {len(layers)} kinds of them: {WRITTEN}")
    return fitted(ModelConfig, rest | {"layers": tuple(layers[i] for i in numbers)}, where)


def fitted(hint: Any, value: Any, where: str) -> Any:
    """A value from JSON as the type that a field has."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else fitted(inside[0], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inside[:1] * len(value) if inside[-1] is ... else inside
        if len(kinds) == len(value):
            return tuple(fitted(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is typing.Literal and value in inside:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise ValueError(f"{where} is {str(value)[:60]!r}, where {getattr(hint, '__name__', hint)} fits: {WRITTEN}")


def build(kind: type, raw: Any, where: str) -> Any:
    """A frozen dataclass from the dict of its fields."""
    hints = typing.get_type_hints(kind)
    if not isinstance(raw, dict) or (unknown := sorted(raw.keys() - hints.keys())):
        what = f"has the unknown key {unknown[0]!r}" if isinstance(raw, dict) else "is no object"
        raise ValueError(f"{where} {what}: {WRITTEN}")
    fields = {name: fitted(hints[name], value, f"{where}: {name}") for name, value in raw.items()}
    try:
        return kind(**fields)
    except TypeError as error:  # a field without a default is absent
        raise ValueError(f"{where} is not whole ({' '.join(str(error).split()[1:])}): {WRITTEN}") from None
