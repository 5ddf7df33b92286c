"""Speculation emits what the target alone would have: ids, laws, ends; whatever drafts, on every mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import struct

import jaxinfer
from jaxinfer import mesh, models
from jaxinfer.speculation import LayersDraft, ModelDraft, NGram, speculate
from jaxinfer.speculation import verify as verifying
from jaxinfer.testing import Table, tiny_config, tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [11, 12, 13], [20]]
NEW = 24
FILTERED = {
    "temperature": [0.0, 0.8, 1.2],
    "top_p": [1.0, 0.9, 1.0],
    "top_k": [0, 0, 20],
    "repetition_penalty": [1.0, 1.0, 1.2],
    "frequency_penalty": [0.0, 0.3, 0.0],
    "seed": [0, 1, 2],
}


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Without most optimizations: half of the time, and the laws are the same."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@struct.dataclass
class Guess:
    """The example of the protocol: says the newest token again; on the second row nothing."""

    def begin(self, state, width, J):
        return ()

    def propose(self, memory, state, active, num, J, draw):
        return jnp.repeat(state.newest[:, None], J, 1), None, num * (jnp.arange(len(num)) != 1), memory, state

    def commit(self, memory, before, state, num):
        return memory


@functools.cache
def target():
    return tiny_model(num_layers=3)


def near(params, config):
    """A draft that is often right: the target with a little noise in its weights."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(7)
    noisy = [x + 0.02 * jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(tree, noisy)


def make_draft(kind, params, config, place=lambda *pair: pair):
    """One draft of each kind for a (placed) target."""
    own, plain = target()
    match kind:
        case "itself":
            return ModelDraft(params, config)
        case "model":
            return ModelDraft(*place(near(own, plain), plain))
        case "layers":
            return LayersDraft(params, config, 2)
        case "ngram":
            return NGram()
    return Guess()


@functools.cache
def expected(name):
    """What `generate` says, greedy or filtered."""
    params, config = target()
    sampling = jaxinfer.Sampling(temperature=0.0) if name == "greedy" else jaxinfer.Sampling(**FILTERED)
    result = jaxinfer.generate(params, config, PROMPTS, sampling=sampling, max_new_tokens=NEW)
    return sampling, np.asarray(result.ids), np.asarray(result.logprobs)


def same(axes, kind, rule, name, J, on_mesh):
    sampling, ids, logprobs = expected(name)

    def place(params, config):
        if not axes:
            return params, config
        params, config = models.arrange(params, config)
        return mesh.shard(params, models.letters(config)), config

    with on_mesh(axes):
        params, config = place(*target())
        draft = make_draft(kind, params, config, place)
        result = speculate(
            params, config, PROMPTS, draft=draft, num_draft_tokens=J, rule=rule, sampling=sampling, max_new_tokens=NEW
        )
        got, scores, tokens = np.asarray(result.ids), np.asarray(result.logprobs), int(result.num.sum())
        accepted, rounds = int(result.accepted.sum()), int(result.rounds.sum())
    rows = slice(None) if rule == "shared" or name == "greedy" else slice(0, 1)  # the others draw other ids
    np.testing.assert_array_equal(got[rows], ids[rows])
    np.testing.assert_allclose(scores[rows], logprobs[rows], atol=1e-4)
    assert tokens == len(PROMPTS) * NEW
    assert accepted + rounds >= tokens  # a round that is cut short may end with a draft
    if kind == "itself":
        assert rounds <= len(PROMPTS) * -(-NEW // (J + 1)), "a draft that is the target is always right"


KINDS = ("ngram", "model", "itself", "layers", "guess")
RULES = ("shared", "token", "block")
MESHES = ("", "tensor=4", "data=2,tensor=2")
EVERY = list(itertools.product(KINDS, RULES, MESHES, ("greedy", "filtered"), (1, 3, 8)))


def covering(cases):
    """Few of the cases, but every pair of values of every two axes."""
    pairs = {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}
    chosen = []
    while pairs:
        best = max(cases, key=lambda case: len(pairs.intersection(itertools.combinations(enumerate(case), 2))))
        pairs.difference_update(itertools.combinations(enumerate(best), 2))
        chosen.append(best)
    return chosen


@pytest.mark.parametrize(("kind", "rule", "axes", "name", "J"), covering(EVERY))
def test_speculation_says_what_generate_says(kind, rule, axes, name, J, on_mesh):
    same(axes, kind, rule, name, J, on_mesh)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "rule", "axes", "name", "J"), EVERY)
