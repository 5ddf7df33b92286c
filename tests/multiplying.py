"""What the tests of the GPU's kernel for products share: where it is interpreted, and where it runs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import ops
from jaxinfer.config import NormSpec
from jaxinfer.kernels.gpu.products import Around

CASES = [  # numbers of x, outputs of each weight; dtype; what stands around
    (1024, (64, 16, 16), "bfloat16", "norm"),
    (640, (50,), "bfloat16", "add"),
    (96, (37, 37), "bfloat16", "norm gate"),
    (1500, (20, 12), "float16", ""),
    (600, (33,), "float16", "norm add"),
    (31, (5,), "bfloat16", "norm add"),
    (1030, (18, 18), "bfloat16", "gate"),
]


def arrays(case, seed=0):
    """(x, weights, scale, add, around, spec) of a case."""
    inner, outputs, dtype, what = case
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), dtype)

    spec = NormSpec(eps=0.1, offset=1.0, late_cast=True) if "norm" in what else None
    around = Around(jax.nn.silu if "gate" in what else None, *((spec.eps, spec.offset) if spec else ()))
    scale, add = normal(inner) if spec else None, normal(1, outputs[0]) if "add" in what else None
    return normal(1, inner), tuple(normal(num, inner) for num in outputs), scale, add, around, spec


def is_the_twin(multiply, case):
    """The kernel rounds nothing but its answer: in float32 it says what the plain form says of the same numbers."""
    x, weights, scale, add, around, spec = arrays(case)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights, scale, add))
    expected = ops.unfused(*exact, spec=spec, gate=around.gate)
    got = multiply(x, weights, scale, add, around=around, dtype=jnp.float32)
    assert len(got) == len(expected) == (1 if around.gate else len(weights))
    size = case[0] ** (1.0 if around.gate else 0.5)  # of a sum of so many numbers, or of two times each other
    for y, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * size)
    (rounded, *_) = multiply(x, weights, scale, add, around=around)
    assert rounded.dtype == x.dtype
    np.testing.assert_array_equal(rounded, got[0].astype(x.dtype))
