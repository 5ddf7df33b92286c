"""Every family on every mesh says what it says on one device: ids, sampled ones too, and logits."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CASES, VOCAB, write_checkpoint

import jaxinfer
from jaxinfer import mesh, models

MESHES = ("tensor=1", "tensor=2", "tensor=8", "data=2,tensor=4", "seq=4", "seq=2,tensor=2")
NUM = [19, 7, 1]  # a row is added where `data` does not divide them
NEW = 64
SAMPLING = jaxinfer.Sampling(
    temperature=[0.0, 0.9, 1.1],
    top_p=[1.0, 1.0, 0.8],
    top_k=[0, 0, 30],
    repetition_penalty=[1.0, 1.0, 1.2],
    seed=[0, 1, 2],
)
OPTIMIZED = ("llama", "olmo2")  # compiled as users compile them; the others without optimization, in half of the time


def variant_of(family):
    """The variant with the oddest sizes, and room for all tokens."""
    return "long" if family == "gpt2" else next(iter(CASES[family]))


@functools.cache
def on_one_device(family):
    """(params, config, what `say` gives) without a mesh."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(pathlib.Path(directory), family, variant_of(family))
        params, config = jaxinfer.load(directory, dtype=jnp.float32)
    return params, config, say(params, config)


def say(params, config):
    """ids and logprobs of a generation, and the logits of the prompts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (len(NUM), max(NUM)))
    rows = [row[:n].tolist() for row, n in zip(ids, NUM, strict=True)]
    result = jaxinfer.generate(params, config, rows, sampling=SAMPLING, max_new_tokens=NEW)
    cache = jaxinfer.init_cache(config, len(NUM), 32)
    logits, _ = jaxinfer.forward(params, config, jnp.asarray(ids), cache, num=jnp.asarray(NUM))
    return np.asarray(result.ids), np.asarray(result.logprobs), np.asarray(logits)


@pytest.fixture
def compiled(family):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", family not in OPTIMIZED)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def asked(family, axes):
    """By default every family on every mesh, but for what adds nothing: Gemma 3's text part has a family of its own,
    and one device is one device."""
    same = family == "gemma3" or (axes == "tensor=1" and family != "llama")
    return pytest.param(family, axes, marks=pytest.mark.full if same else [])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("family", "axes"), [asked(family, axes) for family in CASES for axes in MESHES])
def test_family_says_the_same_on_every_mesh(family, axes, on_mesh):
    params, config, (ids, logprobs, logits) = on_one_device(family)
    with on_mesh(axes):
        arranged, wide = models.arrange(params, config)
        placed = mesh.shard(arranged, models.letters(wide))
        got_ids, got_logprobs, got_logits = say(placed, wide)
    assert got_ids.tolist() == ids.tolist()
    assert (ids[:, : NEW - 1] >= 0).all(), "no row may stop early, or less is shown than promised"
    np.testing.assert_allclose(got_logprobs, logprobs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(got_logits, logits, atol=1e-4, rtol=0)
