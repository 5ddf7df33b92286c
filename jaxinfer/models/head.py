"""A draft head: one layer on the target's own features and embedding (EAGLE, Li et al. 2024; DeepSeek-V3, section 2.2).

f_s [D] is the target's hidden state at position s behind its last layer, before its last norm: token t_{s+1} is
predicted from it. The head's slot s takes f_s and the embedding of t_{s+1}, and gives g_s [D], a guess at f_{s+1}, from
which t_{s+2} is predicted with the target's own matrix. To draft further, g_s stands in for f_{s+1}.

Its params are {"hidden_norm", "embed_norm", "fuse_hidden": [D, D], "fuse_embed": [D, D], "layers": (one,), "norm"}; the
embedding and the output matrix are the target's, which every function here is given beside them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes

from jaxinfer import mesh, ops
from jaxinfer.cache import Cache, Step
from jaxinfer.config import ModelConfig
from jaxinfer.models.decoder import Params, decoder, embed, logits
from jaxinfer.models.init import draw_params
from jaxinfer.models.params import letters, param_shapes
from jaxinfer.quantization import Weight

NORMS = ("hidden_norm", "embed_norm", "norm")
ROWS = 16  # of the embedding, in a fingerprint


def head_config(config: ModelConfig) -> ModelConfig:
    """The config of a head for this target: one layer in the shape of its last one, without a window.

    `init_cache(head_config(config), ...)` makes its cache. For an arranged target it is the arranged head's.
    """
    return ModelConfig(
        vocab_size=config.vocab_size,
        width=config.width,
        layers=(config.layers[-1].replace(window=None),),
        norm=config.norm,
        dtype=config.dtype,
        max_length=config.max_length,
        vocab_rows=config.vocab_rows,
        canonical=None if config.canonical is None else head_config(config.canonical),
    )


def head_letters(config: ModelConfig) -> dict[str, Any]:
    """The letters of every array of a head with this config, in a tree congruent with its params."""
    words = letters(config)
    return dict.fromkeys(NORMS, words["norm"]) | {"fuse_hidden": "DD", "fuse_embed": "DD", "layers": words["layers"]}


def head_shapes(config: ModelConfig, dtype=None) -> dict[str, Any]:
    """The params of a head as `jax.ShapeDtypeStruct`: nothing is allocated."""
    shapes = param_shapes(config, dtype)
    square = jax.ShapeDtypeStruct((config.width, config.width), jnp.dtype(dtype or config.dtype))
    return dict.fromkeys(NORMS, shapes["norm"]) | {
        "fuse_hidden": square,
        "fuse_embed": square,
        "layers": shapes["layers"],
    }


def init_head(config: ModelConfig, key: jax.Array, dtype=None) -> dict[str, Any]:
    """A random head, drawn like `init_params`; `training.begin_head` starts from the target's last layer instead."""
    plain = config.canonical or config
    return draw_params(head_shapes(plain, dtype), head_letters(plain), config, key)


def head(
    params: Params,
    config: ModelConfig,
    target: Params,
    target_config: ModelConfig,
    ids: jax.Array,
    hidden: jax.Array,
    cache: Cache,
    step: Step,
) -> tuple[jax.Array, Cache]:
    """(g [B, T, D], cache) of slots whose features are `hidden` [B, T, D], f_s or an earlier g_{s-1}.

    ids [B, T] are the tokens AFTER those slots, t_{s+1}; `step.position` is s. Keys and values are left pending in
    `cache`, which is the head's own (of its `config`). A learned position is in the features already, and not added.
    """
    words = embed(target, target_config.replace(num_positions=0), ids, step)
    words = ops.norm(words, params["embed_norm"], config.norm)
    x = ops.norm(hidden, params["hidden_norm"], config.norm)
    x = ops.linear(x, params["fuse_hidden"], "BTC,DC->BTD") + ops.linear(words, params["fuse_embed"], "BTC,DC->BTD")
    (g, _), cache = decoder(params, config, ids, cache, step, hidden=x)
    return g, cache


def head_logits(params: Params, target: Params, target_config: ModelConfig, g: jax.Array) -> jax.Array:
    """Scores [B, T, V] float32 of the token after next, t_{s+2}: the head's own last norm, the target's matrix."""
    return logits({**target, "norm": params["norm"]}, target_config, g)


def fingerprint(params: Params, config: ModelConfig) -> str:
    """Names a target in a few characters, such as "D256-V4096-L8-1f6e0d2c9b5a": a head fits the one it was trained for.

    The digest is of the last norm's scale and the first rows of the embedding, rounded to bfloat16: float32 and
    bfloat16 loads of a checkpoint agree (float16 may not), on any mesh. On a mesh all processes call it. Of params in
    codes, and of shapes alone, only the beginning is known, "D256-V4096-L8-".
    """
    sizes = f"D{config.width}-V{config.vocab_size}-L{len(config.layers)}-"
    if isinstance(params["embed"], (Weight, jax.ShapeDtypeStruct)):
        return sizes
    digest = hashlib.sha256()
    for array in mesh.fetch((params["norm"]["scale"], params["embed"][: min(ROWS, config.vocab_size)])):
        digest.update(array.astype(ml_dtypes.bfloat16).tobytes())
    return sizes + digest.hexdigest()[:12]
