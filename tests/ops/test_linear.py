"""Products, norms and rope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops
from jaxinfer.config import NormSpec, RopeSpec


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [2, 3, 8, 33])
def test_a_lone_row_has_the_bits_it_has_among_others(dtype, rows):
    x = jax.random.normal(jax.random.key(0), (rows, 1, 65), dtype)
    w = jax.random.normal(jax.random.key(1), (3, 7, 65), dtype)
    product = jax.jit(lambda x: ops.linear(x, w, "BTD,NHD->BTNH"))
    whole = product(x)
    for row in range(rows):
        np.testing.assert_array_equal(product(x[row : row + 1])[0], whole[row])


def test_products_of_bfloat16_are_summed_in_float32():
    x, w = jnp.ones((2, 1, 4096), jnp.bfloat16), jnp.ones((1, 4096), jnp.bfloat16)
    assert ops.linear(x, w.at[0, 0].set(2), "BTD,FD->BTF", dtype=jnp.float32)[0, 0, 0] == 4097


def test_a_bias_is_added_once():
    x, w, bias = jnp.ones((1, 1, 3)), jnp.ones((2, 3)), jnp.array([10.0, 20.0])
    np.testing.assert_array_equal(ops.linear(x, w, "BTD,FD->BTF", bias)[0, 0], [13, 23])


def test_an_id_outside_the_table_is_not_another_ids_row():
    table = jnp.arange(6.0).reshape(3, 2)
    out = ops.embed(table, jnp.array([2, 3, -1]))
    np.testing.assert_array_equal(out[0], [4, 5])
    assert np.isnan(out[1:]).all()


def test_a_norm_over_a_projection_sees_all_its_heads():
    x = jax.random.normal(jax.random.key(0), (1, 1, 3, 4))
    p = {"scale": jnp.ones((3, 4))}
    got = ops.norm(x, p, NormSpec(eps=0.0), axes=2)
    np.testing.assert_allclose(jnp.mean(got**2), 1, rtol=1e-6)
    flat = ops.norm(x.reshape(1, 1, 12), {"scale": jnp.ones(12)}, NormSpec(eps=0.0))
    np.testing.assert_allclose(got.reshape(12), flat[0, 0])


def test_rope_turns_only_its_part_of_a_head_and_keeps_lengths():
    spec = RopeSpec(frequency=(1.0, 0.1))
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 6))
    y = ops.rotate(x, *ops.angles(jnp.array([[0, 5, 300]]), spec, 512))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_longrope_is_chosen_by_the_size_of_the_cache_alone():
    spec = RopeSpec(frequency=(1.0,), long_frequency=(0.25,), long_scale=2.0, switch=64)
    position = jnp.array([[4]])
    short, long = ops.angles(position, spec, 64), ops.angles(position, spec, 65)
    np.testing.assert_allclose(short[0], jnp.cos(4.0) * jnp.ones((1, 1, 1)), rtol=1e-6)
    np.testing.assert_allclose(long[0], 2 * jnp.cos(1.0) * jnp.ones((1, 1, 1)), rtol=1e-6)
