"""What --plan says: the memory that weights and cache take, before any of it is taken, and how much more would fit."""

from __future__ import annotations

import json
import pathlib
import tomllib
from typing import Any

import jax
from screen import size
from settings import FLOATS, NEW_TOKENS, Settings, amount

import jaxinfer
from jaxinfer import cache as caches
from jaxinfer import kernels, mesh, models, weights


def read_raw(path: str) -> dict[str, Any]:
    """The keys of a config.json in a file, which is TOML or JSON."""
    text = pathlib.Path(path).read_text(encoding="utf-8")
    try:
        raw = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not {'JSON' if path.endswith('.json') else 'TOML'} ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}: it must hold the keys of a config.json")
    return raw


def read_shape(path: str, dtype: str) -> Any:
    """The config of a shape in a file, arranged for the mesh."""
    raw = read_raw(path)
    dtype = (raw.get("dtype") or raw.get("torch_dtype") or "float32") if dtype == "auto" else dtype
    if dtype not in FLOATS:
        raise ValueError(f"{path} has dtype {dtype!r}: set --dtype to one of {', '.join(FLOATS)}")
    # a number is no text, so no id ends it
    return models.arrange_config(models.config_from_hf(raw).replace(dtype=dtype, stop_ids=()))


def read_config(args: Settings) -> Any:
    """The config of a checkpoint, whose weights are not read, or of a shape."""
    if args.random_weights:
        return read_shape(args.random_weights, args.dtype)
    directory = jaxinfer.hub.locate(args.name)
    raw = weights.read_json(directory / "config.json")
    stored = next(iter(weights.Checkpoint(directory).entries.values())).dtype
    dtype = jax.numpy.dtype(stored).name if args.dtype == "auto" else args.dtype
    return models.arrange_config(models.config_from_hf(raw).replace(dtype=dtype))


def param_shapes(args: Settings, config: Any) -> Any:
    """The shapes of the weights, in codes where that is wanted."""
    shapes, form = models.param_shapes(config), args.quantize
    return shapes if form is None else jax.eval_shape(lambda params: models.quantize(params, form), shapes)


def plan(args: Settings) -> dict[str, Any]:
    """Bytes of weights and cache on this process's devices, and the most rows or tokens that fit."""
    config = read_config(args)
    rows = max(len(args.prompt), 1) * args.num_samples
    needed = (args.prompt_length or 0) + (args.max_new_tokens or NEW_TOKENS)
    S = args.max_length or (needed if args.prompt_length else config.max_length or 4096)
    options = {"kind": args.cache, "dtype": None if args.cache_dtype == "auto" else args.cache_dtype}
    shapes = jax.eval_shape(lambda: caches.init_cache(config, rows, S, **options))
    params = mesh.local_bytes(param_shapes(args, config), models.letters(config))
    held = mesh.local_bytes(shapes, shapes.letters())
    memory = amount(args.memory) if args.memory else kernels.free_memory()
    told = {
        "model": args.name if not args.random_weights else pathlib.Path(args.random_weights).stem,
        "dtype": config.dtype,
        "weights": args.quantize,
        "weight_bytes": params,
        "cache": {"kind": args.cache, "rows": rows, "size": S, "bytes": held, "bytes_per_token": held / rows / S},
        "memory": memory,
        "fits": None,
    }
    if memory is not None:
        left, share = memory - params, held / shapes.bytes  # of a mesh, what this process's devices hold of all
        room = max(int(left / share), 0)
        told["fits"] = {
            "rows": caches.max_rows(config, S, room, **options),
            "size": caches.max_size(config, rows, room, **options),
        }
    return told


def show(told: dict[str, Any]) -> str:
    """The same for people."""
    cache, fits = told["cache"], told["fits"]
    lines = [
        f"{told['model']} in {told['weights'] or told['dtype']}: weights {size(told['weight_bytes'])}",
        f"{cache['kind']} cache of {cache['rows']} x {cache['size']} tokens: {size(cache['bytes'])}, "
        f"{size(cache['bytes_per_token'])} a token",
    ]
    if fits is not None:
        lines.append(
            f"beside the weights {size(told['memory'])} hold {fits['rows']} rows of {cache['size']} tokens, or "
            f"{cache['rows']} of {fits['size']}"
            if told["memory"] > told["weight_bytes"]
            else f"{size(told['memory'])} do not hold the weights: take more memory, a mesh or a smaller --dtype"
        )
    return "\n".join(lines)
