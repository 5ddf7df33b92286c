"""How a draft draws: with the processors of the target, and with noise that the rule knows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import sampling as draws
from jaxinfer.cache import Tree
from jaxinfer.decoding.generate import Process, edited
from jaxinfer.decoding.state import State
from jaxinfer.sampling import Sampling
from jaxinfer.speculation.acceptance import Rule
from jaxinfer.speculation.verify import place, purpose, repeat


@dataclasses.dataclass(frozen=True)
class Shared:
    """What target and draft of a round have in common."""

    tree: Tree
    sampling: Sampling
    key: jax.Array
    process: Process | None
    rule: Rule
    vocab: int | None  # V without a mesh's padding; what `process` sees
    known: int | None = None  # ids that both know, where they score different numbers of them; no others are drawn
    width: int | None = None  # columns of the target's scores, padding included

    def fitted(self, scores: jax.Array) -> jax.Array:
        """Scores [..., V] of either, as wide as the target's, with -inf where only one of them knows an id."""
        if self.known is None or self.width is None:
            return scores
        cut = scores[..., : self.width]
        more = [(0, 0)] * (scores.ndim - 1) + [(0, self.width - cut.shape[-1])]
        return jnp.where(jnp.arange(self.width) < self.known, jnp.pad(cut, more), -jnp.inf)

    def processed(self, scores: jax.Array, state: State, ids: jax.Array, nodes: np.ndarray) -> jax.Array:
        """Scores [B, n, V] after n nodes of the tree, through all processors, each with the drafts before it.

        state: before the round. ids [B, M]: the drafts so far.
        """
        B, n, V = scores.shape
        scores, depth = self.fitted(scores), self.tree.depth[nodes]
        path = jnp.pad(ids, ((0, 0), (1, 0)))[:, self.tree.paths[nodes]]  # [B, n, D]
        if self.process is not None:
            count = jnp.zeros_like(state.length)
            after = [state.append(path[:, i], count + depth[i]) for i in range(n)]
            each = [edited(self.process, scores[:, i], after[i], self.vocab) for i in range(n)]
            scores = jnp.stack(each, 1)
        bare = State(None, state.tokens, state.length, state.prompt, state.finish)  # type: ignore[arg-type]
        rows = repeat(bare, n).append(path.reshape(B * n, self.tree.height), jnp.tile(jnp.asarray(depth), B))
        controls = repeat(self.sampling, n)
        flat = draws.process(scores.reshape(B * n, -1), controls, rows.tokens, rows.length, rows.prompt)
        return flat.reshape(B, n, -1)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Makes every draw of a round's drafts. `tree` is what is to be drafted; of a chain, `tree.height` is J."""

    shared: Shared
    state: State  # before the round

    @property
    def tree(self) -> Tree:
        """What is to be drafted."""
        return self.shared.tree

    def next(self, scores: jax.Array, ids: jax.Array, count: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Of a chain: scores [B, V] after `count` of ids [B, J] give the next id [B], and what it was drawn from."""
        shared, state = self.shared, self.state
        so_far = state.append(ids, jnp.broadcast_to(count, state.length.shape))
        scores = edited(shared.process, shared.fitted(scores), so_far, shared.vocab)
        processed = draws.process(scores, shared.sampling, so_far.tokens, so_far.length, so_far.prompt)
        where = place(shared.rule, state.length, count)
        token = draws.sample(processed, shared.sampling, shared.key, where, purpose(shared.rule))
        return token, self.used(processed)

    def children(self, scores: jax.Array, ids: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
        """Of a tree: scores [B, n, V] after the n nodes of `depth` give the m ids [B, m] of the next level.

        ids [B, M]: the nodes so far. Also what each was drawn from [B, m, V], before its elder siblings are left out.
        """
        tree, rule, (first, last), (begin, end) = self.tree, self.shared.rule, *map(self.tree.level, (depth, depth + 1))
        nodes, parents = np.arange(first, last), np.array(tree.parents[begin - 1 : end - 1]) - first
        rank = tree.rank[begin:end]
        B, n = scores.shape[:2]
        processed = self.shared.processed(scores, self.state, ids, nodes)
        spot = jnp.tile(jnp.asarray(tree.depth[nodes] if rule == "shared" else nodes), B)
        where = place(rule, jnp.repeat(self.state.length, n), spot)
        flat, controls = processed.reshape(B * n, -1), repeat(self.shared.sampling, n)
        best = draws.candidates(flat, controls, self.shared.key, where, purpose(rule), int(rank.max()) + 1)
        return best.reshape(B, n, -1)[:, parents, rank], self.used(processed)[:, parents]

    def used(self, processed: jax.Array) -> jax.Array:
        """What was drawn from; a rule that needs no probabilities keeps none."""
        return processed if self.shared.rule != "shared" else processed[..., :0]
