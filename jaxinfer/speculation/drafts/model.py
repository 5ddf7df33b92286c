"""A model drafts: a second, smaller one with its own cache, or the target's own first layers on its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import models
from jaxinfer.cache import Cache, Step, Tree
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.model import Adapted, Decoder, Model, adapt
from jaxinfer.decoding.state import State
from jaxinfer.speculation.drafts.base import Draft, Round
from jaxinfer.speculation.drawing import Draw


@struct.dataclass
class ModelDraft(Draft):
    """A model of any family with the target's vocabulary; `model` for one that is no decoder (see `Model`).

    vocab: how many ids, from 0 on, mean the same to both, where they score different numbers of them (see
    `shared_vocabulary`).
    """

    params: Any
    config: ModelConfig = struct.field(pytree_node=False)
    model: Model | None = struct.field(pytree_node=False, default=None)
    vocab: int | None = struct.field(pytree_node=False, default=None)
    forks = True

    @property
    def known(self) -> int | None:
        """See `Draft`."""
        return self.vocab

    @property
    def runner(self) -> Decoder | Adapted:
        """What runs it."""
        return adapt(self.model, self.config)

    def check(self, config: ModelConfig) -> None:
        """See `Draft`."""
        own = self.config
        if self.vocab is None and (own.vocab_size, own.padded_vocab) != (config.vocab_size, config.padded_vocab):
            raise ValueError(
                f"the draft has {own.vocab_size} ids but the target {config.vocab_size}: take a draft with its "
                "tokenizer, or say with vocab= how many ids they share"
            )
        if self.vocab is not None and self.vocab > min(own.vocab_size, config.vocab_size):
            raise ValueError(
                f"vocab is {self.vocab} but the draft has {own.vocab_size} ids and the target {config.vocab_size}: "
                "they cannot share more than either has"
            )

    def begin(self, state: State, tree: Tree) -> Cache:
        """An empty cache."""
        rows, size = state.tokens.shape
        options = {} if self.model is not None else {"max_pending": tree.num_nodes}
        return self.runner.init_cache(rows, size, **options)

    def read(self, memory: Cache, state: State, ids: jax.Array, start: jax.Array, hidden: jax.Array | None) -> Cache:
        """Takes in as many tokens, but for the newest; what it lacked before is left to the next round."""
        return self.take_in(memory, state, state.length - 1, ids.shape[1])

    def take_in(self, cache: Cache, state: State, until: jax.Array, width: int) -> Cache:
        """A pass over the next `width` tokens of each row, up to `until` [B]."""
        ids, behind = self.next_tokens(cache, state, width), jnp.clip(until - cache.length, 0, width)
        return self.runner.read(self.params, ids, cache, cache.step(behind, width))[1].advance(behind)

    def next_tokens(self, cache: Cache, state: State, width: int) -> jax.Array:
        """The tokens [B, width] behind those that the cache holds."""
        place = jnp.minimum(cache.length[:, None] + jnp.arange(width), state.tokens.shape[1] - 1)
        return jnp.maximum(jnp.take_along_axis(state.tokens, place, 1), 0)

    def propose(self, memory: Cache, state: State, active: jax.Array, num: jax.Array, draw: Draw):
        """See `Draft`. The first pass also takes in the last draft of a round that kept them all."""
        until, width = jnp.where(active, state.length - 2, memory.length), draw.tree.num_nodes
        cache = jax.lax.while_loop(  # after rounds without a draft, or a long prompt, it may be far behind
            lambda cache: (cache.length < until).any(), lambda cache: self.take_in(cache, state, until, width), memory
        )
        behind = jnp.where(active, state.length - cache.length, 0)  # 1 or 2
        ids = self.next_tokens(cache, state, 2)
        scores, cache = self.runner.last(self.params, ids, cache, cache.step(behind, 2))
        cache = cache.advance(jnp.maximum(behind - 1, 0))  # the newest token stays pending, the root of what follows
        ids, logits, cache = draft_on(self.feed, scores, cache, num, draw)
        return ids, logits, num, cache, state

    def feed(self, ids: jax.Array, cache: Cache, num: jax.Array, tree: Tree, first: Any, last: Any):
        """See `draft_on`."""
        return self.runner.step(self.params, ids, cache, pending(cache, num, tree, first, last))

    def commit(self, memory: Cache, state: State, round: Round) -> Cache:
        """Keeps what it was fed of the tokens that stayed: not the newest, nor a last draft that was kept."""
        fed = jnp.where((round.num > 0).any(), jnp.maximum(round.num, 1), 0)  # where no row drafted, nothing at all
        stayed = jnp.minimum(round.emitted(state), fed)
        return memory.advance(stayed) if round.tree.is_chain else memory.commit(round.path, stayed)


@struct.dataclass
class LayersDraft(Draft):
    """The target's own first layers, under its own last norm and head, on its own cache (self-speculation).

    What they write is what the verifying pass writes again: the keys and values of the first layers.
    """

    params: Any
    config: ModelConfig = struct.field(pytree_node=False)
    layers: int = struct.field(pytree_node=False, default=2)
    forks = True

    def check(self, config: ModelConfig) -> None:
        """See `Draft`."""
        if not 1 <= self.layers < len(config.layers):
            raise ValueError(
                f"the draft takes the first {self.layers} layers but the target has {len(config.layers)}: "
                f"take 1 to {len(config.layers) - 1}"
            )

    def propose(self, memory: Any, state: State, active: jax.Array, num: jax.Array, draw: Draw):
        """See `Draft`."""
        now = (active & (num > 0)).astype(jnp.int32)
        scores, cache = self.feed(state.newest[:, None], state.cache, now, Tree.chain(1), 0, 1)
        ids, logits, cache = draft_on(self.feed, scores[:, 0], cache, num, draw)
        return ids, logits, num, memory, state.replace(cache=cache)

    def feed(self, ids: jax.Array, cache: Cache, num: jax.Array, tree: Tree, first: Any, last: Any):
        """See `draft_on`."""
        step = pending(cache, num, tree, first, last)
        (hidden, _), cache = models.decoder(self.params, self.config, ids, cache, step, (0, self.layers))
        return models.logits(self.params, self.config, hidden), cache


def pending(cache: Cache, num: jax.Array, tree: Tree, first: Any, last: Any, root: int = 0) -> Step:
    """The step of a draft's call with the nodes [first, last), `num` [B] of them valid; of a chain, with one."""
    if tree.is_chain:
        return cache.step(num, 1, start=cache.length + first - root)
    return cache.branch(num, tree, first, last, root)


