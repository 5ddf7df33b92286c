"""Losslessness by exact enumeration: what is enumerated is the function that the loop calls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.speculation import Tree, agree, law, siblings, walk

V, J = 3, 3
BLOCKS = np.array(list(itertools.product(range(V), repeat=J)))


def tables(seed, sharp=1.0):
    """For each length of prefix up to J a random law of the next token: [V, ..., V]."""
    rng = np.random.default_rng(seed)
    out = [rng.random((V,) * (n + 1)) ** sharp for n in range(J + 1)]
    return [t / t.sum(-1, keepdims=True) for t in out]


def drafts(kind):
    """The draft's tables: what it draws from, and what it says it drew from."""
    drawn = tables(1)[:J]
    if kind == "greedy":
        drawn = [np.eye(V)[t.argmax(-1)] for t in drawn]
    if kind == "disjoint":
        drawn = [np.broadcast_to(np.eye(V)[0], t.shape) for t in drawn]
    said = [np.ones_like(t) for t in drawn] if kind == "point mass" else drawn
    return drawn, said


def emitted(rule, p, kind, num=J, law=law):
    """The joint law [V, ..., V] of J + 1 emitted tokens: a round's, and then the target's own."""
    drawn, said = drafts(kind) if isinstance(kind, str) else kind
    joint = np.zeros((V,) * (J + 1))
    for block in BLOCKS:
        chance = np.prod([drawn[i][*block[:i], block[i]] for i in range(J)])
        here = np.stack([p[i][tuple(block[:i])] for i in range(J + 1)])
        q = np.stack([np.eye(V)[block[i]] if kind == "point mass" else said[i][tuple(block[:i])] for i in range(J)])
        q[num:] = 0
        accept, residual = (np.asarray(x) for x in law(rule, jnp.array(here), jnp.array(q), jnp.array(block)))
        assert accept.dtype == residual.dtype == np.float64
        for n in range(J + 1):
            stops = chance * accept[:n].prod() * (1 - accept[n] if n < J else 1)
            for y in range(V):
                after = stops * residual[n, y]
                rest = np.ones(())
                for m in range(n + 1, J + 1):
                    rest = rest[..., None] * p[m][(*block[:n], y)]
                joint[(*block[:n], y)] += after * rest
    return joint


