"""From the target's scores of a drafted block to the tokens that are emitted, by one of the three rules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import mesh
from jaxinfer import sampling as draws
from jaxinfer.sampling import ACCEPT, DRAFT, RESIDUAL, TOKEN, Sampling
from jaxinfer.speculation.acceptance import Rule, agree, count, law

MAX_DRAFT = 64  # places a round may have


def repeat(tree: Any, times: int) -> Any:
    """Every row of [B, ...] so many times, one after the other: what J positions of a row have in common."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, 0), tree)


def purpose(rule: Rule) -> int:
    """What a draft's draw is for: the target's own draw where both share their noise."""
    return TOKEN if rule == "shared" else DRAFT


def place(rule: Rule, start: jax.Array, i: Any) -> jax.Array:
    """What keys the i-th draft's draw, and whether it is kept, in a round that starts at position `start` [B].

    The shared rule: its position, as the target's own draw. The others: round and place. A round that ends early has
    looked at drafts behind its end (the block rule at all of them), so that the next one must not draw with their
    noise again: keyed by position alone, the emitted tokens had another law than the target's.
    """
    return start + i if rule == "shared" else start * MAX_DRAFT + i


def verify(
    rule: Rule,
    processed: jax.Array,
    scores: jax.Array,
    ids: jax.Array,
    logits: jax.Array | None,
    num: jax.Array,
    sampling: Sampling,
    key: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(kept [B], tokens [B, J + 1], logprobs [B, J + 1]): the first `kept` drafts and one token more are emitted.

    processed, scores [B, J + 1, V]: the target's, with and without the processors. ids [B, J]: the drafts, of which num
    [B] count; logits [B, J, V] what they were drawn from, None for a point mass. length [B]: of the rows so far.
    """
    B, T, V = processed.shape
    if rule == "shared":
        position = (length[:, None] + jnp.arange(T)).reshape(-1)
        drawn_from, scored = processed.reshape(B * T, V), scores.reshape(B * T, V)
        tokens, logprobs = draws.choose(drawn_from, scored, repeat(sampling, T), key, position)
        tokens = tokens.reshape(B, T)
        return agree(ids, tokens, num), tokens, logprobs.reshape(B, T)
    words = ("B_V", None if logits is None else "B_V", "B_", "B", "B", "B", "_", "B")
    kept, last = draws.split(
        lambda *parts: by_law(rule, *parts), words, ("B", "B"),
        processed, logits, ids, num, sampling.temperature, sampling.seed, jax.random.key_data(key), length,
    )  # fmt: skip
    drafted = jnp.pad(ids, ((0, 0), (0, 1)))
    tokens = jnp.where(jnp.arange(T) < kept[:, None], drafted, last[:, None])
    logprobs = draws.logprobs(scores.reshape(B * T, V), tokens.reshape(-1))
    return kept, tokens, logprobs.reshape(B, T)


def by_law(
    rule: Rule,
    processed: jax.Array,
    logits: jax.Array | None,
    ids: jax.Array,
    num: jax.Array,
    temperature: jax.Array,
    seed: jax.Array,
    key: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(kept [B], the token after them [B]) of a device's part of the vocabulary, by the token or block rule."""
    B, T, V = processed.shape
    greedy = temperature < draws.GREEDY
    best = draws.best_ids(processed.reshape(B * T, V)).reshape(B, T)
    p = jnp.where(greedy[:, None, None], one_hot(best, V), probabilities(processed))
    q = one_hot(ids, V)
    if logits is not None:
        q = jnp.where(greedy[:, None, None], q, probabilities(logits))
    q = jnp.where((jnp.arange(T - 1) < num[:, None])[..., None], q, 0)
    accept, residual = law(rule, p, q, ids)
    uniforms = jnp.stack([draws.uniform(key, seed, place(rule, length, i), ACCEPT) for i in range(T - 1)], 1)
    kept = jnp.minimum(count(accept, uniforms), num)
    rest = jnp.take_along_axis(residual, kept[:, None, None], 1)[:, 0]
    noise = draws.noise(key, seed, length + kept, RESIDUAL, V, mesh.start("V", V))
    noise = jnp.where(greedy[:, None], 0, noise)
    return kept, draws.best_ids(jnp.log(rest) + noise)


def probabilities(logits: jax.Array) -> jax.Array:
    """softmax over the whole vocabulary, of a device's part."""
    top = mesh.largest(logits.max(-1, keepdims=True), "V")
    weight = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = mesh.total(weight.sum(-1, keepdims=True), "V")
    return weight / jnp.where(total > 0, total, 1)


def one_hot(ids: jax.Array, V: int) -> jax.Array:
    """1 at each id, in a device's part of the vocabulary."""
    return (ids[..., None] == mesh.start("V", V) + jnp.arange(V)).astype(jnp.float32)