def test_speculation_says_what_generate_says_in_every_combination(kind, rule, axes, name, J, on_mesh):
    same(axes, kind, rule, name, J, on_mesh)


# --- laws, by counting ---------------------------------------------------------------------------------------------

V, ROWS, LENGTH = 4, 20000, 4
CONFIG = tiny_config(vocab_size=V)


def table(seed):
    return jnp.asarray(1.5 * np.random.default_rng(seed).standard_normal((V, V)), jnp.float32)


def far_from_the_law(rule, sampling, draft):
    """By how many deviations the chi-square of LENGTH tokens jointly is too large."""
    p = table(0)
    sampling = jaxinfer.Sampling(**sampling, seed=list(range(ROWS)))
    result = speculate(
        p, CONFIG, [[0]] * ROWS, draft=draft, num_draft_tokens=3, rule=rule, sampling=sampling, model=Table(),
        max_new_tokens=LENGTH,
    )  # fmt: skip
    plain = jaxinfer.sampling.process(
        p, jaxinfer.Sampling(**{k: v for k, v in vars(sampling).items() if k in ("temperature", "top_k", "top_p")}),
        jnp.zeros((V, 1), jnp.int32), jnp.ones(V, jnp.int32), jnp.ones(V, jnp.int32),
    )  # fmt: skip
    law = np.asarray(jax.nn.softmax(plain), np.float64)
    joint = law[0]
    for _ in range(LENGTH - 1):
        joint = joint[..., None] * law.reshape((1,) * (joint.ndim - 1) + (V, V))
    ids = np.asarray(result.ids)[:, :LENGTH]
    seen = np.bincount(np.ravel_multi_index(ids.T, joint.shape), minlength=joint.size)
    want = ROWS * joint.reshape(-1)
    assert not seen[want == 0].any()
    common = want >= 5
    seen, want = np.append(seen[common], seen[~common].sum()), np.append(want[common], want[~common].sum())
    seen, want = seen[want > 0], want[want > 0]
    statistic, degrees = ((seen - want) ** 2 / want).sum(), len(want) - 1
    return scipy.stats.chi2.sf(statistic, degrees)


SETTINGS = {"plain": {"temperature": 1.0}, "cool": {"temperature": 0.6}, "top_k": {"temperature": 1.0, "top_k": 3},
            "top_p": {"temperature": 1.3, "top_p": 0.8}}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_emitted_tokens_have_the_law_of_the_target(rule, settings):
    draft = ModelDraft(table(1), CONFIG, Table())
    assert far_from_the_law(rule, settings, draft) > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_without_probabilities_has_the_law_of_the_target(rule):
    assert far_from_the_law(rule, SETTINGS["plain"], NGram()) > 1e-4


def test_a_planted_mistake_in_the_loop_shows_in_the_counts(monkeypatch):
    def wrong(rule, p, q, ids):
        return verifying_law(rule, p, q, ids)[0], p  # resampled from p

    verifying_law = verifying.law
    jax.clear_caches()
    monkeypatch.setattr(verifying, "law", wrong)
    found = far_from_the_law("token", SETTINGS["plain"], ModelDraft(table(1), CONFIG, Table()))
    jax.clear_caches()
    assert found < 1e-6


def test_the_block_rule_accepts_no_less_than_the_token_rule_and_shared_a_little_less():
    draft, sampling = ModelDraft(table(1), CONFIG, Table()), jaxinfer.Sampling(seed=list(range(2000)))
    kept = {
        rule: float(
            speculate(
                table(0), CONFIG, [[0]] * 2000, draft=draft, rule=rule, sampling=sampling, model=Table(),
                max_new_tokens=40,
            ).tokens_per_round
        )
        for rule in RULES
    }  # fmt: skip
    assert kept["block"] > kept["token"] > kept["shared"] > 0.85 * kept["token"]


