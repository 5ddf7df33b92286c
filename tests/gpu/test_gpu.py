"""Parity and laws on a GPU (`pytest -m gpu`): the same programs, against the CPU of the same machine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import Sampling, program
from jaxinfer.decoding.generate import run
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 17, 99, 3], [42], [7, 8, 9, 10, 11, 12, 13] * 5]
KINDS = {
    "plain": {},
    "window": {"window": 5},
    "qk_norm": {"qk_norm": "head"},
    "projection_norm": {"qk_norm": "projection", "pre_norm": False, "post_norm": True},
    "softcap_and_biases": {"softcap": 3.0, "qkv_bias": True, "out_bias": True, "ffn_bias": True},
    "multi_head": {"num_heads": 3, "num_kv_heads": 3},
    "no_rope_no_gate": {"rope": None, "gated": False, "activation": "gelu_tanh"},
}


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, and the default backend is {jax.default_backend()}")
    return jax.devices("gpu")[0]


def on(platform, function):
    """Runs it with everything on the first device of a platform."""
    with jax.default_device(jax.devices(platform)[0]):
        return jax.device_get(function())


def ids_of(result):
    return [row[:n].tolist() for row, n in zip(np.asarray(result.ids), np.asarray(result.num), strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_on_a_gpu_are_those_on_a_cpu(kind):
    def score():
        params, config = tiny_model(**KINDS[kind])
        ids = np.random.default_rng(0).integers(0, 101, (3, 40))
        cache = jaxinfer.init_cache(config, 3, 64)
        return jaxinfer.forward(params, config, ids, cache, num=np.array([40, 7, 1]))[0]

    gpu, cpu = on("gpu", score), on("cpu", score)
    assert 1 < np.abs(cpu).max() < 100
    np.testing.assert_allclose(gpu, cpu, atol=1e-4 * np.abs(cpu).max())


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_on_a_gpu_are_those_on_a_cpu(kind, settings):
    def text():
        params, config = tiny_model(**KINDS[kind])
        sampling = Sampling(**settings, seed=[1, 2, 3], repetition_penalty=1.1)
        return jaxinfer.generate(params, config, PROMPTS, sampling=sampling, max_new_tokens=24)

    assert ids_of(on("gpu", text)) == ids_of(on("cpu", text))


def test_row_alone_equals_row_in_batch_on_a_gpu():
    params, config = tiny_model()
    sampling = {"temperature": 0.9, "top_p": 0.95}
    whole = jaxinfer.generate(params, config, PROMPTS, sampling=Sampling(**sampling), max_new_tokens=24)
    for row, prompt in enumerate(PROMPTS):
        one = jaxinfer.generate(params, config, [prompt], sampling=Sampling(**sampling), max_new_tokens=24)
        assert ids_of(one)[0] == ids_of(whole)[row]


def test_bfloat16_on_a_gpu_says_nearly_what_float32_says():
    """KL of the next token's distribution, on the built-in model: rounding, and nothing else."""
    tokenizer = jaxinfer.Tokenizer("builtin")
    ids = np.array([tokenizer.encode("def read(path):\n    with open(path) as file:\n        return file.read()\n")])

    def scores(dtype):
        params, config = jaxinfer.load("builtin", dtype=dtype)
        cache = jaxinfer.init_cache(config, 1, 128)
        return jax.nn.log_softmax(jaxinfer.forward(params, config, ids, cache)[0])

    exact, rounded = scores(jnp.float32), scores(jnp.bfloat16)
    assert float(jnp.sum(jnp.exp(exact) * (exact - rounded), -1).mean()) < 1e-2


def test_the_loop_on_a_gpu_holds_one_cache():
    params, config = tiny_model()
    cache = jaxinfer.init_cache(config, 8, 4096)
    held = cache.bytes
    sampling = Sampling(temperature=0.5).rows(8, config.vocab_size, ())
    state = jax.jit(jaxinfer.decoding.State.init, donate_argnums=0)(cache)
    budget = np.full(8, 16, np.int32)
    model = jaxinfer.decoding.Decoder(config)
    lowered = run.lower(
        params, state, None, None, sampling, budget, jax.random.key(0), model=model, process=None, buffer=16
    )
    memory = program.temporaries(lowered.compile())
    assert memory["temp"] < held / 2 and memory["alias"] >= held
