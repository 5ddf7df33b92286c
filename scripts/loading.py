"""The model that a script runs: read from a checkpoint, random in a shape, or only outlined."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from screen import size
from settings import Settings

import jaxinfer


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run."""

    name: str
    params: Any
    config: Any
    tokenizer: Any
    programs: Any  # see `aot.Programs`
    form: str | None = None  # of the weights, where they are in codes
    drafting: Any = None  # see `drafting.Drafting`
    outlined: bool = False  # whether the params are shapes alone


class Numbers:
    """Stands in for a tokenizer where there is none: the text of an id is its number."""

    special_ids: frozenset[int] = frozenset()
    decoder = None

    @property
    def backend(self) -> Numbers:
        return self

    def id_to_token(self, i: int) -> str:
        return str(i)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def load(args: Settings, tokenizer: Any = None, programs: Any = None) -> Model:
    """The model, and the draft that is to guess for it."""
    tokenizer = tokenizer or read_tokenizer(args)
    programs = jaxinfer.aot.Programs() if programs is None else programs
    if args.random_weights:
        params, config = random_weights(args, args.random_weights)
    else:
        params, config = jaxinfer.load(args.name, args.stored, quantize=args.quantize)
    return drafted(args, Model(args.title, params, config, tokenizer, programs, jaxinfer.models.form_of(params)))


def outline(args: Settings, tokenizer: Any, programs: Any) -> Model | None:
    """What `load` will give, with shapes in place of weights; None where only the weights say what they are."""
    import planning

    if args.random_weights:
        config = planning.read_shape(args.random_weights, args.dtype)
        letters = jaxinfer.models.letters(config)
        found = jaxinfer.mesh.shapes(planning.param_shapes(args, config), letters), config
    else:
        found = jaxinfer.weights.shapes(args.name, args.stored, quantize=args.quantize)
    if found is None:
        return None
    params, config = found
    return drafted(args, Model(args.title, params, config, tokenizer, programs, outlined=True))


def drafted(args: Settings, model: Model) -> Model:
    """The model with its draft."""
    if args.draft is None:
        return model
    import drafting

    return dataclasses.replace(model, drafting=drafting.load(args, model))


def read_tokenizer(args: Settings) -> Any:
    """The checkpoint's."""
    if args.random_weights:
        return Numbers()
    tokenizer = jaxinfer.Tokenizer(args.name)
    if args.chat and not tokenizer.has_chat_template:
        raise ValueError(f"{args.name} has no chat template: use --prompt without --chat, or a --model that has one")
    return tokenizer


def random_weights(args: Settings, path: str) -> tuple[Any, Any]:
    """Random weights of the shape in a file, and its config."""
    import jax
    import planning

    config, models = planning.read_shape(path, args.dtype), jaxinfer.models
    need = jaxinfer.mesh.local_bytes(planning.param_shapes(args, config), models.letters(config))
    free = jaxinfer.kernels.free_memory()
    if free is not None and need > free:
        raise ValueError(
            f"{path} needs {size(need)} for its weights but {size(free)} are free: take fewer layers or a smaller dtype"
        )
    params = models.init_params(config, jax.random.key(0), config.dtype)
    if args.quantize:
        params = jaxinfer.quantize(params, args.quantize)
    return jax.block_until_ready(params), config
