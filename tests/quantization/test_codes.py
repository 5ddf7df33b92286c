"""Codes say nearly what they were given, and how nearly is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quantization import Grouped, Plain, Scaled

SHAPES = [(3, 2, 5), (1,), (2, 1, 4, 3)]


def draw(*shape, seed=0, spread=3.0):
    """Numbers of very different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.normal(0, spread, (*shape[:-1], 1)))).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_off_by_at_most_half_a_step_of_its_own_vector(shape):
    x = draw(*shape, 10)
    coded = Scaled.empty(shape, 10, jnp.float32).encode(jnp.asarray(x))
    assert coded.codes.dtype == jnp.int8 and coded.scale.shape == shape
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(np.asarray(coded.decode()) - x) <= step * 0.5001).all()
    assert (np.abs(np.asarray(coded.codes)).max(-1) == 127).all(), "the largest entry takes the largest code"


@pytest.mark.parametrize("shape", SHAPES)
def test_float8_is_off_by_at_most_a_sixteenth_or_half_of_the_least_step(shape):
    x = draw(*shape, 10)
    coded = Scaled.empty(shape, 10, jnp.float32, float8=True).encode(jnp.asarray(x))
    scale = np.abs(x).max(-1, keepdims=True) / 448
    assert (np.abs(np.asarray(coded.decode()) - x) <= np.maximum(np.abs(x) / 16, scale * 2.0**-10) * 1.0001).all()


@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize(("g", "H"), [(4, 10), (32, 64), (8, 12)])
def test_int4_is_off_by_at_most_half_a_step_of_its_group_and_what_sixteen_bits_are_off(by, g, H):
    x = draw(3, 2, g, H, spread=0.5) + 5
    coded = Grouped.empty((3, 2), H, jnp.float32, g, by).encode(jnp.asarray(x))
    assert coded.tokens == g and coded.codes.shape == (3, 2, g // 2, H)
    if by == "channel":
        low, high = x.min(-2, keepdims=True), x.max(-2, keepdims=True)
    else:
        n = coded.scale.shape[-1]
        groups = x.reshape(3, 2, g, n, H // n)
        low, high = (np.repeat(f(groups, -1), H // n, -1) for f in (np.min, np.max))
    sixteen = 2.0**-10 * np.maximum(np.abs(low), np.abs(high))  # of zero, and of 15 scales
    assert (np.abs(np.asarray(coded.decode()) - x) <= (high - low) / 30 * 1.001 + 2 * sixteen).all()


@pytest.mark.parametrize("coded", [Plain.empty((2,), 6, jnp.float32), Scaled.empty((2,), 6, jnp.float32),
                                   Scaled.empty((2,), 6, jnp.float32, True)])  # fmt: skip
def test_zeros_are_zeros_and_one_number_is_itself(coded):
    np.testing.assert_array_equal(coded.encode(jnp.zeros((2, 6))).decode(), 0)
    np.testing.assert_allclose(coded.encode(jnp.full((2, 6), 3.5)).decode(), 3.5, rtol=1e-6)


def test_a_group_of_one_number_is_that_number():
    for by in ("channel", "token"):
        coded = Grouped.empty((1,), 6, jnp.float32, 4, by)
        np.testing.assert_allclose(coded.encode(jnp.full((1, 4, 6), -2.5)).decode(), -2.5, rtol=1e-3)


def test_codes_keep_the_first_axes_of_what_they_are_given():
    for coded in (Scaled.empty((2, 3), 6, jnp.float32), Grouped.empty((2, 3), 6, jnp.float32, 4, "token")):
        lead = (5, 7) if coded.tokens == 1 else (5, 7, 4)
        new = coded.encode(jnp.zeros((*lead, 6)))
        assert all(leaf.shape[:2] == (5, 7) for leaf in jax.tree.leaves(new))
        assert jax.tree.structure(new) == jax.tree.structure(coded)


def attention(q, k, v):
    weight = jax.nn.softmax(q @ k.T / np.sqrt(q.shape[-1]), axis=-1)
    return weight @ v


def test_keys_with_outlier_channels_want_groups_by_channel_and_values_by_token():
    # KIVI, Liu et al. 2024, table 1: keys have a few large channels; every value token is scaled by its own weight
    rng = np.random.default_rng(2)
    T, H = 32, 64
    q, k, v = (rng.standard_normal((n, H)).astype(np.float32) for n in (16, T, T))
    k[:, [3, 17, 40]] = 30 + 2 * k[:, [3, 17, 40]]  # outliers stay in their channels
    q[:, [3, 17, 40]] *= 0.05
    exact = attention(q, k, v)

    def off(keys, values):
        coded = [Grouped.empty((1,), H, jnp.float32, T, by) for by in (keys, values)]
        told = [np.asarray(c.encode(jnp.asarray(x[None])).decode())[0] for c, x in zip(coded, (k, v), strict=True)]
        return {"keys": np.abs(attention(q, told[0], v) - exact).mean(),
                "values": np.abs(attention(q, k, told[1]) - exact).mean()}  # fmt: skip

    assert 4 * off("channel", "token")["keys"] < off("token", "token")["keys"]
    # few tokens have most of the weight: by token their own error counts, by channel that of the largest token
    v *= np.exp(rng.normal(0, 2, (T, 1)))
    q *= 6
    exact = attention(q, k, v)
    assert off("channel", "token")["values"] < off("channel", "channel")["values"]