def draft_on(
    feed: Callable, scores: jax.Array, carry: Any, num: jax.Array, draw: Draw
) -> tuple[jax.Array, jax.Array, Any]:
    """Draws from scores [B, V] and goes on by feeding what was drawn: (ids [B, M], logits [B, M, V], carry).

    feed: (ids [B, n], carry, num [B], tree, first, last) -> (scores [B, n, V], carry) of the nodes [first, last), of a
    chain one, whose number may be traced. Of a chain as many passes as the row that drafts most asks for.
    """
    tree = draw.tree
    ids = jnp.zeros((len(num), tree.num_nodes - 1), jnp.int32)
    if tree.is_chain:
        return draft_chain(feed, scores, carry, num, draw, ids)
    scores, parts = scores[:, None], []
    for depth in range(tree.height):
        found, used = draw.children(scores, ids, depth)
        first, last = tree.level(depth + 1)
        ids, parts = ids.at[:, first - 1 : last - 1].set(found), [*parts, used]
        if depth + 1 < tree.height:
            scores, carry = feed(found, carry, jnp.where(num > depth + 1, last - first, 0), tree, first, last)
    return ids, jnp.concatenate(parts, 1), carry


def draft_chain(
    feed: Callable, scores: jax.Array, carry: Any, num: jax.Array, draw: Draw, ids: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """`draft_on` of a chain."""
    token, used = draw.next(scores, ids, 0)
    ids = ids.at[:, 0].set(token)
    logits = jnp.zeros((*ids.shape, used.shape[-1]), used.dtype).at[:, 0].set(used)

    def more(i: jax.Array, state: tuple) -> tuple:
        ids, logits, carry = state
        newest = jax.lax.dynamic_index_in_dim(ids, i - 1, 1)
        scores, carry = feed(newest, carry, (i < num).astype(jnp.int32), draw.tree, i, i + 1)
        token, used = draw.next(scores[:, 0], ids, i)
        return ids.at[:, i].set(token), logits.at[:, i].set(used), carry

    return jax.lax.fori_loop(1, jnp.max(num, initial=0), more, (ids, logits, carry))
