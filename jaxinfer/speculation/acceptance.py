"""Which drafted tokens are kept, and what is drawn in place of the first that is not: the rule, alone.

    accept, residual = law("token", p, q, draft)          # the exact probabilities, in the dtype of p
    kept, path = walk(uniforms < accept, Tree.chain(J))   # how many, which; the token after them: residual[path[kept]]

A round drafts x_1 .. x_J from q and scores them with one pass of the target, p_1 .. p_{J+1}. It keeps the first n of
them and emits one token more: x_1 .. x_n, y. The emitted tokens have the law of the target, whatever the draft is:

- `token` (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): x_i is kept with probability min(1, p_i / q_i)
  while all before it are; y comes from norm(max(p - q, 0)) at the first that is not, from p_{J+1} after all of them.
- `block` (Sun et al. 2024, algorithm 2): keeps at least as many on average, by deciding about the whole block.

Both are given as the probability that x_i is kept when all before it are, so that one way of drawing serves both.
`shared` is no law of this kind: draft and target are drawn with the same noise, and what agrees is kept (`agree`).
A tree of drafts offers several tokens at a place; `token` tries them in turn, `shared` keeps the one that agrees.

A greedy or point-mass draft is a q that is 1 at the draft. A row that drafts fewer than J has q = 0 from there on: it
keeps none of these, and its residual is p. So rejection, bonus token and no draft are one expression.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import mesh
from jaxinfer.cache import Tree

Rule = Literal["shared", "token", "block"]
RULES = ("shared", "token", "block")


def law(
    rule: Rule, p: jax.Array, q: jax.Array, draft: jax.Array, tree: Tree | None = None
) -> tuple[jax.Array, jax.Array]:
    """The exact law of a round, given its draft.

    p [..., J + 1, V], q [..., J, V]: probabilities of target and draft, q zeros where nothing was drafted. draft
    [..., J]. Gives accept [..., J], the probability that a draft is kept when all before it are, and residual
    [..., J + 1, V], the distribution of the token after the kept ones. V may be a device's part of the vocabulary.

    With a tree of M guesses (token rule alone): p [..., M + 1, V] after each node, q [..., M, V] what each node was
    drawn from, given its elder siblings, draft [..., M]. A node is then kept with its probability when the one it
    follows is and no elder sibling is; residual is of the token after a node of which no child is kept (Miao et al.
    2023, SpecInfer, algorithm 2; Li et al. 2024, EAGLE, without replacement).
    """
    if rule not in ("token", "block"):
        raise ValueError(f"the rule {rule!r} has no law of its own: take token or block")
    if tree is not None and not tree.is_chain:
        if rule == "block":
            raise ValueError("the block rule decides about a chain of drafts: take token or shared for a draft tree")
        return branches(p, q, draft, tree)
    ratio = over(at(p[..., :-1, :], draft), at(q, draft))
    q = jnp.concatenate([q, jnp.zeros_like(p[..., :1, :])], -2)
    if rule == "token":
        kept, accept = jnp.ones_like(p[..., 0]), jnp.minimum(ratio, 1)
    else:
        kept, accept = block(p, q, ratio)
    return accept, normed(kept[..., None] * p - q, p)


def branches(p: jax.Array, q: jax.Array, draft: jax.Array, tree: Tree) -> tuple[jax.Array, jax.Array]:
    """The token rule on a tree: siblings one after the other, each from what the elder ones have left of p."""
    parents, rank = np.array(tree.parents), tree.rank[1:]
    accept, rest = jnp.zeros_like(q[..., 0]), p
    for turn in range(rank.max(initial=-1) + 1):
        nodes = np.flatnonzero(rank == turn)  # no two of one parent
        before, drawn = rest[..., parents[nodes], :], q[..., nodes, :]
        ratio = over(at(before, draft[..., nodes]), at(drawn, draft[..., nodes]))
        accept = accept.at[..., nodes].set(jnp.minimum(ratio, 1))
        rest = rest.at[..., parents[nodes], :].set(normed(before - drawn, before))
    return accept, rest


def over(p: jax.Array, q: jax.Array) -> jax.Array:
    """p / q, and 0 where nothing was drafted."""
    return jnp.where(q > 0, p / jnp.where(q > 0, q, 1), 0)


def normed(rest: jax.Array, p: jax.Array) -> jax.Array:
    """What is positive of rest, made a distribution. Nothing is left where p = q, but for rounding: then p is right."""
    rest = jnp.maximum(rest, 0)
    mass = mesh.total(rest.sum(-1, keepdims=True), "V")
    return jnp.where(mass > 0, rest / jnp.where(mass > 0, mass, 1), p)


def block(p: jax.Array, q: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of block verification: P_0 .. P_J, and the probability that x_i is kept when all before it are."""
    steps = [jnp.ones_like(p[..., 0, 0])]
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


def siblings(q: jax.Array, draft: jax.Array, tree: Tree) -> jax.Array:
    """q [..., M, V] of drafts [..., M] that were drawn without replacement: without their elder siblings' ids."""
    parents, rank = np.array(tree.parents), tree.rank[1:]
    ids = mesh.start("V", q.shape[-1]) + jnp.arange(q.shape[-1])
    for node in np.flatnonzero(rank):
        elder = np.flatnonzero((parents == parents[node]) & (rank < rank[node]))
        taken = (draft[..., elder, None] == ids).any(-2)
        left = jnp.where(taken, 0, q[..., node, :])
        q = q.at[..., node, :].set(normed(left, jnp.zeros_like(left)))
    return q


def agree(draft: jax.Array, target: jax.Array, tree: Tree) -> jax.Array:
    """The shared rule: which drafts [B, M] are the target's own draws [B, M + 1] after what they follow."""
    return draft == target[:, np.array(tree.parents, int)]


def walk(ok: jax.Array, tree: Tree) -> tuple[jax.Array, jax.Array]:
    """From whether each draft [B, M] would be kept: (how many are [B], the nodes that are, after node 0: [B, D + 1]).

    Past the last one the path has zeros.
    """
    if tree.is_chain:
        kept = jnp.cumprod(ok.astype(jnp.int32), -1).sum(-1)
        nodes = jnp.arange(tree.num_nodes)
        return kept, jnp.where(nodes <= kept[:, None], nodes, 0)
    on, gone = [jnp.ones(len(ok), bool)], [jnp.zeros(len(ok), bool)] * tree.num_nodes
    path = jnp.zeros((len(ok), tree.height + 1), jnp.int32)
    for node, parent in enumerate(tree.parents, 1):
        here = on[parent] & ~gone[parent] & ok[:, node - 1]
        gone[parent] = gone[parent] | here
        on.append(here)
        depth = tree.depth[node]
        path = path.at[:, depth].set(jnp.where(here, node, path[:, depth]))
    return jnp.stack(on[1:], 1).sum(1, dtype=jnp.int32), path
