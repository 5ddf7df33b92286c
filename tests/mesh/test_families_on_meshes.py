"""Every family on every mesh says what it says on one device: ids, sampled ones too, and logits."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quickly
from tiny_models import CASES, VOCAB, write_checkpoint

import jaxinfer
from jaxinfer import mesh, models
from jaxinfer.sampling import choose, process

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
OPTIMIZED = ("llama", "olmo2")  # compiled as users compile them
PROMPTS = np.random.default_rng(0).integers(0, VOCAB, (len(NUM), max(NUM)), np.int32)


def variant_of(family):
    """The variant with the oddest sizes, and room for all tokens."""
    return "long" if family == "gpt2" else next(iter(CASES[family]))


@functools.cache
def on_one_device(family):
    """(params, config, what `step_by_step` gives) without a mesh."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(pathlib.Path(directory), family, variant_of(family))
        params, config = jaxinfer.load(directory, dtype=jnp.float32)
    return params, config, step_by_step(params, config)


def on_the_mesh(params, config):
    """(params, config) as the ambient mesh has them."""
    arranged, wide = models.arrange(params, config)
    return mesh.shard(arranged, models.letters(wide)), wide


def in_one_dispatch(params, config):
    """ids and logprobs [B, NEW] of a generation."""
    rows = [row[:n].tolist() for row, n in zip(PROMPTS, NUM, strict=True)]
    result = jaxinfer.generate(params, config, rows, sampling=SAMPLING, max_new_tokens=NEW)
    return np.asarray(result.ids), np.asarray(result.logprobs)


def step_by_step(params, config):
    """The same by the public steps, and the logits of the prompts [B, T, V]: the draw is compiled once for all."""
    tokens, length = np.zeros((len(NUM), max(NUM) + NEW), np.int32), np.array(NUM, np.int32)
    tokens[:, : max(NUM)] = PROMPTS
    cache = jaxinfer.init_cache(config, len(NUM), tokens.shape[1])
    whole, cache = jaxinfer.forward(params, config, jnp.asarray(PROMPTS), cache, num=jnp.asarray(NUM))
    logits = np.asarray(whole)[np.arange(len(NUM)), length - 1]
    ids, logprobs = [], []
    for _ in range(NEW):
        token, logprob = map(np.asarray, draw(logits, tokens, length))
        tokens[np.arange(len(NUM)), length] = token
        length = length + 1
        ids.append(token)
        logprobs.append(logprob)
        logits, cache = jaxinfer.decode_step(params, config, jnp.asarray(token), cache)
    return np.stack(ids, 1), np.stack(logprobs, 1), np.asarray(whole)


@jax.jit
def draw(logits, tokens, length):
    sampling = SAMPLING.rows(len(NUM), VOCAB)
    processed = process(logits, sampling, tokens, length, jnp.asarray(NUM))
    return choose(processed, logits, sampling, jax.random.key(0), length)


@pytest.fixture
def compiled(family):
    with quickly(family not in OPTIMIZED):
        yield


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("family", CASES)
def test_family_says_the_same_on_every_mesh(family, axes, on_mesh):
    params, config, (ids, logprobs, logits) = on_one_device(family)
    with on_mesh(axes):
        got_ids, got_logprobs, got_logits = step_by_step(*on_the_mesh(params, config))
    assert got_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(got_logprobs, logprobs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(got_logits, logits, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("family", "axes"),
    # by default every family once and every mesh, where steps already went over both: the loop adds nothing to a layer
    [pytest.param(family, axes, marks=[] if family == "llama" or i % len(MESHES) == j else pytest.mark.full)
     for i, family in enumerate(CASES) for j, axes in enumerate(MESHES)],
)  # fmt: skip
def test_a_generation_on_a_mesh_is_the_steps_on_one_device(family, axes, on_mesh):
    params, config, (ids, logprobs, _) = on_one_device(family)
    with on_mesh(axes):
        got_ids, got_logprobs = in_one_dispatch(*on_the_mesh(params, config))
    assert got_ids.tolist() == ids.tolist(), "a stop would leave -1 at the end, and show less than was promised"
    np.testing.assert_allclose(got_logprobs, logprobs, atol=1e-4, rtol=0)
