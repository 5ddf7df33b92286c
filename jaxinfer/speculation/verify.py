"""From the target's scores of a drafted block to the tokens that are emitted, by one of the three rules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import mesh
from jaxinfer import sampling as draws
from jaxinfer.cache import Tree
from jaxinfer.sampling import ACCEPT, DRAFT, RESIDUAL, TOKEN, Sampling
from jaxinfer.speculation.acceptance import Rule, agree, law, siblings, walk

MAX_DRAFT = 64  # places a round may have


def repeat(tree: Any, times: int) -> Any:
    """Every row of [B, ...] so many times, one after the other: what J positions of a row have in common."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, 0), tree)


def purpose(rule: Rule) -> int:
    """What a draft's draw is for: the target's own draw where both share their noise."""
    return TOKEN if rule == "shared" else DRAFT


def place(rule: Rule, start: jax.Array, i: Any) -> jax.Array:
    """What keys the draws after node i, and whether node i + 1 is kept, in a round that starts at position `start` [B].

    The shared rule: its position, as the target's own draw. The others: round and place. A round that ends early has
    looked at drafts behind its end (the block rule at all of them), so that the next one must not draw with their
    noise again: keyed by position alone, the emitted tokens had another law than the target's.
    """
    return start + i if rule == "shared" else start * MAX_DRAFT + i


def verify(
    rule: Rule,
    tree: Tree,
    processed: jax.Array,
    scores: jax.Array,
    ids: jax.Array,
    logits: jax.Array | None,
    num: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(kept [B], path [B, D + 1], tokens [B, D + 1], logprobs [B, D + 1]): kept + 1 tokens are emitted.

    processed, scores [B, M + 1, V]: the target's after each node, with and without the processors. ids [B, M]: the
    drafts, of which those down to depth num [B] count; logits [B, M, V] what they were drawn from, None for point
    masses. length [B]: of the rows so far. path: the nodes that are kept, node 0 (the newest token) first.
    """
    B, T, V = processed.shape
    drafted = tree.depth[1:] <= num[:, None]
    if rule == "shared":
        position = (length[:, None] + tree.depth).reshape(-1)
        drawn_from, scored = processed.reshape(B * T, V), scores.reshape(B * T, V)
        tokens, logprobs = (
            x.reshape(B, T) for x in draws.choose(drawn_from, scored, repeat(sampling, T), key, position)
        )
        kept, path = walk(agree(ids, tokens, tree) & drafted, tree)
        return kept, path, along(tokens, path, tree), along(logprobs, path, tree)
    words = ("B_V", None if logits is None else "B_V", "B_", "B_", "B", "B", "_", "B")
    kept, path, last = draws.split(
        lambda *parts: by_law(rule, tree, *parts), words, ("B", "B_", "B"),
        processed, logits, ids, drafted, sampling.temperature, sampling.seed, jax.random.key_data(key), length,
    )  # fmt: skip
    after = jnp.pad(jnp.take_along_axis(ids, jnp.maximum(path[:, 1:] - 1, 0), 1), ((0, 0), (0, 1)))
    tokens = jnp.where(jnp.arange(tree.height + 1) < kept[:, None], after, last[:, None])
    scored = along(scores, path, tree)
    logprobs = draws.logprobs(scored.reshape(-1, V), tokens.reshape(-1))
    return kept, path, tokens, logprobs.reshape(tokens.shape)


def along(x: jax.Array, path: jax.Array, tree: Tree) -> jax.Array:
    """x [B, M + 1, ...] of all nodes at those of a path [B, D + 1]; of a chain all are."""
    return x if tree.is_chain else jnp.take_along_axis(x, path.reshape(*path.shape, *[1] * (x.ndim - 2)), 1)


def by_law(
    rule: Rule,
    tree: Tree,
    processed: jax.Array,
    logits: jax.Array | None,
    ids: jax.Array,
    drafted: jax.Array,
    temperature: jax.Array,
    seed: jax.Array,
    key: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(kept [B], path, the token after them [B]) of a device's part of the vocabulary, by the token or block rule."""
    B, T, V = processed.shape
    greedy = temperature < draws.GREEDY
    best = draws.best_ids(processed.reshape(B * T, V)).reshape(B, T)
    p = jnp.where(greedy[:, None, None], one_hot(best, V), probabilities(processed))
    q = one_hot(ids, V)
    if logits is not None:
        q = jnp.where(greedy[:, None, None], q, siblings(probabilities(logits), ids, tree))
    q = jnp.where(drafted[..., None], q, 0)
    accept, residual = law(rule, p, q, ids, tree)
    uniforms = [draws.uniform(key, seed, place(rule, length, i), ACCEPT) for i in range(T - 1)]
    ok = jnp.stack(uniforms, 1) < accept if uniforms else accept > 0
    kept, path = walk(ok & drafted, tree)
    end = jnp.take_along_axis(path, kept[:, None], 1)[..., None]
    rest = jnp.take_along_axis(residual, end, 1)[:, 0]
    noise = draws.noise(key, seed, length + kept, RESIDUAL, V, mesh.start("V", V))
    noise = jnp.where(greedy[:, None], 0, noise)
    return kept, path, draws.best_ids(jnp.log(rest) + noise)


def probabilities(logits: jax.Array) -> jax.Array:
    """softmax over the whole vocabulary, of a device's part."""
    top = mesh.largest(logits.max(-1, keepdims=True), "V")
    weight = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = mesh.total(weight.sum(-1, keepdims=True), "V")
    return weight / jnp.where(total > 0, total, 1)


def one_hot(ids: jax.Array, V: int) -> jax.Array:
    """1 at each id, in a device's part of the vocabulary."""
    return (ids[..., None] == mesh.start("V", V) + jnp.arange(V)).astype(jnp.float32)
