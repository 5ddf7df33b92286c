"""Speculation emits what the target alone would have: ids, laws, ends; whatever drafts, on every mesh."""

import functools
import itertools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny_models
from covering import covering
from flax import struct

import jaxinfer
from jaxinfer import mesh, models
from jaxinfer.decoding import State
from jaxinfer.speculation import Draft, HeadDraft, LayersDraft, ModelDraft, NGram, Tree, drawing, speculate
from jaxinfer.speculation import verify as verifying
from jaxinfer.testing import Table, tiny_config, tiny_model
from jaxinfer.weights import load_head, save_head

pytestmark = pytest.mark.usefixtures("quickly_compiled")
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


@struct.dataclass
class Guess(Draft):
    """The example of the protocol: says the newest token again; on the second row nothing."""

    abstains = True

    def propose(self, memory, state, active, num, draw):
        ids = jnp.repeat(state.newest[:, None], draw.tree.height, 1)
        return ids, None, num * (jnp.arange(len(num)) != 1), memory, state


FAMILIES: dict[str, dict] = {
    "llama": {},
    "gemma2": {"window": 5, "softcap": 20.0, "post_norm": True, "activation": "gelu_tanh"},
    "gpt2": {"rope": None, "gated": False, "qkv_bias": True, "ffn_bias": True, "num_kv_heads": 6, "activation": "gelu"},
    "olmo2": {"qk_norm": "projection", "pre_norm": False, "post_norm": True},
}


@functools.cache
def target(family="llama"):
    """(params, config) in the manner of a family; every other layer of gemma2 has a window."""
    if family in FAMILIES:
        params, config = tiny_model(num_layers=2, **FAMILIES[family])
        if family == "gemma2":
            first, second = config.layers
            config = config.replace(layers=(first, second.replace(window=None)), softcap=10.0, embed_scale=6.0)
        return params, config
    with tempfile.TemporaryDirectory() as directory:  # a checkpoint of a real family
        tiny_models.write_checkpoint(pathlib.Path(directory), family, "long" if family == "gpt2" else "plain")
        return jaxinfer.load(directory, dtype=jnp.float32)


