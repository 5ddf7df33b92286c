"""A head drafts: one layer that reads the target's last hidden states (EAGLE; multi-token prediction)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import mesh, models
from jaxinfer.cache import Cache, Tree, init_cache
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.model import last_valid
from jaxinfer.decoding.state import State
from jaxinfer.speculation.drafts.base import Draft, Round
from jaxinfer.speculation.drafts.model import draft_on, pending
from jaxinfer.speculation.drawing import Draw
from jaxinfer.speculation.verify import along


@struct.dataclass
class Held:
    """What a head remembers of its rows."""

    cache: Cache  # its slot s holds the target's hidden state at s, together with token s + 1
    newest: jax.Array  # [B, D] what it made of the last slot: a guess at the target's hidden state of the newest token


@struct.dataclass
class HeadDraft(Draft):
    """One decoder layer over (hidden state of a token, embedding of the next), trained for this target.

    Li et al. 2024 (EAGLE), DeepSeek-AI 2024 (DeepSeek-V3, 2.2). Embedding and head are the target's own.
    params, config: see `weights.load_head`; target, target_config: the params and config of the target.
    """

    params: Any
    target: Any
    config: ModelConfig = struct.field(pytree_node=False)
    target_config: ModelConfig = struct.field(pytree_node=False)
    forks = True

    def check(self, config: ModelConfig) -> None:
        """See `Draft`."""
        if self.config.width != config.width:
            raise ValueError(
                f"the head is for hidden states of width {self.config.width} but the target's have {config.width}: "
                "take a head that was trained for this target"
            )

    def begin(self, state: State, tree: Tree) -> Held:
        """Nothing is known yet."""
        rows, size = state.tokens.shape
        cache = init_cache(self.config, rows, size, max_pending=tree.num_nodes)
        newest = jnp.zeros((len(cache.length), self.config.width), jnp.dtype(self.config.dtype))
        return Held(cache, mesh.constrain(newest, "BD"))

    def read(self, memory: Held, state: State, ids: jax.Array, start: jax.Array, hidden: jax.Array | None) -> Held:
        """Takes in the hidden states of what the target has read, each with the token that follows."""
        if hidden is None:
            hidden, start = self.recall(state), jnp.zeros_like(start)
        return self.take_in(memory, state, hidden, jnp.maximum(state.length - 1 - start, 0))

    def recall(self, state: State) -> jax.Array:
        """The target's hidden states [B, S, D] of all tokens, once more."""
        known = jnp.maximum(state.length - 1, 0)
        rows, size = state.tokens.shape
        cache = init_cache(self.target_config, rows, size)
        ids = jnp.maximum(state.tokens, 0)
        (hidden, _), _ = models.decoder(self.target, self.target_config, ids, cache, cache.step(known, size))
        return hidden

    def take_in(self, memory: Held, state: State, hidden: jax.Array, num: jax.Array) -> Held:
        """The first num [B] of hidden [B, T, D], the states behind those taken in so far, each with its next token."""
        T = hidden.shape[1]
        place = jnp.minimum(memory.cache.length[:, None] + 1 + jnp.arange(T), state.tokens.shape[1] - 1)
        ids = jnp.maximum(jnp.take_along_axis(state.tokens, place, 1), 0)
        step = memory.cache.step(num, T)
        made, cache = models.head(
            self.params, self.config, self.target, self.target_config, ids, hidden, memory.cache, step
        )
        newest = jnp.where((num > 0)[:, None], last_valid(made, step)[:, 0], memory.newest)
        return Held(cache.advance(num), newest.astype(memory.newest.dtype))

    def propose(self, memory: Held, state: State, active: jax.Array, num: jax.Array, draw: Draw):
        """See `Draft`. A row of one token has no hidden state yet, and no draft."""
        num = jnp.where(memory.cache.length > 0, num, 0)
        scores = self.scores(memory.newest[:, None])[:, 0]
        ids, logits, (cache, _) = draft_on(self.feed, scores, (memory.cache, memory.newest[:, None]), num, draw)
        return ids, logits, num, memory.replace(cache=cache), state  # type: ignore[attr-defined]

    def scores(self, made: jax.Array) -> jax.Array:
        """[B, T, V] of what it made [B, T, D]."""
        return models.head_logits(self.params, self.target, self.target_config, made)

    def feed(self, ids: jax.Array, carry: tuple[Cache, jax.Array], num: jax.Array, tree: Tree, first: Any, last: Any):
        """See `draft_on`; a node takes what was made of the node before it in place of a hidden state."""
        cache, made = carry
        if not tree.is_chain:
            begin = tree.level(int(tree.depth[first]) - 1)[0]
            made = made[:, [tree.parents[node - 1] - begin for node in range(first, last)]]
        step = pending(cache, num, tree, first, last, root=1)
        made, cache = models.head(self.params, self.config, self.target, self.target_config, ids, made, cache, step)
        return self.scores(made), (cache, made)

    def commit(self, memory: Held, state: State, round: Round) -> Held:
        """What it guessed is dropped; the target's own hidden states of the path take its place."""
        if round.hidden is None:
            raise ValueError("a head reads hidden states, which a model= has not: take another draft")
        return self.take_in(memory, state, along(round.hidden, round.path, round.tree), round.emitted(state))