# --- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(7))
def test_a_stop_id_anywhere_in_a_block_ends_the_row_there(place):
    params, config = target()
    draft = ModelDraft(params, config)
    _, ids, _ = expected("greedy")
    stop = int(ids[0, place])
    end = ids[0].tolist().index(stop) + 1
    sampling = jaxinfer.Sampling(temperature=0.0, stop_ids=[[stop], [], []])
    result = speculate(params, config, PROMPTS, draft=draft, sampling=sampling, max_new_tokens=NEW)
    assert np.asarray(result.ids)[0, :end].tolist() == ids[0, :end].tolist()
    assert result.num.tolist() == [end, NEW, NEW]
    assert result.finish.tolist() == [1, 2, 2]
    assert (np.asarray(result.ids)[0, end:] == -1).all()
    assert result.cache.length.tolist() == [len(p) + int(n) - 1 for p, n in zip(PROMPTS, result.num, strict=True)]


def test_a_budget_ends_inside_a_block_and_stop_ids_wait_for_min_new_tokens():
    params, config = target()
    draft, (_, ids, _) = ModelDraft(params, config), expected("greedy")
    budget = np.array([1, 6, 7])
    result = speculate(params, config, PROMPTS, draft=draft, max_new_tokens=budget)
    assert result.num.tolist() == budget.tolist()
    for row, n in enumerate(budget):
        assert np.asarray(result.ids)[row, :n].tolist() == ids[row, :n].tolist()
    sampling = jaxinfer.Sampling(temperature=0.0, stop_ids=[int(ids[0, 1])], min_new_tokens=9)
    plain = jaxinfer.generate(params, config, PROMPTS, sampling=sampling, max_new_tokens=NEW)
    result = speculate(params, config, PROMPTS, draft=draft, sampling=sampling, max_new_tokens=NEW)
    np.testing.assert_array_equal(result.ids, plain.ids)


def test_a_row_says_alone_what_it_says_in_a_batch():
    params, config = target()
    draft = make_draft("model", params, config)
    sampling, ids, _ = expected("filtered")
    for row, prompt in enumerate(PROMPTS):
        own = jaxinfer.Sampling(**{name: value[row] for name, value in FILTERED.items()})
        result = speculate(params, config, [prompt], draft=draft, sampling=own, max_new_tokens=NEW)
        np.testing.assert_array_equal(np.asarray(result.ids)[0], ids[row])


def test_a_conversation_goes_on_from_the_state_and_plain_decoding_can_go_on_from_it():
    params, config = target()
    draft = make_draft("model", params, config)
    whole = expected("greedy")
    first = speculate(params, config, PROMPTS, draft=draft, max_new_tokens=10, cache=jaxinfer.init_cache(
        config, len(PROMPTS), 64, max_pending=5))  # fmt: skip
    again = speculate(params, config, state=first.state, draft=draft, max_new_tokens=6)
    last = jaxinfer.generate(params, config, state=again.state, max_new_tokens=NEW - 16)
    said = np.concatenate([np.asarray(r.ids)[:, :n] for r, n in ((first, 10), (again, 6), (last, NEW - 16))], 1)
    np.testing.assert_array_equal(said, whole[1][:, :NEW])


# --- refusals ------------------------------------------------------------------------------------------------------


def test_bad_requests_are_refused_with_both_values():
    params, config = target()
    ask = functools.partial(speculate, params, config, PROMPTS, draft=NGram())
    with pytest.raises(ValueError, match="num_draft_tokens is 0"):
        ask(num_draft_tokens=0)
    with pytest.raises(ValueError, match="'fast' is not known: take one of shared, token, block"):
        ask(rule="fast")
    with pytest.raises(ValueError, match="1 tokens pending but num_draft_tokens 4 needs 5"):
        ask(cache=jaxinfer.init_cache(config, 3, 64))
    other = tiny_model(vocab_size=77)
    with pytest.raises(ValueError, match="the draft has 77 ids but the target 101"):
        ask(draft=ModelDraft(*other))
