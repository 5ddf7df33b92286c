"""Every control acts on split logits as on whole ones: the same ids kept, the same ids drawn, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import Sampling, choose, logprobs, process, sample

AXES = ("tensor=8", "data=2,tensor=4", "tensor=2", "data=2,seq=2,tensor=2")
B, V, S = 5, 1003, 40  # neither rows nor ids are divided by the devices
CONTROLS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "mixed": {"temperature": [0.0, 1.0, 0.5, 0.0, 2.0]},
    "top_k": {"top_k": [1, 5, 128, 0, 64]},
    "top_k below the best 128": {"top_k": [129, 500, 1000, 2, 0]},
    "top_p": {"top_p": [0.1, 0.5, 0.9, 1.0, 0.01]},
    "top_p below the best 128": {"top_p": [0.99, 0.999, 0.97, 1.0, 0.95], "temperature": 3.0},
    "both and min_p": {"top_k": 300, "top_p": 0.8, "min_p": [0.0, 0.1, 0.5, 1.0, 0.01]},
    "bias": {"logit_bias": {0: 3.0, 124: -2.0, 125: 9.0, 126: float("-inf"), 1002: 5.0}},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": [0.0, 0.5, -0.5, 1.0, 2.0]},
    "stop ids forbidden": {"stop_ids": [7, 500, 1002], "min_new_tokens": [0, 100, 3, 100, 100]},
}


def draw_logits():
    rng = np.random.default_rng(3)
    logits = 3 * rng.standard_normal((B, V)).astype(np.float32)
    logits[1, ::7] = logits[1].max()  # ties on every device
    logits[3] = np.round(logits[3])  # ties everywhere
    return logits


def draw_tokens():
    return np.random.default_rng(4).integers(0, V, (B, S)).astype(np.int32)


LENGTH, PROMPT = np.array([40, 31, 20, 11, 2], np.int32), np.array([10, 30, 18, 11, 1], np.int32)


@jax.jit  # one program a mesh, whatever the controls
def program(logits, tokens, sampling):
    processed = process(logits, sampling, tokens, LENGTH, PROMPT)
    drawn = sample(processed, sampling, jax.random.key(1), LENGTH)
    return processed, drawn, *choose(processed, logits, sampling, jax.random.key(1), LENGTH)


def outcome(logits, controls):
    """(processed, drawn ids twice, their logprobs) of some logits."""
    sampling = Sampling(**controls, seed=list(range(B))).rows(B, V)
    return [np.asarray(x) for x in program(logits, draw_tokens(), sampling)]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_acts_on_split_logits_as_on_whole_ones(name, axes, on_mesh):
    logits, controls = draw_logits(), CONTROLS[name]
    processed, ids, chosen, scores = outcome(logits, controls)
    assert (ids == chosen).all()
    np.testing.assert_allclose(scores, logprobs(jnp.asarray(logits), jnp.asarray(ids)), atol=1e-5)
    with on_mesh(axes):
        other, *drawn, close = outcome(logits, controls)
    np.testing.assert_array_equal(other, processed)
    for got in drawn:
        np.testing.assert_array_equal(got, ids)
    np.testing.assert_allclose(close, scores, atol=1e-5)


@pytest.mark.parametrize("axes", AXES)
def test_rows_of_nan_or_of_nothing_are_what_they_are_on_one_device(axes, on_mesh):
    logits = draw_logits()
    logits[0, 700], logits[2], logits[4, 3] = np.nan, -np.inf, np.inf
    plain = outcome(logits, {"temperature": [1.0, 0.0, 1.0, 1.0, 0.0]})
    with on_mesh(axes):
        split = outcome(logits, {"temperature": [1.0, 0.0, 1.0, 1.0, 0.0]})
    for got, want in zip(split[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(got, want)
    assert split[1][0] == 0 and split[1][2] == 0 and split[1][4] == 3
