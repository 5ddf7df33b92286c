"""Attention whose slots are split over devices is attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops, program
from jaxinfer.testing import tiny_config


def draw(B=4, T=5, N=8, K=4, S=24, H=10):
    key = jax.random.key(1)
    q, k, v = (
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(B, T, N, H), (B, K, S, H), (B, K, S, H)])
    )
    position = jnp.array([[0, 1, 2, 3, 4], [19, 20, 21, 22, 23], [3, 4, 5, 1 << 30, 1 << 30], [9, 10, 11, 12, 13]])
    return q, k, v, position


@functools.cache
def on_one_device(spec):
    """What attention is."""
    return np.asarray(jax.jit(ops.attend, static_argnums=4)(*draw(), spec))


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("form", [ops.attend, ops.attend_blockwise])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("axes", ["seq=4", "seq=2,tensor=4", "data=2,seq=2,tensor=2", "tensor=4"])
def test_attention_over_split_slots_is_attention(form, window, axes, on_mesh):
    spec = tiny_config(window=window, softcap=3.0).layers[0]
    q, k, v, position = draw()
    with on_mesh(axes):
        split = jax.jit(functools.partial(form, spec=spec))(q, k, v, position)
    valid = np.asarray(position) < k.shape[2]
    np.testing.assert_allclose(np.asarray(split)[valid], on_one_device(spec)[valid], atol=2e-6)


def test_blocks_of_split_slots_meet_in_two_collectives_and_gather_no_cache(on_mesh):
    spec = tiny_config().layers[0]
    q, k, v, position = draw()
    with on_mesh("data=2,seq=4"):
        compiled = jax.jit(lambda *a: ops.attend_blockwise(*a, spec, 4)).lower(q, k, v, position).compile()
    found = {row["kind"]: row["count"] for row in program.collectives(compiled)}
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"] <= 3
