"""The model that ships: small, really trained, and the same model in transformers."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import jaxinfer
from jaxinfer import hub, models, training, weights
from jaxinfer.training import corpus

DIRECTORY = hub.BUILTIN
ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (DIRECTORY / "model.safetensors").is_file(), reason="not trained yet")
PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def model():
    return jaxinfer.load("builtin", dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


def test_it_is_as_small_and_as_deep_as_promised(model):
    params, config = model
    layer = config.layers[0]
    assert len(config.layers) >= 8 and layer.head_width == 64 and layer.num_kv_heads == 2 and layer.num_heads >= 4
    assert config.max_length >= 1024
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) <= 8_000_000
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 16_000_000
    assert not list(DIRECTORY.glob("*chat*")) and "chat_template" not in json.loads(
        (DIRECTORY / "tokenizer_config.json").read_text()
    )


def test_a_prompt_begins_with_the_id_that_also_ends_a_text(model, tokenizer):
    _, config = model
    assert config.bos_id == 0 and config.stop_ids == (0,)
    assert tokenizer.encode(PROMPT).ids[0] == 0


def test_held_out_text_takes_fewer_bits_than_xz_needs(model, tokenizer):
    """On the first files of the held-out list; benchmarks/training/builtin.json has the figure for all of them."""
    params, config = model
    try:
        held_out = corpus.read_corpus().held_out
    except ValueError as error:
        pytest.skip(str(error))
    files = dict(list(held_out.items())[2:5])
    nats = jax.jit(lambda params, ids: training.token_nats(params, config, ids))
    documents = training.encode(tokenizer, files.values())
    size = sum(len(file.encode()) for file in files.values())
    bits, _ = training.held_out_bits(nats, params, documents, size, length=1024, stride=512)
    assert bits < 0.9 * corpus.xz_bits_per_byte(held_out)  # xz on all of the text, where it does best


def test_it_runs_in_transformers_unchanged(model, tokenizer):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    params, config = model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    text = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.generation_config.eos_token_id == 0
    ids = text(PROMPT + "\n    if n < 2:\n        return n\n")["input_ids"]
    assert ids == tokenizer.encode(PROMPT + "\n    if n < 2:\n        return n\n").ids
    assert text.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0].numpy()
    nats = jax.jit(lambda params, ids: training.token_nats(params, config, ids))(params, jnp.asarray([ids]))[0]
    probability = jax.nn.log_softmax(jnp.asarray(wanted[:-1]), -1)
    np.testing.assert_allclose(nats, -probability[jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])], atol=1e-4)
    cache = jaxinfer.init_cache(config, rows=1, size=len(ids))
    logits, _ = jaxinfer.forward(params, config, jnp.asarray([ids]), cache)
    np.testing.assert_allclose(logits[0], wanted, atol=1e-4)


# --- its drafts ---------------------------------------------------------------------------------------------------

KINDS = ("draft", "head")
needs_drafts = pytest.mark.skipif(
    not all((DIRECTORY / kind / "model.safetensors").is_file() for kind in KINDS), reason="not distilled yet"
)


@needs_drafts
def test_its_drafts_are_small_and_its_own(model):
    params, config = model
    for kind in KINDS:
        assert {path.name for path in (DIRECTORY / kind).iterdir()} >= {"config.json", "model.safetensors"}
        assert sum(path.stat().st_size for path in (DIRECTORY / kind).iterdir()) <= 2_000_000, kind
    _, draft = jaxinfer.load(DIRECTORY / "draft")
    for name in ("vocab_size", "stop_ids", "max_length", "bos_id"):
        assert getattr(draft, name) == getattr(config, name), name
    _, _, target = weights.load_head(DIRECTORY / "head")
    assert target == models.fingerprint(params, config) == models.fingerprint(*jaxinfer.load("builtin"))


@needs_drafts
@pytest.mark.parametrize("kind", KINDS)
def test_its_drafts_are_kept_as_often_as_their_result_says(model, tokenizer, kind):
    """On one file of the held-out list; benchmarks/training/distill_*.json has the figures for all of them."""
    params, config = model
    try:
        held_out = corpus.read_corpus().held_out
    except ValueError as error:
        pytest.skip(str(error))
    told = json.loads((ROOT / "benchmarks" / "training" / f"distill_{kind}.json").read_text())["acceptance"]
    documents = training.encode(tokenizer, [held_out["textwrap.py"]])
    if kind == "draft":
        draft, draft_config = jaxinfer.load(DIRECTORY / kind, dtype=jnp.float32)
        compare = functools.partial(training.compare_model, draft, draft_config, params, config)
    else:
        draft, draft_config, _ = weights.load_head(DIRECTORY / kind, jnp.float32)
        compare = functools.partial(training.compare_head, draft, draft_config, params, config, depths=3)
    kept, _, _ = training.held_out_acceptance(jax.jit(lambda ids: compare(ids=ids)), documents, length=512)
    assert len(kept) == len(told)
    np.testing.assert_allclose(kept, told, atol=0.1)
