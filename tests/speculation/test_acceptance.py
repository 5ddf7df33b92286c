"""Losslessness by exact enumeration: what is enumerated is the function that the loop calls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.speculation import agree, law
from jaxinfer.speculation.acceptance import count

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
    drawn, said = drafts(kind)
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
    "one row of p too late": lambda rule, p, q, draft: law(rule, jnp.roll(p, 1, 0), q, draft),
}


@pytest.mark.parametrize("bug", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_planted_mistake_breaks_the_law(rule, bug):
    p = tables(0)
    assert np.abs(emitted(rule, p, "sampled", law=bug) - target(p)).max() > 1e-3


def test_counting_ends_at_the_first_that_is_not_kept():
    accept = jnp.array([[1.0, 0.5, 1.0], [0.2, 1.0, 1.0]])
    assert count(accept, jnp.array([[0.0, 0.6, 0.0], [0.1, 0.99, 0.0]])).tolist() == [1, 3]
    drafted, drawn = jnp.array([[1, 2, 3], [1, 2, 3]]), jnp.array([[1, 2, 9, 4], [1, 2, 3, 4]])
    assert agree(drafted, drawn, jnp.array([3, 2])).tolist() == [2, 2]
