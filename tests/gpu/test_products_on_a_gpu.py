"""The kernel of a lone row's products, compiled and run on a GPU (`pytest -m gpu`): its plain twin, and in a model."""

import jax
import jax.numpy as jnp
import multiplying
import numpy as np
import pytest

import jaxinfer
from jaxinfer import kernels
from jaxinfer.kernels import KernelChoice
from jaxinfer.kernels.gpu import products

pytestmark = pytest.mark.gpu
LARGE = [  # as they are used
    (4096, (4096, 1024, 1024), "bfloat16", "norm"),
    (4096, (14336, 14336), "bfloat16", "norm gate"),
    (14336, (4096,), "bfloat16", "add"),
]


@pytest.fixture(scope="module", autouse=True)
def on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, and the default backend is {jax.default_backend()}")


@pytest.mark.parametrize("case", multiplying.CASES + LARGE, ids=str)
def test_the_kernel_is_its_plain_twin(case):
    multiplying.is_the_twin(products.multiply, case)


def test_a_model_says_nearly_what_it_says_without():
    """In bfloat16 the kernel rounds less: KL of the built-in model's next token, a token at a time."""
    tokenizer = jaxinfer.Tokenizer("builtin")
    ids = np.array([tokenizer.encode("def read(path):\n    with open(path) as file:\n        return file.read()\n")])
    params, config = jaxinfer.load("builtin", dtype=jnp.bfloat16)

    def scores(**choice):
        with kernels.use(KernelChoice(**choice)):
            cache, found = jaxinfer.init_cache(config, 1, 128), []
            for i in range(ids.shape[1]):
                logits, cache = jaxinfer.forward(params, config, ids[:, i : i + 1], cache)
                found.append(jax.nn.log_softmax(logits[0, 0]))
            return jnp.stack(found)

    got, expected = scores(linear="gpu"), scores(linear="reference")
    assert not np.array_equal(got, expected)
    assert float(jnp.sum(jnp.exp(expected) * (expected - got), -1).mean()) < 1e-2
