"""The same model made otherwise, to measure what its usual form is worth: without a cache, without groups of heads.

    params, config = variants.ungrouped(params, config)
    result = jaxinfer.generate(params, config, ids, model=variants.Uncached(config))

Both say what the model says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import models
from jaxinfer.cache import Cache, LayerCache, Step, init_cache
from jaxinfer.config import LayerSpec, ModelConfig


def ungrouped(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """Params and config with a KV head of its own for every query head: K = N, each KV head repeated G times.

    Plain canonical params only; what has no letter K is shared with the params that were given.
    """
    words = models.letters(config)["layers"]
    layers = tuple(
        jax.tree.map(lambda x, word, spec=spec: repeated(x, word, spec), p, own)
        for p, own, spec in zip(params["layers"], words, config.layers, strict=True)
    )
    return params | {"layers": layers}, ungrouped_config(config)


def ungrouped_config(config: ModelConfig) -> ModelConfig:
    """The config of such params."""
    return config.replace(layers=tuple(spec.replace(num_kv_heads=spec.num_heads) for spec in config.layers))


def repeated(x: jax.Array, word: str, spec: LayerSpec) -> jax.Array:
    """An array with these letters, each KV head as often as query heads share it."""
    copies = spec.num_heads // spec.num_kv_heads
    return jnp.repeat(x, copies, word.index("K")) if "K" in word and copies > 1 else x


@struct.dataclass
class Ids(LayerCache):
    """A row's ids, in place of keys and values."""

    ids: jax.Array  # [B, S]

    trees = False

    def letters(self) -> Ids:
        """See `LayerCache`."""
        return Ids("B_")  # type: ignore[arg-type]

    def move(self, source: jax.Array, target: jax.Array, pages: Any) -> Ids:
        """See `LayerCache`."""
        raise ValueError("ids alone hold no draft tree")

    def attend(self, *_: Any) -> Any:
        """See `LayerCache`."""
        raise ValueError("ids are no keys and values: nothing attends to them")


@dataclasses.dataclass(frozen=True)
class Uncached:
    """The decoder without a cache, for `generate(model=)`: every step is a forward over all S places of its rows.

    The places behind a row's end are pads: each token costs the same, that of a forward over S.
    """

    config: ModelConfig

    def init_cache(self, rows: int, size: int) -> Cache:
        """See `Model`."""
        return Cache((Ids(jnp.zeros((rows, size), jnp.int32)),), jnp.zeros(rows, jnp.int32), size=size)

    def step(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Cache]:
        """See `Model`."""
        put = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))
        held = put(cache.layers[0].ids, step.position, ids)  # type: ignore[attr-defined]
        rows, size = held.shape
        nothing = init_cache(self.config, rows, size, "none")
        (hidden, _), _ = models.decoder(params, self.config, held, nothing, nothing.step(step.end, size))
        place = jnp.minimum(step.position, size - 1)[..., None]  # a pad's is past any
        scores = models.logits(params, self.config, jnp.take_along_axis(hidden, place, 1))
        return scores, cache.replace(layers=(Ids(held),))
