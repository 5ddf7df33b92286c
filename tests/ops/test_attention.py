"""Attention: the blockwise form is the plain one, and both are the textbook's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops
from jaxinfer.testing import tiny_config


def textbook(q, k, v, position, spec):
    """Query by query, head by head, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    B, T, N, H = q.shape
    group = N // k.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        first = 0 if spec.window is None else max(0, position[b, t] - spec.window + 1)
        seen = slice(first, position[b, t] + 1)
        score = k[b, n // group, seen] @ q[b, t, n] * spec.scale
        if spec.softcap is not None:
            score = spec.softcap * np.tanh(score / spec.softcap)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight / weight.sum() @ v[b, n // group, seen]
    return out


def draw(B=2, T=5, N=6, K=2, S=23, H=10, dtype=jnp.float32):
    key = jax.random.key(1)
    q = jax.random.normal(jax.random.fold_in(key, 0), (B, T, N, H), dtype)
    k = jax.random.normal(jax.random.fold_in(key, 1), (B, K, S, H), dtype)
    v = jax.random.normal(jax.random.fold_in(key, 2), (B, K, S, H), dtype)
    return q, k, v, np.array([[0, 1, 2, 3, 4], [18, 19, 20, 21, 22]])[:, :T]


@pytest.mark.parametrize("form", [ops.attend, ops.attend_blockwise])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_is_the_textbook_formula(form, window, softcap):
    spec = tiny_config(window=window, softcap=softcap).layers[0]
    q, k, v, position = draw()
    np.testing.assert_allclose(form(q, k, v, jnp.asarray(position), spec), textbook(q, k, v, position, spec), atol=2e-6)


@pytest.mark.parametrize("block", [1, 4, 7, 23, 64])
def test_blocks_of_any_size_give_the_same_attention(block):
    spec = tiny_config(window=6).layers[0]
    q, k, v, position = draw()
    plain = ops.attend(q, k, v, jnp.asarray(position), spec)
    np.testing.assert_allclose(ops.attend_blockwise(q, k, v, jnp.asarray(position), spec, block), plain, atol=2e-6)


def test_the_blockwise_loop_ends_at_the_last_slot_that_anyone_sees():
    spec = tiny_config().layers[0]
    q, k, v, _ = draw(T=2)
    poison = k.at[:, :, 8:].set(jnp.nan)
    out = ops.attend_blockwise(q, poison, v, jnp.array([[6, 7], [2, 1 << 30]]), spec, block=4)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("form", [ops.attend, ops.attend_blockwise])
def test_a_query_that_sees_nothing_gives_numbers(form):
    spec = tiny_config(window=3).layers[0]
    q, k, v, _ = draw()
    assert np.isfinite(form(q, k, v, jnp.full((2, 5), 1 << 30), spec)).all()


def test_a_lone_query_has_the_bits_it_has_among_others():
    spec = tiny_config(num_heads=2, num_kv_heads=2).layers[0]  # G = 1: one query row a kv head
    q, k, v, _ = draw(B=3, T=1, N=2)
    position = jnp.array([[4], [22], [9]])
    whole = ops.attend(q, k, v, position, spec)
    for b in range(3):
        one = slice(b, b + 1)
        np.testing.assert_array_equal(ops.attend(q[one], k[one], v[one], position[one], spec), whole[one])
