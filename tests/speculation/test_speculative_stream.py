"""The streaming form says what the plain stream says, whatever drafts, and ends where it ends."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import in_full

import jaxinfer
from jaxinfer import models, speculation
from jaxinfer.aot import Programs
from jaxinfer.speculation import HeadDraft, LayersDraft, ModelDraft, NGram
from jaxinfer.testing import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PROMPTS = ["a long prompt that is read in several chunks", "x"]
NEW = 30


@functools.cache
def target():
    return *tiny_model(num_layers=2, vocab_size=256), byte_tokenizer(tempfile.mkdtemp())


def draft_of(kind):
    params, config, _ = target()
    match kind:
        case "model":
            return ModelDraft(*tiny_model(num_layers=1, vocab_size=256))
        case "itself":
            return ModelDraft(params, config)
        case "head":
            own = models.head_config(config)
            return HeadDraft(models.init_head(own, jax.random.key(1)), params, own, config)
        case "layers":
            return LayersDraft(params, config, 1)
    return NGram()


@functools.cache
def plain(stop=()):
    """ids and text of the plain stream."""
    flow = jaxinfer.stream(*target(), PROMPTS, sampling=sampling(), max_new_tokens=NEW, stop=stop, chunk=5)
    deltas = list(flow)
    return flow.ids, flow.text, flow.finish, "".join(delta.text for delta in deltas if delta.row == 0)


def sampling():
    return jaxinfer.Sampling(temperature=[0.0, 0.9], seed=[0, 3])


@pytest.mark.parametrize(("kind", "how"), [
    ("ngram", {}), ("model", {"cost": 0.2}), ("head", {"tree": (2, 2)}), in_full("itself", {}), in_full("layers", {}),
])  # fmt: skip
def test_a_stream_with_a_draft_says_what_the_plain_stream_says(kind, how):
    programs = Programs()
    flow = speculation.stream(
        *target(), PROMPTS, draft=draft_of(kind), num_draft_tokens=3, sampling=sampling(), max_new_tokens=NEW,
        chunk=5, pace=float("inf"), prefill_chunk=7, programs=programs, **how,
    )  # fmt: skip
    assert len(flow.compile()) == 3, "the first chunk, the later ones, the loop"
    first = "".join(delta.text for delta in flow if delta.row == 0)
    assert programs.num == 3, "every dispatch runs a program that was compiled"
    assert (flow.ids, flow.text, flow.finish, first) == plain()
    counts = flow.counts
    assert (counts["rounds"] <= NEW).all() and (counts["accepted"] <= counts["drafted"]).all()
    assert flow.steps >= counts["rounds"].max()
    if kind == "itself":  # rounds of 1, and then of dispatches of 5 tokens: 4, and 1
        assert counts["rounds"].max() <= 1 + 2 * -(-(NEW - 1) // 5)


@pytest.mark.parametrize("kind", [in_full("itself"), "ngram"])
def test_a_stop_string_ends_a_row_at_the_same_place(kind):
    text = plain()[1]
    stop = (text[0][9:11], text[1][14:16])
    flow = speculation.stream(
        *target(), PROMPTS, draft=draft_of(kind), sampling=sampling(), max_new_tokens=NEW, stop=stop, chunk=8,
        pace=float("inf"),
    )  # fmt: skip
    list(flow)
    assert (flow.ids, flow.text, flow.finish) == plain(stop)[:3]
    assert "stop" in flow.finish


@pytest.mark.parametrize("kind", [in_full("model"), "head", "ngram"])
def test_a_conversation_goes_on_from_the_state_of_a_stream(kind):
    params, config, tokenizer = target()
    whole = jaxinfer.stream(params, config, tokenizer, ["hello"], max_new_tokens=9, size=64)
    list(whole)
    then = jaxinfer.stream(params, config, tokenizer, ["more"], state=whole.state, max_new_tokens=9)
    list(then)
    first = speculation.stream(params, config, tokenizer, ["hello"], draft=draft_of(kind), max_new_tokens=9, size=64)
    list(first)
    second = speculation.stream(
        params, config, tokenizer, ["more"], draft=draft_of(kind), state=first.state, max_new_tokens=9
    )
    list(second)
    assert (first.ids, second.ids) == (whole.ids, then.ids)


def test_what_a_draft_has_forgotten_it_reads_again():
    params, config, _ = target()
    ids = [[1, 2, 3, 4, 5, 6], [7, 8]]
    for kind in ("model", "head"):
        draft, cache = draft_of(kind), jaxinfer.init_cache(config, 2, 64, max_pending=5)
        first = speculation.speculate(params, config, ids, draft=draft, cache=cache, max_new_tokens=7)
        state, memory = jax.tree.map(jnp.copy, (first.state, first.memory))
        kept = speculation.speculate(params, config, draft=draft, state=first.state, memory=memory, max_new_tokens=12)
        anew = speculation.speculate(params, config, draft=draft, state=state, max_new_tokens=12)
        np.testing.assert_array_equal(kept.ids, anew.ids)
        np.testing.assert_array_equal(kept.accepted, anew.accepted)
        assert int(kept.drafted.sum()) > 0


def test_bad_requests_are_refused_before_anything_runs():
    params, config, tokenizer = target()
    short = jaxinfer.stream(params, config, tokenizer, ["hello"], max_new_tokens=2, size=64)
    list(short)
    with pytest.raises(ValueError, match="1 tokens pending but num_draft_tokens 4 needs 5"):
        speculation.stream(params, config, tokenizer, ["more"], draft=NGram(), state=short.state)
    with pytest.raises(ValueError, match="the draft takes the first 2 layers but the target has 2: take 1 to 1"):
        speculation.stream(params, config, tokenizer, ["more"], draft=LayersDraft(params, config, 2))
