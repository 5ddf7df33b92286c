"""A model drafts: a second, smaller one with its own cache, or the target's own first layers on its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import models
from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.model import Adapted, Decoder, Model, adapt
from jaxinfer.decoding.state import State
from jaxinfer.speculation.drafts.base import Draw


@struct.dataclass
class ModelDraft:
    """A model of any family with the target's vocabulary; `model` for one that is no decoder (see `Model`)."""

    params: Any
    config: ModelConfig = struct.field(pytree_node=False)
    model: Model | None = struct.field(pytree_node=False, default=None)

    @property
    def runner(self) -> Decoder | Adapted:
        """What runs it."""
        return adapt(self.model, self.config)

    def begin(self, state: State, width: int, J: int) -> Cache:
        """A cache that holds every token but the newest of each row."""
        tokens, size = jnp.maximum(state.tokens[:, :width], 0), state.tokens.shape[1]
        options = {} if self.model is not None else {"max_pending": J + 1}
        cache = self.runner.init_cache(len(tokens), size, **options)
        known = jnp.maximum(state.length - 1, 0)
        return self.runner.read(self.params, tokens, cache, cache.step(known, width)).advance(known)

    def propose(self, memory: Cache, state: State, active: jax.Array, num: jax.Array, J: int, draw: Draw):
        """See `Draft`. One pass a token; the first also takes in the last draft of a round that kept them all."""
        behind = jnp.where(active, state.length - memory.length, 0)  # 1 or 2
        place = jnp.minimum(memory.length[:, None] + jnp.arange(2), state.length[:, None] - 1)
        news = jnp.maximum(jnp.take_along_axis(state.tokens, jnp.maximum(place, 0), 1), 0)
        scores, cache = self.runner.last(self.params, news, memory, memory.step(behind, 2))
        return *draft_on(self.feed, scores, cache, state, num, J, draw), state

    def feed(self, ids: jax.Array, cache: Cache, now: jax.Array, start: jax.Array) -> tuple[jax.Array, Cache]:
        """Scores [B, V] after ids [B] at `start` [B], of the rows with now [B] = 1."""
        return self.runner.last(self.params, ids[:, None], cache, cache.step(now, 1, start=start))

    def commit(self, memory: Cache, before: State, state: State, num: jax.Array) -> Cache:
        """Keeps what it was fed of the tokens that stayed: not the newest, nor a last draft that was kept."""
        fed = before.length + jnp.maximum(num - 1, 0)
        length = jnp.where(state.length > before.length, jnp.minimum(fed, state.length - 1), memory.length)
        return memory.advance(length - memory.length)


@struct.dataclass
class LayersDraft:
    """The target's own first layers, under its own last norm and head, on its own cache (self-speculation).

    What they write is what the verifying pass writes again: the keys and values of the first layers.
    """

    params: Any
    config: ModelConfig = struct.field(pytree_node=False)
    layers: int = struct.field(pytree_node=False, default=2)

    def begin(self, state: State, width: int, J: int) -> Any:
        """Nothing: the cache is the target's."""
        return ()

    def propose(self, memory: Any, state: State, active: jax.Array, num: jax.Array, J: int, draw: Draw):
        """See `Draft`."""
        now = (active & (num > 0)).astype(jnp.int32)
        scores, cache = self.feed(state.newest, state.cache, now, state.length - 1)
        ids, logits, num, cache = draft_on(self.feed, scores, cache, state, num, J, draw)
        return ids, logits, num, memory, state.replace(cache=cache)

    def feed(self, ids: jax.Array, cache: Cache, now: jax.Array, start: jax.Array) -> tuple[jax.Array, Cache]:
        """Scores [B, V] after ids [B] at `start` [B], of the rows with now [B] = 1."""
        step = cache.step(now, 1, start=start)
        (hidden, _), cache = models.decoder(self.params, self.config, ids[:, None], cache, step, (0, self.layers))
        return models.logits(self.params, self.config, hidden)[:, 0], cache

    def commit(self, memory: Any, before: State, state: State, num: jax.Array) -> Any:
        """Nothing."""
        return memory


def draft_on(
    feed: Callable, scores: jax.Array, cache: Cache, state: State, num: jax.Array, J: int, draw: Draw
) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
    """Draws the first token from scores [B, V] and feeds each to draw the next: (ids, logits, num, cache).

    As many passes as the row that drafts most asks for: the loop's length is traced.
    """
    ids = jnp.zeros((len(num), J), jnp.int32)
    token, used = draw(scores, ids, 0)
    ids = ids.at[:, 0].set(token)
    logits = jnp.zeros((len(num), J, used.shape[-1]), used.dtype).at[:, 0].set(used)

    def more(i: jax.Array, carry: tuple) -> tuple:
        ids, logits, cache = carry
        newest = jax.lax.dynamic_index_in_dim(ids, i - 1, 1, keepdims=False)
        scores, cache = feed(newest, cache, (i < num).astype(jnp.int32), state.length - 1 + i)
        token, used = draw(scores, ids, i)
        return ids.at[:, i].set(token), logits.at[:, i].set(used), cache

    ids, logits, cache = jax.lax.fori_loop(1, jnp.max(num, initial=0), more, (ids, logits, cache))
    return ids, logits, num, cache
