"""A draft says what its model would go on with, in the first round and after others: no token is missing, none is old.

Speculation emits the right tokens with any draft, so that a draft which has lost one is only less often right.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import in_full

import jaxinfer
from jaxinfer import models
from jaxinfer.cache import Tree
from jaxinfer.speculation import HeadDraft, LayersDraft, ModelDraft, NGram
from jaxinfer.speculation.drawing import Draw, Shared
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
WIDE = 32
J, ROWS = 4, [[5, 6, 7, 8, 9, 5, 6, 7], [11, 12]]
DRAFTS = ("model", "right model", "layers", "head")
TREE = Tree.branching(2, 2, 1)


@functools.cache
def target():
    return tiny_model(num_layers=2)


@functools.cache
def draft_of(kind):
    params, config = target()
    match kind:
        case "model":
            return ModelDraft(*tiny_model(seed=1, num_layers=1))
        case "right model":  # all that it says is accepted
            return ModelDraft(params, config)
        case "layers":
            return LayersDraft(params, config, 1)
    own = models.head_config(config)
    return HeadDraft(models.init_head(own, jax.random.key(5)), params, own, config)


def padded(tokens):
    """As an array [1, WIDE], so that each function is compiled once."""
    return jnp.array([tokens + [0] * (WIDE - len(tokens))])


def scores_after(kind, tokens):
    """What the draft scores behind tokens, worked out anew, without a cache."""
    params, config = target()
    draft = draft_of(kind)
    if kind == "layers":
        params, config = params | {"layers": params["layers"][:1]}, config.replace(layers=config.layers[:1])
    elif kind != "head":
        params, config = draft.params, draft.config
    cache = jaxinfer.init_cache(config, 1, WIDE, kind="none")
    scores, _ = jaxinfer.prefill(params, config, padded(tokens), cache, num=jnp.array([len(tokens)]))
    return np.asarray(scores[0])


@jax.jit
def hidden_states(ids, num):
    """The target's [1, WIDE, D]."""
    params, config = target()
    none = jaxinfer.init_cache(config, 1, WIDE, kind="none")
    return models.decoder(params, config, ids, none, none.step(num, WIDE))[0][0]


@jax.jit
def head_makes(ids, states, num):
    """What the head makes of slots [1, WIDE], and its scores."""
    draft, (params, config) = draft_of("head"), target()
    cache = jaxinfer.init_cache(draft.config, 1, WIDE, kind="none")
    step = cache.step(num, WIDE)
    made, _ = models.head(draft.params, draft.config, params, config, ids, states, cache, step)
    return made, models.head_logits(draft.params, params, config, made)


def head_scores(tokens, guesses):
    """The head's scores behind tokens and then guesses, whose hidden states it has to guess too."""
    n = len(tokens)
    states, ids = hidden_states(padded(tokens), jnp.array([n])), [*tokens[1:], *guesses]
    for t in range(n - 1, len(ids) + 1):  # one pass for each guess, over all slots so far
        made, scores = head_makes(padded(ids[:t]), states, jnp.array([t]))
        states = states.at[:, t].set(made[:, t - 1])
    return np.asarray(scores[0, len(ids) - 1])


@functools.cache
def after(kind, new):
    """The result of some rounds, of which the rows differ in length."""
    params, config = target()
    return jaxinfer.speculate(
        params, config, ROWS, draft=draft_of(kind), num_draft_tokens=J, max_new_tokens=[new, new + 2], buffer=16,
        cache=jaxinfer.init_cache(config, 2, 64, max_pending=TREE.num_nodes),
    )  # fmt: skip


def proposed(kind, result, tree, config):
    """What the draft proposes next."""
    greedy = jaxinfer.Sampling(temperature=0.0).rows(2, config.vocab_size)
    shared = Shared(tree, greedy, jax.random.key(0), None, "shared", config.vocab_size)
    active, num = jnp.ones(2, bool), jnp.full(2, tree.height)
    ids, *_ = draft_of(kind).propose(result.memory.draft, result.state, active, num, Draw(shared, result.state))
    return np.asarray(ids)


@pytest.mark.parametrize(
    ("kind", "new"),
    [
        pytest.param(kind, new, marks=() if new == 6 or kind == "head" else pytest.mark.full)
        for kind in DRAFTS
        for new in (1, 6, 9)
    ],
)
def test_a_draft_goes_on_as_its_model_would(kind, new):
    config, result = target()[1], after(kind, new)
    guesses = proposed(kind, result, Tree.chain(J), config)
    for row in range(2):
        tokens = result.state.tokens[row, : int(result.state.length[row])].tolist()
        for i, guess in enumerate(guesses[row].tolist()):
            so_far = guesses[row, :i].tolist()
            scores = head_scores(tokens, so_far) if kind == "head" else scores_after(kind, tokens + so_far)
            assert guess == scores.argmax(), (row, i)


@pytest.mark.parametrize("kind", [in_full("model"), "layers", "head"])
def test_a_tree_holds_the_best_that_its_model_would_go_on_with_behind_every_node(kind):
    config, result = target()[1], after(kind, 6)
    nodes = proposed(kind, result, TREE, config)
    for row in range(2):
        tokens = result.state.tokens[row, : int(result.state.length[row])].tolist()
        for node in range(TREE.num_nodes):
            children = [n for n, parent in enumerate(TREE.parents, 1) if parent == node]
            path = [int(nodes[row, step - 1]) for step in np.flatnonzero(TREE.sees[node]) if step]
            if children:
                scores = head_scores(tokens, path) if kind == "head" else scores_after(kind, tokens + path)
                best = np.argsort(-scores)[: len(children)]
                assert nodes[row, np.array(children) - 1].tolist() == best.tolist(), (row, node)


def test_a_lookup_goes_on_as_after_the_latest_longest_match():
    result = jaxinfer.speculate(*target(), [[1, 2, 3, 9, 2, 3, 4, 1, 2, 3], [7]], draft=NGram(), max_new_tokens=[1, 1])
    state = result.state.replace(tokens=result.state.tokens.at[0, 10].set(2).at[1, 1].set(7))
    shared = Shared(Tree.chain(3), None, None, None, "shared", None)
    ids, _, num, *_ = NGram().propose((), state, jnp.ones(2, bool), jnp.full(2, 3), Draw(shared, state))
    # row 0 ends in 3 2, which is new; the latest 2 before stands before a 3, and what follows is 3 2 again
    assert ids.tolist() == [[3, 2, 3], [7, 7, 7]] and num.tolist() == [3, 3]
