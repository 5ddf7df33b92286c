"""Nats are the cross entropy of the decoder's logits; bits per byte count every token once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer import models, training
from jaxinfer.cache import init_cache
from jaxinfer.training import losses

RAW = {
    "model_type": "qwen3", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIG = models.config_from_hf(RAW)
PARAMS = models.init_params(CONFIG, jax.random.key(1), jnp.float32)
IDS = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)
NATS = jax.jit(lambda params, ids: training.token_nats(params, CONFIG, ids))


def uniform(params, ids):
    """A model that knows nothing of 64 tokens: six bits each."""
    return jnp.full((ids.shape[0], ids.shape[1] - 1), math.log(64))


def test_nats_equal_a_cross_entropy_in_float64():
    @jax.jit
    def logits(params, ids):
        cache = init_cache(CONFIG, rows=3, size=19, kind="none")
        (hidden, _), _ = models.decoder(params, CONFIG, ids, cache, cache.step(jnp.full(3, 19), 19))
        return models.logits(params, CONFIG, hidden)

    score = np.asarray(logits(PARAMS, IDS[:, :-1]), np.float64)
    probability = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    wanted = -np.log(np.take_along_axis(probability, IDS[:, 1:, None], -1)[..., 0])
    np.testing.assert_allclose(NATS(PARAMS, IDS), wanted, atol=1e-5)


def test_nats_equal_transformers_loss(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    training.save_huggingface(tmp_path, PARAMS, RAW | {"architectures": ["Qwen3ForCausalLM"]})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor(IDS, dtype=torch.long)
    with torch.no_grad():
        wanted = model(ids, labels=ids).loss
    np.testing.assert_allclose(NATS(PARAMS, IDS).mean(), float(wanted), atol=1e-5)


def test_the_gradient_is_the_slope_of_the_loss():
    def slopes(params, ids):
        grads = jax.grad(training.loss)(params, CONFIG, ids)
        slope = sum((g * g).sum() / 200 for g in jax.tree.leaves(grads))
        up, down = (
            training.loss(jax.tree.map(lambda p, g, way=way: p + way * g / 200, params, grads), CONFIG, ids)
            for way in (1, -1)
        )
        return (up - down) / 2, slope

    measured, computed = jax.jit(slopes)(PARAMS, jnp.asarray(IDS))
    np.testing.assert_allclose(measured, computed, rtol=0.01)


@pytest.mark.parametrize("tokens", [2, 9, 16, 17, 18, 25, 33, 100])
def test_windows_count_every_prediction_once_with_at_least_the_promised_context(tokens):
    document = np.arange(tokens)
    counted = []
    for window, seen in losses.document_windows(document, length=16, stride=8):
        assert len(window) <= 17
        for index in range(seen, len(window) - 1):
            counted.append(window[index + 1])
            assert index >= 8 or window[0] == 0  # 8 tokens before the one it predicts from, or the document's start
    assert counted == list(range(1, tokens))


def test_bits_per_byte_is_nats_over_all_tokens_by_bytes_of_text():
    documents = [np.zeros(n, np.int32) for n in (5, 40, 17)]
    bits, tokens = training.held_out_bits(uniform, None, documents, num_bytes=1000, length=16, stride=8)
    assert tokens == 4 + 39 + 16
    np.testing.assert_allclose(bits, 6 * tokens / 1000, rtol=1e-6)


def test_bits_by_position_cover_the_window_and_leave_the_special_token_out():
    documents = [np.array([0, *range(1, 60)], np.int32) for _ in range(20)]
    size = np.where(np.arange(64) == 0, 0, 2)
    buckets = training.position_bits(uniform, None, documents, size, length=256)
    assert [(b["from"], b["to"]) for b in buckets] == [(0, 64), (64, 128), (128, 256)]
    for bucket in buckets:
        np.testing.assert_allclose(bucket["bits_per_byte"], 3, rtol=1e-6)  # six bits for two bytes


def test_passes_of_a_step_sum_to_the_whole_batch():
    ids = jnp.asarray(IDS[:2])
    optimizer = optax.sgd(1.0)

    def run(batch):
        params = jax.tree.map(jnp.copy, PARAMS)  # a step spends its state
        step = training.make_step(lambda p, part: training.loss(p, CONFIG, part), optimizer)
        return step((params, optimizer.init(params)), batch)

    (together, _), loss = run(ids[None])
    (apart, _), same = run(ids[:, None])
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, apart)


def test_muon_sees_every_projection_as_out_by_in_and_nothing_else():
    from jaxinfer.training.optimizers import matrices

    seen = matrices(PARAMS)
    assert seen["embed"] is None and seen["norm"]["scale"] is None and seen["layers"][0]["q_norm"]["scale"] is None
    for name, array in PARAMS["layers"][1].items():
        if name.endswith("norm"):
            continue
        axes = seen["layers"][1][name]
        fan_in = math.prod(array.shape[axis] for axis in axes.reduction_axis)
        wanted = {"q": 24, "k": 24, "v": 24, "o": 32, "gate": 24, "up": 24, "down": 40}[name]
        assert fan_in == wanted and {*axes.reduction_axis, *axes.output_axis} == set(range(array.ndim))
