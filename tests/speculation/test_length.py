"""How many tokens a row drafts: the formulas, and what the loop makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer.speculation import ModelDraft, NGram, emitted, speculate, speedup
from jaxinfer.speculation.length import BEGIN, chosen, learned
from jaxinfer.testing import Table, tiny_config

pytestmark = pytest.mark.usefixtures("quickly_compiled")
V, NEW = 16, 120
CONFIG = tiny_config(vocab_size=V)
COSTS = {  # the fastest J for rates .5 .6 .7 .8 .9, worked out from Leviathan et al. 2023, theorem 3.8
    0.01: (5, 7, 9, 14, 24),
    0.02: (4, 6, 8, 11, 19),
    0.05: (3, 4, 6, 8, 13),
    0.1: (2, 3, 4, 6, 10),
    0.2: (1, 2, 3, 4, 7),
}


TABLE_1 = [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71), (0.9, 10, 6.86)]


@pytest.mark.parametrize(("rate", "J", "tokens"), TABLE_1)
def test_a_round_emits_what_leviathan_et_al_say(rate, J, tokens):
    assert float(emitted(jnp.float32(rate), J)) == pytest.approx(tokens, abs=0.005)
    assert float(speedup(jnp.float32(rate), 0.0, J)) == pytest.approx(tokens, abs=0.005)
    assert float(emitted(jnp.float32(1.0), J)) == J + 1


@pytest.mark.parametrize(("cost", "best"), COSTS.items())
def test_a_row_drafts_what_is_fastest_for_its_rate(cost, best):
    rates = jnp.array([0.5, 0.6, 0.7, 0.8, 0.9])
    assert chosen(rates, jnp.float32(cost), 30).tolist() == list(best)
    assert chosen(rates, jnp.float32(cost), 3).tolist() == [min(3, J) for J in best]
    assert chosen(jnp.array([0.05]), jnp.float32(0.2), 8).tolist() == [0], "a draft that costs more than it gives"


def test_a_rate_follows_what_was_accepted_and_forgives_in_time():
    rate = jnp.full(3, BEGIN)
    for _ in range(30):
        rate = learned(rate, jnp.array([4, 4, 0]), jnp.array([4, 0, 0]))
    assert rate[0] > 0.99 and rate[1] < 0.05 and rate[2] == pytest.approx(BEGIN)
    for _ in range(200):
        rate = learned(rate, jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int32))
    assert rate[1] > 0.3


def sharp(seed):
    """A table whose rows are near to certain."""
    return jnp.asarray(12 * np.random.default_rng(seed).standard_normal((V, V)), jnp.float32)


@functools.cache
def spoken(which, cost, J=6):
    """A generation of two rows with a draft that is always right, or hardly ever."""
    draft = ModelDraft(sharp(0 if which == "right" else 1), CONFIG, Table())
    return speculate(
        sharp(0), CONFIG, [[1], [2]], draft=draft, num_draft_tokens=J, cost=cost, model=Table(), max_new_tokens=NEW
    )


@pytest.mark.parametrize("which", ["right", "wrong"])
@pytest.mark.parametrize("cost", [0.05, 0.5])
def test_the_adaptive_mode_says_what_generate_says(which, cost):
    plain = jaxinfer.generate(sharp(0), CONFIG, [[1], [2]], model=Table(), max_new_tokens=NEW)
    np.testing.assert_array_equal(spoken(which, cost).ids, plain.ids)


def test_a_draft_that_is_right_is_asked_for_more_and_one_that_is_wrong_for_less():
    right, wrong = spoken("right", 0.3), spoken("wrong", 0.3)
    assert int(right.drafted[:, 5].sum()) >= 20, "six tokens a round, once the rate has risen"
    assert int(wrong.drafted.sum()) < int(wrong.rounds.sum()) / 4, "most rounds draft nothing"
    assert int(wrong.drafted.sum()) > 0
    always = spoken("wrong", None)
    assert int(always.drafted[:, 5].sum()) > 0.9 * int(always.rounds.sum()), "without a cost every round drafts J"


def test_the_cost_is_traced():
    spoken("right", 0.3)
    before = speculate.__globals__["run"]._cache_size()
    spoken("right", 0.31)
    assert speculate.__globals__["run"]._cache_size() == before


def test_a_round_in_which_no_row_drafts_is_a_pass_over_one_token():
    seen = []

    class Watched(Table):
        def step(self, params, ids, cache, step):
            jax.debug.callback(lambda: seen.append(ids.shape[1]))
            return super().step(params, ids, cache, step)

    apart = jnp.asarray(12 * np.roll(np.eye(V), 1, 1), jnp.float32)  # 0, 1, 2, ...: nothing is ever seen before
    result = speculate(apart, CONFIG, [[0]], draft=NGram(), num_draft_tokens=3, model=Watched(), max_new_tokens=V - 2)
    jax.effects_barrier()
    assert result.ids[0, : V - 2].tolist() == list(range(1, V - 1))
    assert seen.count(1) == V - 2 and 4 not in seen
