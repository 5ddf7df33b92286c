"""What the loops ask of a model."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxinfer import models
from jaxinfer.cache import Cache, Step, init_cache
from jaxinfer.config import ModelConfig


class Model(Protocol):
    """Anything that `generate(model=...)` can run: hashable, because it is a static argument of the program.

    A model without keys and values (a table, a recurrent toy) gives a `Cache` whose `layers` is any pytree of its own.
    """

    def init_cache(self, rows: int, size: int) -> Cache:
        """An empty memory for `rows` rows of up to `size` tokens."""
        ...

    def step(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Cache]:
        """Scores [B, T, V] of the token after each of ids [B, T], which become pending in the cache."""
        ...


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The decoder of `models` as a `Model`, with scores made only where they are asked for."""

    config: ModelConfig

    @property
    def vocab(self) -> int | None:
        """V, without the padding of a mesh."""
        return self.config.vocab_size

    @property
    def columns(self) -> int | None:
        """Of its scores: V with that padding."""
        return self.config.padded_vocab

    def init_cache(self, rows: int, size: int, **options: Any) -> Cache:
        """See `jaxinfer.init_cache`."""
        return init_cache(self.config, rows, size, **options)

    def step(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Cache]:
        """Scores of every token, zeros for pads."""
        scores, _, cache = self.look(params, ids, cache, step)
        return scores, cache

    def look(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, jax.Array | None, Cache]:
        """(scores [B, T, V], the hidden states [B, T, D] they were made from, cache)."""
        (hidden, _), cache = models.decoder(params, self.config, ids, cache, step)
        scores = models.logits(params, self.config, hidden)
        return jnp.where(step.valid[..., None], scores, 0), hidden, cache

    def last(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Cache]:
        """Scores [B, V] of each row's last valid token; zeros for a row without one."""
        (hidden, _), cache = models.decoder(params, self.config, ids, cache, step)
        scores = models.logits(params, self.config, last_valid(hidden, step))[:, 0]
        return jnp.where(step.num[:, None] > 0, scores, 0), cache

    def read(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array | None, Cache]:
        """Remembers, without scores: (hidden states [B, T, D], cache)."""
        (hidden, _), cache = models.decoder(params, self.config, ids, cache, step)
        return hidden, cache


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A research model, which knows `step` alone, with the rest of what the loops ask."""

    model: Model
    vocab = columns = None  # as many ids as it scores

    def init_cache(self, rows: int, size: int, **options: Any) -> Cache:
        """The model's own; it knows what it can take back, so the options are not for it."""
        return self.model.init_cache(rows, size)

    def step(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Cache]:
        """Scores [B, T, V] of every token, zeros for pads."""
        scores, cache = self.model.step(params, ids, cache, step)
        return jnp.where(step.valid[..., None], scores, 0), cache

    def last(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, Cache]:
        """Scores [B, V] of each row's last valid token."""
        scores, cache = self.model.step(params, ids, cache, step)
        return last_valid(scores, step)[:, 0], cache

    def look(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array, jax.Array | None, Cache]:
        """Scores [B, T, V]; there are no hidden states to see."""
        scores, cache = self.step(params, ids, cache, step)
        return scores, None, cache

    def read(self, params: Any, ids: jax.Array, cache: Cache, step: Step) -> tuple[jax.Array | None, Cache]:
        """Only remembers."""
        return None, self.model.step(params, ids, cache, step)[1]


def last_valid(x: jax.Array, step: Step) -> jax.Array:
    """x [B, T, ...] at each row's last valid token: [B, 1, ...]."""
    last = jnp.maximum(step.num - 1, 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.take_along_axis(x, last, 1)


def adapt(model: Model | None, config: ModelConfig) -> Decoder | Adapted:
    """The decoder by default, a research model where one is given."""
    return Decoder(config) if model is None else Adapted(model)
