"""Which drafted tokens are kept, and what is drawn in place of the first that is not: the rule, alone.

    accept, residual = law("token", p, q, draft)      # the exact probabilities, in the dtype of p
    kept = count(accept, uniforms)                     # how many; the next token comes from residual[kept]

A round drafts x_1 .. x_J from q and scores them with one pass of the target, p_1 .. p_{J+1}. It keeps the first n of
them and emits one token more: x_1 .. x_n, y. The emitted tokens have the law of the target, whatever the draft is:

- `token` (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): x_i is kept with probability min(1, p_i / q_i)
  while all before it are; y comes from norm(max(p - q, 0)) at the first that is not, from p_{J+1} after all of them.
- `block` (Sun et al. 2024, algorithm 2): keeps at least as many on average, by deciding about the whole block.

Both are given as the probability that x_i is kept when all before it are, so that one way of drawing serves both.
`shared` is no law of this kind: draft and target are drawn with the same noise, and what agrees is kept (`agree`).

A greedy or point-mass draft is a q that is 1 at the draft. A row that drafts fewer than J has q = 0 from there on: it
keeps none of these, and its residual is p. So rejection, bonus token and no draft are one expression.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxinfer import mesh

Rule = Literal["shared", "token", "block"]
RULES = ("shared", "token", "block")


def law(rule: Rule, p: jax.Array, q: jax.Array, draft: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The exact law of a round, given its draft.

    p [..., J + 1, V], q [..., J, V]: probabilities of target and draft, q zeros where nothing was drafted. draft
    [..., J]. Gives accept [..., J], the probability that a draft is kept when all before it are, and residual
    [..., J + 1, V], the distribution of the token after the kept ones. V may be a device's part of the vocabulary.
    """
    if rule not in ("token", "block"):
        raise ValueError(f"the rule {rule!r} has no law of its own: take token or block")
    chosen_p, chosen_q = at(p[..., :-1, :], draft), at(q, draft)
    ratio = jnp.where(chosen_q > 0, chosen_p / jnp.where(chosen_q > 0, chosen_q, 1), 0)
    q = jnp.concatenate([q, jnp.zeros_like(q[..., :1, :])], -2)
    if rule == "token":
        kept, accept = jnp.ones_like(p[..., 0]), jnp.minimum(ratio, 1)
    else:
        kept, accept = block(p, q, ratio)
    rest = jnp.maximum(kept[..., None] * p - q, 0)
    mass = mesh.total(rest.sum(-1, keepdims=True), "V")
    # nothing is left where p = q, but for rounding: then p itself is right
    return accept, jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1), p)


def block(p: jax.Array, q: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of block verification: P_0 .. P_J, and the probability that x_i is kept when all before it are."""
    steps = [jnp.ones_like(ratio[..., 0])]
    for i in range(ratio.shape[-1]):
        steps.append(jnp.minimum(steps[-1] * ratio[..., i], 1))
    kept = jnp.stack(steps, -1)  # [..., J + 1]
    left = mesh.total(jnp.maximum(kept[..., None] * p - q, 0).sum(-1), "V")
    below = left + 1 - kept
    here = jnp.where(below > 0, left / jnp.where(below > 0, below, 1), 1)  # where q is 0 this is kept itself
    here = jnp.where(kept > 0, here, 0)[..., 1:]
    # the last i whose own draw succeeds ends the block: at least i are kept unless all draws from i on fail
    fail = jnp.flip(jnp.cumprod(jnp.flip(1 - here, -1), -1), -1)
    least = jnp.concatenate([jnp.ones_like(fail[..., :1]), 1 - fail], -1)
    return kept, jnp.where(least[..., :-1] > 0, least[..., 1:] / jnp.where(least[..., :-1] > 0, least[..., :-1], 1), 0)


def at(p: jax.Array, ids: jax.Array) -> jax.Array:
    """p [..., V] at ids [...], V being a device's part or the whole."""
    own = ids - mesh.start("V", p.shape[-1])
    here = (own >= 0) & (own < p.shape[-1])
    value = jnp.take_along_axis(p, jnp.where(here, own, 0)[..., None], -1)[..., 0]
    return mesh.total(jnp.where(here, value, 0), "V")


def count(accept: jax.Array, uniforms: jax.Array) -> jax.Array:
    """How many of the drafts [..., J] are kept; uniforms [..., J] in [0, 1)."""
    return leading(uniforms < accept)


def agree(draft: jax.Array, target: jax.Array, num: jax.Array) -> jax.Array:
    """The shared rule: how many of the first `num` [B] drafts [B, J] are the target's own draws [B, J + 1]."""
    return leading((draft == target[:, :-1]) & (jnp.arange(draft.shape[1]) < num[:, None]))


def leading(kept: jax.Array) -> jax.Array:
    """How many are true before the first that is not."""
    return jnp.cumprod(kept.astype(jnp.int32), -1).sum(-1)
