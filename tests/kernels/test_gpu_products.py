"""Products of a lone row by the GPU's kernel: equal to their plain twin, with what stands before and after them.

The kernel itself runs in tests/gpu; here it is interpreted, operation by operation, and lowered for a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import multiplying
import numpy as np
import pytest

import jaxinfer
from jaxinfer import kernels, ops
from jaxinfer.kernels import KernelChoice
from jaxinfer.kernels.gpu import products
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
KERNEL = "__gpu$xla.gpu.triton"
interpreted = functools.partial(products.multiply, interpret=True)


@pytest.fixture
def for_an_h200():
    """Programs here are for a GPU that is not there."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.mark.parametrize("case", multiplying.CASES, ids=str)
def test_the_kernel_is_its_plain_twin(case):
    multiplying.is_the_twin(interpreted, case)


def test_a_number_that_is_none_reaches_its_own_output():
    x, weights, scale, add, around, _ = multiplying.arrays(multiplying.CASES[4])
    assert np.isnan(interpreted(x.at[0, 5].set(jnp.nan), weights, scale, add, around=around)[0]).all()
    hole = interpreted(x, (weights[0].at[7, 3].set(jnp.nan),), scale, add, around=around)[0]
    assert np.isnan(hole[0, 7]) and np.isnan(hole).sum() == 1


# --- in programs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """As if this CPU were a GPU: the kernel is chosen as there, and interpreted; gives what it was asked."""
    asked = []

    def project(plain, around, dtype, x, weights, *more):
        asked.append((len(weights), around.gate is not None, more[0] is not None, more[1] is not None))
        return interpreted(x, weights, *more, around=around, dtype=dtype)

    def projects(self, x, *weights):
        return self.linear != "reference" and len(x) == 1 and products.unknown(x, *weights) is None

    monkeypatch.setattr(kernels, "project", project)
    monkeypatch.setattr(KernelChoice, "projects", projects)
    return asked


MANNERS = {
    "llama": {},
    "gemma2": {"post_norm": True, "activation": "gelu_tanh"},
    "gpt2": {"gated": False, "qkv_bias": True, "ffn_bias": True, "out_bias": True, "activation": "gelu"},
    "olmo2": {"qk_norm": "projection", "pre_norm": False, "post_norm": True},
    "gelu": {"activation": "gelu"},
}
ASKED = {  # of a layer: weights, whether a gate, a norm before, a sum after
    "llama": [(3, False, True, False), (1, False, False, True), (2, True, True, False), (1, False, False, True)],
    "gemma2": [(3, False, True, False), (1, False, False, False), (2, True, True, False), (1, False, False, False)],
    "gpt2": [(3, False, True, False), (1, False, True, False)],  # a bias stands between a product and its sum
    "olmo2": [(3, False, False, False), (1, False, False, False), (2, True, False, False), (1, False, False, False)],
    "gelu": [(3, False, True, False), (1, False, False, True), (2, False, True, False), (1, False, False, True)],
}


@pytest.mark.parametrize("manner", MANNERS)
def test_a_model_says_nearly_what_it_says_without(manner, taken):
    params, config = tiny_model(num_layers=1, **MANNERS[manner])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = config.replace(dtype="bfloat16")

    def score(name):
        with kernels.use(KernelChoice(linear=name)):
            cache = jaxinfer.init_cache(config, 1, 32)
            return jaxinfer.forward(params, config, jnp.array([[5]]), cache)[0]

    got, expected = score("auto"), score("reference")
    assert taken == [*ASKED[manner], (1, False, True, False)]
    assert not np.array_equal(got, expected), "what is rounded once is not what is rounded twice"
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


def lowered(function, *args):
    return jax.jit(lambda *args: function(*args)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case", multiplying.CASES, ids=str)
def test_it_lowers_for_a_gpu(case, for_an_h200):
    x, weights, scale, add, around, _ = multiplying.arrays(case)
    text = lowered(functools.partial(products.multiply, around=around), x, weights, scale, add)
    assert text.count(KERNEL) == 1


@pytest.mark.parametrize("activation", sorted(ops.FUSED))
def test_every_gate_that_is_fused_lowers_for_a_gpu(activation, for_an_h200):
    x, weights, scale, add, around, _ = multiplying.arrays(multiplying.CASES[2])
    around = around._replace(gate=ops.ACTIVATION[activation])
    assert KERNEL in lowered(functools.partial(products.multiply, around=around), x, weights, scale, add)


def test_it_is_taken_in_programs_for_a_gpu(for_an_h200, monkeypatch):
    def kernels_in(dtype, form=None, rows=1, **choice):
        params, config = tiny_model(num_layers=1)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        params = jaxinfer.quantize(params, form) if form else params
        config = config.replace(dtype=dtype)
        cache = jaxinfer.init_cache(config, rows, 32)
        with kernels.use(KernelChoice(attention="reference", **choice)):
            traced = jaxinfer.forward.trace(params, config, jnp.ones((rows, 1), jnp.int32), cache)
            return traced.lower(lowering_platforms=("cuda",)).as_text().count(KERNEL)

    assert kernels_in("bfloat16") == kernels_in("float16") == kernels_in("bfloat16", linear="gpu") == 5
    assert kernels_in("bfloat16", linear="reference") == kernels_in("float32") == 0
    assert kernels_in("bfloat16", rows=2) == kernels_in("bfloat16", "int8") == 0
    with pytest.raises(RuntimeError, match="linear='gpu' is not to be had: it multiplies no float32: use bfloat16 or"):
        kernels_in("float32", linear="gpu")
    monkeypatch.setattr(products, "MOST", 100)  # one less than ids
    jax.clear_caches()
    assert kernels_in("bfloat16") == kernels_in("bfloat16", linear="gpu") == 4


def test_what_it_cannot_multiply_is_told():
    def told(x, *weights):
        return products.unknown(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (x, *weights)))

    row = ((1, 8), "bfloat16")
    assert told(row, ((4, 8), "bfloat16")) is None
    assert told(((1, 8), "float32")) == "it multiplies no float32"
    assert told(((2, 8), "bfloat16")) == "it multiplies one row, and there are 2"
    assert told(row, ((4, 8), "bfloat16"), ((4, 8), "float16")) == "it multiplies no bfloat16 with float16"
    assert told(row, ((1 << 17, 8), "bfloat16")) == "it makes 65536 outputs at most, and there are 131072"


def test_derivatives_are_those_of_the_plain_form(for_an_h200):
    x, weights, scale, add, around, spec = multiplying.arrays(multiplying.CASES[1])
    twin = functools.partial(ops.unfused, spec=spec, gate=None)

    def squared(x, weights):
        (y,) = products.project(twin, around, None, x, weights, scale, add)
        return (y.astype(jnp.float32) ** 2).sum()

    def plainly(x, weights):
        return (twin(x, weights, scale, add)[0].astype(jnp.float32) ** 2).sum()

    assert KERNEL in lowered(jax.grad(squared), x, weights), "what is squared is the kernel's"
    for got, want in zip(
        jax.tree.leaves(jax.jit(jax.grad(squared, (0, 1)))(x, weights)),
        jax.tree.leaves(jax.jit(jax.grad(plainly, (0, 1)))(x, weights)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