def noisy(params, scale=0.02):
    """Params with a little noise: a draft that is often right."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(7)
    return jax.tree.unflatten(tree, [x + scale * jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves])


@functools.cache
def head_of(family):
    """A directory with a head for a target of this family."""
    params, config = target(family)
    directory = tempfile.mkdtemp()
    own = models.head_config(config)
    head = models.init_head(own, jax.random.key(3), jnp.float32)
    save_head(directory, head, own, models.fingerprint(params, config))
    return directory


def make_draft(kind, params, config, family, place=lambda params, config: (params, config)):
    """One draft of each kind for a (placed) target."""
    own, plain = target(family)
    match kind.removesuffix(" tree"):
        case "itself":
            return ModelDraft(params, config)
        case "model":
            return ModelDraft(*place(noisy(own), plain))
        case "layers":
            return LayersDraft(params, config, 1)
        case "head":
            head, head_config, _ = load_head(head_of(family), jnp.float32)
            return HeadDraft(head, params, head_config, config)
        case "ngram":
            return NGram()
    return Guess()


def tree_of(kind, J):
    """A tree about as deep as J asks for."""
    return {1: (3,), 2: (2, 2), 4: (2, 2, 1, 1)}.get(J, (2, 1, 2, 1, 1)) if kind.endswith("tree") else None


@functools.cache
def expected(name, family="llama"):
    """What `generate` says, greedy or filtered."""
    params, config = target(family)
    sampling = jaxinfer.Sampling(temperature=0.0) if name == "greedy" else jaxinfer.Sampling(**FILTERED)
    result = jaxinfer.generate(params, config, PROMPTS, sampling=sampling, max_new_tokens=NEW)
    return sampling, np.asarray(result.ids), np.asarray(result.logprobs)


def same(axes, kind, rule, name, J, family, on_mesh):
    sampling, ids, logprobs = expected(name, family)
    head_of(family)  # made without the mesh

    def place(params, config):
        if not axes:
            return params, config
        params, config = models.arrange(params, config)
        return mesh.shard(params, models.letters(config)), config

    with on_mesh(axes):
        params, config = place(*target(family))
        draft = make_draft(kind, params, config, family, place)
        result = speculate(
            params, config, PROMPTS, draft=draft, num_draft_tokens=J, tree=tree_of(kind, J), rule=rule,
            sampling=sampling, max_new_tokens=NEW,
        )  # fmt: skip
        got, scores, tokens = np.asarray(result.ids), np.asarray(result.logprobs), int(result.num.sum())
        accepted, rounds = int(result.accepted.sum()), int(result.rounds.sum())
    rows = slice(None) if rule == "shared" or name == "greedy" else slice(0, 1)  # the others draw other ids
    np.testing.assert_array_equal(got[rows], ids[rows])
    np.testing.assert_allclose(scores[rows], logprobs[rows], atol=1e-4)
    assert tokens == len(PROMPTS) * NEW
    assert accepted + rounds >= tokens  # a round that is cut short may end with a draft
    if kind == "itself":
        assert rounds <= len(PROMPTS) * -(-NEW // (J + 1)), "a draft that is the target is always right"
    if kind.startswith("model"):
        assert accepted > 0, "a draft that is never right shows little"


KINDS = ("ngram", "model", "itself", "layers", "head", "guess", "model tree", "head tree", "layers tree")
RULES = ("shared", "token", "block")
MESHES = ("", "tensor=4", "data=2,tensor=2")
NAMES = ("greedy", "filtered")


def cases(families, lengths):
    """Every combination that there is: a tree has no block rule."""
    product = itertools.product(KINDS, RULES, MESHES, NAMES, lengths, families)
    return [case for case in product if not (case[0].endswith("tree") and case[1] == "block")]


AXES = ("kind", "rule", "axes", "name", "J", "family")


DRAFTED = ("ngram", "model", "layers", "head", "model tree", "head tree")
OTHERS = ("itself", "guess", "layers tree")
DEFAULT = covering([case for case in cases(FAMILIES, (1, 2, 4, 8)) if case[0] in DRAFTED])
DEFAULT += covering([case for case in cases(("llama",), (1, 4)) if case[0] in OTHERS])


@pytest.mark.parametrize(AXES, DEFAULT)
def test_speculation_says_what_generate_says(kind, rule, axes, name, J, family, on_mesh):
    same(axes, kind, rule, name, J, family, on_mesh)


PRODUCT = [  # greedy, of the checkpoints of all families; there are four trees
    case for case in cases(tiny_models.CASES, range(1, 9))
    if case[0] in DRAFTED and case[3] == "greedy" and not (case[0].endswith("tree") and case[4] in (3, 5, 6, 7))
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(AXES, PRODUCT)
def test_speculation_says_what_generate_says_in_every_combination(kind, rule, axes, name, J, family, on_mesh):
    same(axes, kind, rule, name, J, family, on_mesh)


# --- laws, by counting ---------------------------------------------------------------------------------------------

V, ROWS, LENGTH = 4, 20000, 4
CONFIG = tiny_config(vocab_size=V)


def table(seed):
    return jnp.asarray(1.5 * np.random.default_rng(seed).standard_normal((V, V)), jnp.float32)


def joint_law(p, settings):
    """The law [V, ..., V] of LENGTH tokens after id 0, the processors seeing every prefix."""
    joint = np.ones(())
    for n in range(LENGTH):
        said = np.array(list(itertools.product(range(V), repeat=n)), int).reshape(V**n, n)
        tokens = jnp.asarray(np.pad(said, ((0, 0), (1, 0))))
        rows = jnp.full(V**n, n + 1)
        logits = jaxinfer.sampling.process(
            p[tokens[:, -1]], jaxinfer.Sampling(**settings).rows(V**n, V), tokens, rows, rows * 0 + 1
        )
        law = np.asarray(jax.nn.softmax(logits), np.float64)
        joint = joint[..., None] * law.reshape((V,) * (n + 1))
    return joint


def far_from_the_law(rule, settings, draft, tree=None, cost=None):
    """The probability of a chi-square as large as that of LENGTH tokens jointly."""
    p = table(0)
    sampling = jaxinfer.Sampling(**settings, seed=list(range(ROWS)))
    result = speculate(
        p, CONFIG, [[0]] * ROWS, draft=draft, num_draft_tokens=3, tree=tree, rule=rule, cost=cost, sampling=sampling,
        model=Table(), max_new_tokens=LENGTH,
    )  # fmt: skip
    joint = joint_law(p, settings)
    ids = np.asarray(result.ids)[:, :LENGTH]
    seen = np.bincount(np.ravel_multi_index(ids.T, joint.shape), minlength=joint.size)
    want = ROWS * joint.reshape(-1)
    assert not seen[want == 0].any()
    common = want >= 5
    seen, want = np.append(seen[common], seen[~common].sum()), np.append(want[common], want[~common].sum())
    seen, want = seen[want > 0], want[want > 0]
    statistic, degrees = ((seen - want) ** 2 / want).sum(), len(want) - 1
    return scipy.stats.chi2.sf(statistic, degrees)


SETTINGS = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.6},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"temperature": 1.2, "min_p": 0.2},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": -0.4},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_emitted_tokens_have_the_law_of_the_target(rule, settings):
    draft = ModelDraft(table(1), CONFIG, Table())
    assert far_from_the_law(rule, settings, draft) > 1e-4


@pytest.mark.parametrize("settings", [SETTINGS["plain"], SETTINGS["penalties"]], ids=["plain", "penalties"])
@pytest.mark.parametrize("rule", ["shared", "token"])
def test_the_tokens_of_a_tree_have_the_law_of_the_target(rule, settings):
    draft = ModelDraft(table(1), CONFIG, Table())
    assert far_from_the_law(rule, settings, draft, tree=(3, 2)) > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_without_probabilities_has_the_law_of_the_target(rule):
    assert far_from_the_law(rule, SETTINGS["plain"], NGram()) > 1e-4


def test_a_row_that_drafts_as_much_as_pays_has_the_law_of_the_target():
    assert far_from_the_law("token", SETTINGS["cool"], ModelDraft(table(1), CONFIG, Table()), cost=0.4) > 1e-4


def test_what_a_draft_says_it_was_drawn_from_is_what_it_was_drawn_from(monkeypatch):
    drawn_from, sample = [], drawing.draws.sample

    def watched(logits, *rest):
        drawn_from.append(logits)
        return sample(logits, *rest)

    monkeypatch.setattr(drawing.draws, "sample", watched)
    state = State.init(Table().init_cache(2, 8)).ask(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    controls = jaxinfer.Sampling(temperature=0.8, top_k=2).rows(2, V)
    shared = drawing.Shared(Tree.chain(3), controls, jax.random.key(0), None, "token", None)
    _, said = drawing.Draw(shared, state).next(table(1)[:2], jnp.zeros((2, 3), jnp.int32), 0)
    assert said is drawn_from[0]


PLANTED = {  # what the draft's draw and the verdict must have in common
    "resampled from p": ("law", lambda law: lambda rule, p, q, ids, tree: (law(rule, p, q, ids, tree)[0], p)),
    "accepted with the noise of the draw": ("ACCEPT", lambda _: jaxinfer.sampling.DRAFT),
    "a round's noise used again": ("place", lambda _: lambda rule, start, i: start + i),
}


@pytest.mark.parametrize(("name", "wrong"), PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_in_the_loop_shows_in_the_counts(name, wrong, monkeypatch):
    jax.clear_caches()
    broken = wrong(getattr(verifying, name))
    for module in (verifying, drawing):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, broken)
    rule = "block" if name == "place" else "token"
    found = far_from_the_law(rule, SETTINGS["plain"], ModelDraft(table(1), CONFIG, Table()))
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


@pytest.mark.parametrize("tree", [None, (4, 2, 1)], ids=["chain", "tree"])
def test_a_row_that_fills_its_cache_says_what_generate_says(tree):
    params, config = target()
    draft, prompts = make_draft("model", params, config, "llama"), [PROMPTS[0], PROMPTS[1]]
    for size in (31, 33):  # positions for all but the newest token
        new = [size + 1 - len(prompt) for prompt in prompts]
        plain = jaxinfer.generate(
            params, config, prompts, max_new_tokens=new, buffer=32, cache=jaxinfer.init_cache(config, 2, size)
        )
        cache = jaxinfer.init_cache(config, 2, size, max_pending=21)
        result = speculate(params, config, prompts, draft=draft, tree=tree, max_new_tokens=new, buffer=32, cache=cache)
        np.testing.assert_array_equal(result.ids, plain.ids)
        assert result.num.tolist() == new and int(result.accepted.sum()) > 0


def test_a_row_says_alone_what_it_says_in_a_batch():
    params, config = target()
    draft = make_draft("model", params, config, "llama")
    sampling, ids, _ = expected("filtered")
    for row, prompt in enumerate(PROMPTS):
        own = jaxinfer.Sampling(**{name: value[row] for name, value in FILTERED.items()})
        result = speculate(params, config, [prompt], draft=draft, sampling=own, max_new_tokens=NEW)
        np.testing.assert_array_equal(np.asarray(result.ids)[0], ids[row])


def test_a_conversation_goes_on_from_the_state_and_plain_decoding_can_go_on_from_it():
    params, config = target()
    draft = make_draft("model", params, config, "llama")
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
    ask = functools.partial(speculate, params, config, PROMPTS)
    with pytest.raises(ValueError, match="num_draft_tokens is 0"):
        ask(draft=NGram(), num_draft_tokens=0)
    with pytest.raises(ValueError, match="'fast' is not known: take one of shared, token, block"):
        ask(draft=NGram(), rule="fast")
    with pytest.raises(ValueError, match="1 tokens pending but num_draft_tokens 4 needs 5"):
        ask(draft=NGram(), cache=jaxinfer.init_cache(config, 3, 64))
    with pytest.raises(ValueError, match="5 tokens pending but the draft tree needs 10"):
        ask(draft=LayersDraft(params, config, 1), tree=(3, 2), cache=jaxinfer.init_cache(config, 3, 64, max_pending=5))
    with pytest.raises(ValueError, match="the draft has 77 ids but the target 101"):
        ask(draft=ModelDraft(*tiny_model(vocab_size=77)))
    with pytest.raises(ValueError, match="vocab is 90 but the draft has 77 ids and the target 101"):
        ask(draft=ModelDraft(*tiny_model(vocab_size=77), vocab=90))
    with pytest.raises(ValueError, match="NGram guesses one token at a place"):
        ask(draft=NGram(), tree=(2, 2))
    with pytest.raises(ValueError, match="the block rule decides about a chain"):
        ask(draft=LayersDraft(params, config, 1), tree="2,2", rule="block")
    with pytest.raises(ValueError, match="the draft tree has 84 nodes: it must have from 1 to 63"):
        ask(draft=LayersDraft(params, config, 1), tree=(4, 4, 4))
    with pytest.raises(ValueError, match="draft tree '2;2' cannot be read"):
        ask(draft=LayersDraft(params, config, 1), tree="2;2")
    head = models.head_config(tiny_config(width=20))
    with pytest.raises(ValueError, match="hidden states of width 20 but the target's have 36"):
        ask(draft=HeadDraft(models.init_head(head, jax.random.key(0)), params, head, config))


@pytest.mark.parametrize("rule", RULES)
def test_ids_that_only_the_draft_knows_are_never_drawn(rule):
    params, config = target()
    wide, padded = tiny_model(num_layers=2, vocab_size=112, seed=0)
    draft = ModelDraft(wide, padded, vocab=101)
    sampling = jaxinfer.Sampling(temperature=[0.0, 3.0, 3.0])
    result = speculate(params, config, PROMPTS, draft=draft, rule=rule, sampling=sampling, max_new_tokens=NEW)
    ids = np.asarray(result.ids)[:, :NEW]
    assert (ids >= 0).all() and (ids < 101).all() and int(result.drafted.sum()) > 0
    plain = jaxinfer.generate(params, config, PROMPTS, sampling=sampling, max_new_tokens=NEW)
    rows = slice(None) if rule == "shared" else slice(0, 1)
    np.testing.assert_array_equal(ids[rows], np.asarray(plain.ids)[rows, :NEW])