def target(p):
    """The law of J + 1 tokens of the target alone."""
    joint = np.ones(())
    for table in p:
        joint = joint[..., None] * table
    return joint


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("num", [J, 1, 0])
@pytest.mark.parametrize("kind", ["sampled", "greedy", "point mass", "disjoint"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_what_a_round_emits_has_the_law_of_the_target(rule, kind, num):
    p = tables(0)
    np.testing.assert_allclose(emitted(rule, p, kind, num), target(p), atol=1e-12)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_greedy_target_is_followed(rule):
    p = [np.eye(V)[t.argmax(-1)] for t in tables(0)]
    np.testing.assert_allclose(emitted(rule, p, "sampled"), target(p), atol=1e-12)


@pytest.mark.parametrize(("rule", "expected"), [("token", 10 / 9), ("block", 11 / 9)])
def test_the_rules_keep_as_many_as_sun_et_al_say(rule, expected):
    """p = (1/3, 2/3), q = (2/3, 1/3), two drafts (Sun et al. 2024, section 3)."""
    p, q = np.array([[1 / 3, 2 / 3]] * 3), np.array([[2 / 3, 1 / 3]] * 2)
    kept = 0.0
    for block in itertools.product(range(2), repeat=2):
        accept, _ = law(rule, jnp.array(p), jnp.array(q), jnp.array(block))
        kept += q[0, block[0]] * q[1, block[1]] * float(accept[0] + accept[0] * accept[1])
    assert kept == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_equal_laws_keep_everything_and_disjoint_ones_nothing(rule):
    rng = np.random.default_rng(2)
    p = rng.random((J + 1, V))
    p = jnp.array(p / p.sum(-1, keepdims=True))
    for block in BLOCKS:
        accept, residual = law(rule, p, p[:J], jnp.array(block))
        np.testing.assert_allclose(accept, 1, atol=1e-12)
        np.testing.assert_allclose(residual[J], p[J], atol=1e-12)
    apart = jnp.array([[0, 0.5, 0.5]] * (J + 1)), jnp.array([[1.0, 0, 0]] * J)
    accept, residual = law(rule, *apart, jnp.array([0] * J))
    assert not accept.any()
    np.testing.assert_allclose(residual[0], apart[0][0])


def test_the_block_rule_keeps_at_least_as_many_as_the_token_rule():
    p, (drawn, _) = tables(0), drafts("sampled")

    def kept(rule):
        total = 0.0
        for block in BLOCKS:
            chance = np.prod([drawn[i][*block[:i], block[i]] for i in range(J)])
            here = jnp.array([p[i][tuple(block[:i])] for i in range(J + 1)])
            q = jnp.array([drawn[i][tuple(block[:i])] for i in range(J)])
            total += chance * float(jnp.cumprod(law(rule, here, q, jnp.array(block))[0]).sum())
        return total

    assert kept("block") > kept("token") + 1e-3


def removed(p, draft):
    """p without the draft: right for a point mass, wrong for a q that was sampled from."""
    left = p * (1 - jnp.eye(V)[draft])
    return left / left.sum(-1, keepdims=True)


PLANTED = {
    "resampled from p": lambda rule, p, q, draft: (law(rule, p, q, draft)[0], p),
    "ratio inverted": lambda rule, p, q, draft: (
        jnp.minimum(1, jnp.stack([q[i, x] / p[i, x] for i, x in enumerate(draft)])),
        law(rule, p, q, draft)[1],
    ),
    "another q than was drawn from": lambda rule, p, q, draft: law(
        rule, p, jnp.sqrt(q) / jnp.sqrt(q).sum(-1, keepdims=True), draft
    ),
    "a temperature in accept alone": lambda rule, p, q, draft: (
        law(rule, p**0.5 / (p**0.5).sum(-1, keepdims=True), q, draft)[0],
        law(rule, p, q, draft)[1],
    ),
    "the draft taken out of p, and no more": lambda rule, p, q, draft: (
        law(rule, p, q, draft)[0],
        jnp.concatenate([removed(p[:-1], draft), p[-1:]]),
    ),
    "one row of p too late": lambda rule, p, q, draft: law(rule, jnp.roll(p, 1, 0), q, draft),
}


@pytest.mark.parametrize("bug", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_planted_mistake_breaks_the_law(rule, bug):
    p = tables(0)
    assert np.abs(emitted(rule, p, "sampled", law=bug) - target(p)).max() > 1e-3


def without_the_least(table):
    """A law filtered to its two best."""
    kept = np.where(table == table.min(-1, keepdims=True), 0, table)
    return kept / kept.sum(-1, keepdims=True)


MISTAKEN = {  # what is drawn from, and what is accounted with
    "a filtered draft accounted with all of q": ([without_the_least(t) for t in tables(1)[:J]], tables(1)[:J]),
    "a greedy draft accounted with its softmax": (drafts("greedy")[0], tables(1)[:J]),
    "a draft at another temperature": ([t**2 / (t**2).sum(-1, keepdims=True) for t in tables(1)[:J]], tables(1)[:J]),
}


@pytest.mark.parametrize("kind", MISTAKEN.values(), ids=MISTAKEN)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_draft_accounted_with_another_law_than_it_was_drawn_from_breaks_the_law(rule, kind):
    p = tables(0)
    assert np.abs(emitted(rule, p, kind) - target(p)).max() > 1e-3


def test_counting_ends_at_the_first_that_is_not_kept():
    accept = jnp.array([[1.0, 0.5, 1.0], [0.2, 1.0, 1.0]])
    kept, path = walk(jnp.array([[0.0, 0.6, 0.0], [0.1, 0.99, 0.0]]) < accept, Tree.chain(3))
    assert kept.tolist() == [1, 3] and path.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    drafted, drawn = jnp.array([[1, 2, 3], [1, 2, 3]]), jnp.array([[1, 2, 9, 4], [1, 9, 3, 4]])
    assert agree(drafted, drawn, Tree.chain(3)).tolist() == [[True, True, False], [True, False, True]]


# --- trees -----------------------------------------------------------------------------------------------------------

TREES = {
    "two and two": Tree.branching(2, 2),
    "three": Tree.branching(3),
    "uneven": Tree((0, 0, 1, 1, 2, 3)),
    "chain": Tree.chain(3),
}


def drafted(tree, kind):
    """Every way to fill a tree's nodes: (ids [n, M], chance [n], what the draft says it drew from [n, M, V])."""
    tables_, rank = drafts(kind)[0], tree.rank
    assignments = np.array(list(itertools.product(range(V), repeat=tree.num_nodes - 1)))
    chance, q = np.ones(len(assignments)), np.zeros((*assignments.shape, V))
    for row, ids in enumerate(assignments):
        at = np.append(0, ids)  # node 0 is the token before
        for node, parent in enumerate(tree.parents, 1):
            law_ = tables_[tree.depth[node] - 1][tuple(at[step] for step in np.flatnonzero(tree.sees[parent])[1:])]
            elder = [at[n] for n, p in enumerate(tree.parents, 1) if p == parent and rank[n] < rank[node]]
            match kind:
                case "with replacement":
                    own = law_
                case "greedy":  # the best, the second best, ... for certain
                    own = np.eye(V)[np.argsort(-law_)[rank[node]]]
                case _:
                    own = np.where(np.isin(np.arange(V), elder), 0, law_)
                    own = own / own.sum()
            chance[row] *= own[at[node]]
            q[row, node - 1] = np.eye(V)[at[node]] if kind == "point mass" else own
    return assignments[chance > 0], chance[chance > 0], q[chance > 0]


def emitted_by_a_tree(tree, p, kind, num=None, law=law):
    """The joint law [V, ..., V] of D + 1 emitted tokens: a round's, and then the target's own."""
    D = tree.height
    assignments, chance, q = drafted(tree, kind)
    q[:, tree.depth[1:] > (D if num is None else num)] = 0
    here = np.zeros((len(assignments), tree.num_nodes, V))
    for node in range(tree.num_nodes):
        steps = np.flatnonzero(tree.sees[node])[1:] - 1
        here[:, node] = p[tree.depth[node]][tuple(assignments[:, step] for step in steps)]
    arrays = (jnp.array(here), jnp.array(q), jnp.array(assignments))
    accept, residual = (np.asarray(x) for x in law("token", *arrays, tree))
    assert accept.dtype == residual.dtype == np.float64
    joint = np.zeros((V,) * (D + 1))

    def follow(row, node, stands, said):
        for child in (n for n, parent in enumerate(tree.parents, 1) if parent == node):
            ids = assignments[row]
            follow(row, child, stands * accept[row, child - 1], (*said, ids[child - 1]))
            stands *= 1 - accept[row, child - 1]
        for y in range(V):
            rest = np.ones(())
            for m in range(len(said) + 1, D + 1):
                rest = rest[..., None] * p[m][(*said, y)]
            joint[(*said, y)] += stands * residual[row, node, y] * rest

    for row in range(len(assignments)):
        follow(row, 0, chance[row], ())
    return joint


@pytest.mark.parametrize("kind", ["sampled", "with replacement", "greedy", "point mass"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_what_a_tree_emits_has_the_law_of_the_target(tree, kind):
    p = tables(0)[: tree.height + 1]
    np.testing.assert_allclose(emitted_by_a_tree(tree, p, kind), target(p), atol=1e-12)


@pytest.mark.parametrize("num", [0, 1])
def test_a_tree_of_which_a_row_uses_fewer_levels_has_the_law_of_the_target(num):
    tree, p = TREES["two and two"], tables(0)[:3]
    np.testing.assert_allclose(emitted_by_a_tree(tree, p, "sampled", num), target(p), atol=1e-12)


def test_a_tree_that_is_a_chain_has_the_law_of_the_chain():
    p = tables(0)
    np.testing.assert_allclose(
        emitted_by_a_tree(Tree.chain(J), p, "sampled"), emitted("token", p, "sampled"), atol=1e-15
    )


def forgets_the_elders(rule, p, q, draft, tree):
    """A sibling compared with what it would be if it were an only child."""
    alone, residual = law("token", p[..., [0, *tree.parents], :], q, draft, Tree.chain(q.shape[-2]))
    return alone, law(rule, p, q, draft, tree)[1]


TREE_BUGS = {
    "siblings forget their elders": forgets_the_elders,
    "one residual for all": lambda rule, p, q, draft, tree: (law(rule, p, q, draft, tree)[0], p),
    "q with the elders in it": lambda rule, p, q, draft, tree: law(
        rule, p, jnp.broadcast_to(jnp.array(drafts("sampled")[0][0]), q.shape), draft, tree
    ),
}


@pytest.mark.parametrize("bug", TREE_BUGS.values(), ids=TREE_BUGS)
def test_a_mistake_planted_in_a_tree_breaks_the_law(bug):
    tree, p = Tree.branching(2), tables(6)[:2]  # likelier than the draft at two of three: else one token alone is left
    assert np.abs(emitted_by_a_tree(tree, p, "sampled", law=bug) - target(p)).max() > 1e-3


def test_siblings_are_drawn_without_their_elders():
    tree, q = Tree((0, 0, 0, 1)), np.tile([0.5, 0.3, 0.2], (4, 1))
    ids = jnp.array([2, 0, 1, 2])
    expected = [[0.5, 0.3, 0.2], [0.625, 0.375, 0], [0, 1, 0], [0.5, 0.3, 0.2]]
    np.testing.assert_allclose(siblings(jnp.array(q), ids, tree), expected, atol=1e-12)
    nothing_left = siblings(jnp.array([[1.0, 0, 0]] * 4), jnp.array([0, 1, 2, 0]), tree)
    np.testing.assert_array_equal(nothing_left[1:3], 0)


def test_a_walk_takes_the_first_child_that_is_kept_and_goes_on_from_there():
    tree = Tree.branching(2, 2)  # nodes 1, 2 after 0; 3, 4 after 1; 5, 6 after 2
    ok = jnp.array([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]], bool)
    kept, path = walk(ok, tree)
    assert kept.tolist() == [2, 2, 0, 1]
    assert path.tolist() == [[0, 1, 4], [0, 2, 6], [0, 0, 0], [0, 2, 0]]


def test_trees_know_their_shape_and_refuse_what_is_none():
    tree = Tree.branching(2, 2, 1)
    assert tree.parents == (0, 0, 1, 1, 2, 2, 3, 4, 5, 6) and tree.height == 3 and not tree.is_chain
    assert tree.within.tolist() == [1, 3, 7, 11] and tree.level(2) == (3, 7)
    assert tree.paths[9].tolist() == [2, 5, 9] and tree.rank.tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0]
    assert Tree.chain(4).is_chain and Tree.branching(1, 1).is_chain
    with pytest.raises(ValueError, match="node 2 of a draft tree follows node 2"):
        Tree((0, 2))
    with pytest.raises(ValueError, match="level by level"):
        Tree((0, 1, 0))
    with pytest.raises(ValueError, match="the block rule decides about a chain"):
        law("block", jnp.ones((3, V)), jnp.ones((2, V)), jnp.zeros(2, int), Tree((0, 0)))
