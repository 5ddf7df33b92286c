"""The laws of the public steps, exactly, in float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PARAMS, CONFIG = tiny_model()
IDS = np.random.default_rng(0).integers(0, 101, (3, 13)).astype(np.int32)
NUM = np.array([13, 1, 6], np.int32)


def new(rows=3, size=32):
    return jaxinfer.init_cache(CONFIG, rows, size)


def last(logits, num):
    return np.take_along_axis(np.asarray(logits), (num - 1)[:, None, None], 1)[:, 0]


def test_prefill_is_the_last_valid_row_of_forward():
    whole, _ = jaxinfer.forward(PARAMS, CONFIG, IDS, new(), num=NUM)
    score, cache = jaxinfer.prefill(PARAMS, CONFIG, IDS, new(), num=NUM)
    np.testing.assert_allclose(score, last(whole, NUM), atol=1e-4)
    np.testing.assert_array_equal(cache.length, NUM)


def test_prefill_equals_token_by_token():
    whole, _ = jaxinfer.forward(PARAMS, CONFIG, IDS, new())
    cache = new()
    for t in range(IDS.shape[1]):
        score, cache = jaxinfer.decode_step(PARAMS, CONFIG, IDS[:, t], cache)
        np.testing.assert_allclose(score, whole[:, t], atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 13])
def test_chunks_of_any_size_give_the_same_scores(size):
    whole, _ = jaxinfer.forward(PARAMS, CONFIG, IDS, new(), num=NUM)
    cache, parts = new(), []
    for start in range(0, 13, size):
        piece = IDS[:, start : start + size]
        num = np.clip(NUM - start, 0, piece.shape[1])
        score, cache = jaxinfer.forward(PARAMS, CONFIG, piece, cache, num=num)
        parts.append(score)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)
    np.testing.assert_array_equal(cache.length, NUM)


def test_row_alone_equals_row_in_batch():
    whole, _ = jaxinfer.forward(PARAMS, CONFIG, IDS, new(), num=NUM)
    for row in range(3):
        one = slice(row, row + 1)
        score, _ = jaxinfer.forward(PARAMS, CONFIG, IDS[one, : NUM[row]], new(rows=1), num=NUM[one])
        np.testing.assert_allclose(score[0], whole[row, : NUM[row]], atol=1e-4)


def test_pads_and_idle_rows_score_zero_and_leave_no_trace():
    num = np.array([13, 0, 6], np.int32)
    score, cache = jaxinfer.forward(PARAMS, CONFIG, IDS, new(), num=num)
    assert (np.asarray(score)[1] == 0).all() and (np.asarray(score)[2, 6:] == 0).all()
    jax.tree.map(np.testing.assert_array_equal, cache.take(jnp.array([1])), new(rows=1))
    score, _ = jaxinfer.prefill(PARAMS, CONFIG, IDS, cache, num=np.array([0, 2, 0]))
    assert (np.asarray(score)[[0, 2]] == 0).all() and (np.asarray(score)[1] != 0).any()


@pytest.mark.parametrize("pad", [-1, 0, 100, 5000])
def test_the_id_of_a_pad_does_not_matter(pad):
    padded = np.where(np.arange(13) < NUM[:, None], IDS, pad)
    for kind in ("dense", "none"):
        cache = jaxinfer.init_cache(CONFIG, 3, 32, kind=kind)
        score, _ = jaxinfer.prefill(PARAMS, CONFIG, padded, cache, num=NUM)
        plain, _ = jaxinfer.prefill(PARAMS, CONFIG, IDS, new(), num=NUM)
        np.testing.assert_allclose(score, plain, atol=1e-4)


def test_a_cache_is_spent_by_the_call_that_takes_it():
    cache = new()
    jaxinfer.prefill(PARAMS, CONFIG, IDS, cache)
    with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
        jaxinfer.prefill(PARAMS, CONFIG, IDS, cache)


def test_decode_step_traces_once():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda ids, cache: jaxinfer.decode_step(PARAMS, CONFIG, ids, cache), n=1))
    cache = new()
    for t in range(5):
        _, cache = step(IDS[:, t], cache)


def test_steps_compose_inside_the_callers_jit_and_gradient():
    def loss(params):
        cache = jaxinfer.init_cache(CONFIG, 3, 13, kind="none")
        score, _ = jaxinfer.forward(params, CONFIG, IDS, cache)
        return -jax.nn.log_softmax(score)[:, :-1].mean()

    gradient = jax.jit(jax.grad(loss))(PARAMS)
    assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("ids", "num", "message"),
    [
        (np.zeros(3, np.int32), None, r"shape \(3,\) .* rank 2"),
        (np.zeros((3, 4), np.float32), None, "dtype float32: they must be integers"),
        (np.zeros((3, 4), np.int32), np.zeros(2, np.int32), r"num has shape \(2,\) but ids have 3 rows"),
    ],
)
def test_ids_of_another_shape_are_refused(ids, num, message):
    with pytest.raises(ValueError, match=message):
        jaxinfer.forward(PARAMS, CONFIG, ids, new(), num=num)
