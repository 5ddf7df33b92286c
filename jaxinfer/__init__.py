"""jaxinfer: inference for language models as pure functions of (params, ids, cache).

The river:  text -> ids -> prefill -> (logits, cache) -> sample -> ids -> decode_step -> ... -> ids -> text

The letters, the same in comments, einsum strings and sharding tables:

    B rows (slots)              T query tokens in this call     S cache positions      L layers
    D model width               F ffn width                     V vocabulary           N query heads
    K kv heads                  G = N / K                       H head width           R rotary part of H
    W window                    J draft tokens per round        P pages in the pool    Z tokens per page
    C latent width of kv (MLA)  A latent width of q (MLA)       E experts              X experts per token

`length` is valid tokens so far, `num` valid tokens in this call, `size` capacity; a function returns `(value, cache)`.
Names are resolved on first use: importing jaxinfer touches no backend, sets no variable and prints nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the lazy door below opens, for editors and type checkers
    from jaxinfer.cache import init_cache as init_cache
    from jaxinfer.config import ModelConfig as ModelConfig
    from jaxinfer.decoding import decode_step as decode_step
    from jaxinfer.decoding import forward as forward
    from jaxinfer.decoding import generate as generate
    from jaxinfer.decoding import prefill as prefill
    from jaxinfer.decoding import stream as stream
    from jaxinfer.mesh import make_mesh as make_mesh
    from jaxinfer.mesh import shard as shard
    from jaxinfer.models import quantize as quantize
    from jaxinfer.sampling import Sampling as Sampling
    from jaxinfer.sampling import sample as sample
    from jaxinfer.speculation import speculate as speculate
    from jaxinfer.text import Tokenizer as Tokenizer
    from jaxinfer.weights import load as load
    from jaxinfer.weights import save as save

__version__ = "0.1.0"

ROOM = {  # public name -> the room where it lives
    "load": "weights",
    "save": "weights",
    "ModelConfig": "config",
    "Sampling": "sampling",
    "init_cache": "cache",
    "forward": "decoding",
    "prefill": "decoding",
    "decode_step": "decoding",
    "generate": "decoding",
    "stream": "decoding",
    "speculate": "speculation",
    "sample": "sampling",
    "quantize": "models",
    "make_mesh": "mesh",
    "shard": "mesh",
    "Tokenizer": "text",
}

__all__ = [*ROOM, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in ROOM:
        value = getattr(importlib.import_module(f"jaxinfer.{ROOM[name]}"), name)
        globals()[name] = value
        return value
    try:
        return importlib.import_module(f"jaxinfer.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"jaxinfer.{name}":
            raise
        raise AttributeError(f"jaxinfer has no name {name!r}; it has {', '.join(__all__)}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
