"""The contract of a cache, on its first kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.cache import cache_bytes, init_cache
from jaxinfer.testing import tiny_model

PARAMS, CONFIG = tiny_model()
IDS = np.random.default_rng(0).integers(0, 101, (2, 12)).astype(np.int32)


@jax.jit
def run(ids, cache, num, start=None):
    """Scores of ids from `start` on; they stay pending."""
    (hidden, _), cache = models.decoder(PARAMS, CONFIG, ids, cache, cache.step(num, ids.shape[1], start))
    return models.logits(PARAMS, CONFIG, hidden), cache


def rows(n, value):
    return jnp.full(n, value, jnp.int32)


def test_pending_tokens_are_seen_by_the_calls_that_follow_and_committed_once():
    whole, _ = run(IDS, init_cache(CONFIG, 2, 16), rows(2, 12))
    cache = init_cache(CONFIG, 2, 16)
    for t in range(12):
        score, cache = run(IDS[:, t : t + 1], cache, rows(2, 1), start=rows(2, t))
        np.testing.assert_allclose(score[:, 0], whole[:, t], atol=1e-4)
    assert (cache.length == 0).all()
    assert (cache.advance(rows(2, 12)).length == 12).all()


def test_tokens_that_are_not_committed_are_as_if_they_had_never_been():
    _, cache = run(IDS[:, :5], init_cache(CONFIG, 2, 16), rows(2, 5))
    cache = cache.advance(rows(2, 5))
    _, cache = run(IDS[:, ::-1][:, :4], cache, rows(2, 4))  # a draft
    cache = cache.advance(jnp.array([0, 0]))
    score, _ = run(IDS[:, 5:8], cache, rows(2, 3))
    whole, _ = run(IDS[:, :8], init_cache(CONFIG, 2, 16), rows(2, 8))
    np.testing.assert_allclose(score, whole[:, 5:], atol=1e-4)


def test_rewind_takes_back_and_never_moves_forward():
    _, cache = run(IDS, init_cache(CONFIG, 2, 16), rows(2, 12))
    cache = cache.advance(rows(2, 12)).rewind(jnp.array([4, 40]))
    np.testing.assert_array_equal(cache.length, [4, 12])
    score, _ = run(IDS[:, 4:6], cache, jnp.array([2, 0]))
    whole, _ = run(IDS[:, :6], init_cache(CONFIG, 2, 16), rows(2, 6))
    np.testing.assert_allclose(score[0], whole[0, 4:], atol=1e-4)


def test_what_does_not_fit_is_dropped_and_said_and_overwrites_nothing():
    _, full = run(IDS[:, :8], init_cache(CONFIG, 2, 8), rows(2, 8))
    full = full.advance(rows(2, 8))
    assert not full.overflow.any()
    _, over = run(IDS[:, 8:], full, jnp.array([4, 0]))
    over = over.advance(jnp.array([4, 0]))
    np.testing.assert_array_equal(over.overflow, [True, False])
    jax.tree.map(np.testing.assert_array_equal, over.layers, full.layers)


def test_a_row_with_nothing_valid_changes_nothing():
    _, cache = run(IDS[:, :5], init_cache(CONFIG, 2, 16), rows(2, 5))
    cache = cache.advance(rows(2, 5))
    _, after = run(IDS[:, 5:], cache, jnp.array([7, 0]))
    after = after.advance(jnp.array([7, 0]))
    jax.tree.map(np.testing.assert_array_equal, after.take(jnp.array([1])), cache.take(jnp.array([1])))


def test_take_and_put_move_rows():
    _, cache = run(IDS, init_cache(CONFIG, 2, 16), jnp.array([12, 7]))
    cache = cache.advance(jnp.array([12, 7]))
    swapped = cache.put(jnp.array([1, 0]), cache.take(jnp.array([0, 1])))
    np.testing.assert_array_equal(swapped.length, [7, 12])
    jax.tree.map(np.testing.assert_array_equal, swapped.take(jnp.array([1, 0])), cache)


def test_bytes_are_known_before_anything_is_allocated():
    promised = cache_bytes(CONFIG, 2, 16, dtype=jnp.bfloat16)
    assert promised == init_cache(CONFIG, 2, 16, dtype=jnp.bfloat16).bytes
    assert promised == 2 * 2 * 2 * 2 * 16 * 10 * 2 + 2 * 4  # k and v, L B K S H, two bytes; lengths


def test_a_cache_that_does_not_fit_in_memory_is_refused_before_it_is_allocated():
    with pytest.raises(ValueError, match=r"needs .* of memory, .* free"):
        init_cache(CONFIG, 1 << 20, 1 << 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "paper"}, r"'paper' is not known: take one of auto, dense, ring, .* none, with \+16-bit, \+int8"),
        ({"rows": 0}, "0 rows of 16 tokens holds nothing"),
        ({"size": 0}, "2 rows of 0 tokens holds nothing"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        init_cache(CONFIG, **({"rows": 2, "size": 16} | options))


def test_the_cache_of_kind_none_sees_the_call_alone():
    none, cache = run(IDS, init_cache(CONFIG, 2, 16, kind="none"), rows(2, 12))
    dense, _ = run(IDS, init_cache(CONFIG, 2, 16), rows(2, 12))
    np.testing.assert_allclose(none, dense, atol=1e-4)
    assert cache.bytes == 8
