"""A widened model is larger and says the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import models
from jaxinfer.testing import tiny_config, tiny_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_the_widened_builtin_model_says_what_the_builtin_model_says():
    params, config = jaxinfer.load("builtin", jnp.float32)
    large, wide = models.widen(params, config, 1024, 10, jax.random.key(0))
    assert jax.tree.map(jnp.shape, large) == jax.tree.map(lambda x: x.shape, models.param_shapes(wide))
    ids = [jaxinfer.Tokenizer("builtin").encode("def fibonacci(n):\n"), [5, 6, 7]]
    plain, same = (
        jaxinfer.generate(p, c, ids, sampling=jaxinfer.Sampling(temperature=[0.0, 1.0]), max_new_tokens=24)
        for p, c in ((params, config), (large, wide))
    )
    np.testing.assert_array_equal(same.ids, plain.ids)
    np.testing.assert_allclose(same.logprobs, plain.logprobs, atol=1e-4)


def test_every_new_weight_is_random_but_those_that_are_listened_to():
    config = tiny_config(num_layers=1)
    large, wide = models.widen(tiny_params(config), config, 64, 2, jax.random.key(0))
    first, second = large["layers"]
    assert not first["down"][:, 51:].any() and first["down"][:, :51].all()
    assert first["gate"][51:].all() and first["up"][51:].all()
    assert not second["o"].any() and not second["down"].any()
    assert all(second[name].all() for name in ("q", "k", "v", "gate", "up"))
    assert len(wide.layers) == 2 and wide.layers[1].ffn_width == 64


def test_what_cannot_be_widened_is_refused():
    config = tiny_config(num_layers=2)
    with pytest.raises(ValueError, match="cannot be widened to 1 of 64"):
        models.widen(tiny_params(config), config, 64, 1, jax.random.key(0))
    biased = tiny_config(num_layers=2, ffn_bias=True)
    with pytest.raises(ValueError, match="add biases"):
        models.widen(tiny_params(biased), biased, 64, 3, jax.random.key(0))
