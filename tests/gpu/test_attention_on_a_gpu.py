"""The attention kernel, compiled and run on a GPU (`pytest -m gpu`): equal to its plain twin, alone and in programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import CASES, arrays, in_pages, is_the_twin, rule_of, spec_of

import jaxinfer
from jaxinfer import kernels
from jaxinfer.kernels import KernelChoice
from jaxinfer.kernels.gpu import attention as gpu
from jaxinfer.ops import PAST
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.gpu
KERNEL = "__gpu$xla.gpu.triton"
LARGE = [  # as they are used: whole blocks, several shares, heads of many widths
    ((8, 1, 32, 8, 4096, 128), "bfloat16", "bfloat16", {}, None),
    ((8, 1, 32, 8, 4096, 128), "bfloat16", "bfloat16", {}, 16),
    ((8, 1, 32, 8, 4096, 128), "int8", "bfloat16", {}, 16),
    ((4, 5, 16, 8, 2000, 256), "bfloat16", "bfloat16", {"window": 1024, "softcap": 50.0}, None),
    ((2, 1, 32, 32, 3000, 96), "float16", "float16", {}, None),
    ((2, 1, 14, 2, 1000, 64), "float32", "float32", {}, 32),
    ((2, 700, 24, 8, 1500, 128), "bfloat16", "bfloat16", {"window": 300}, None),
    ((1, 300, 8, 4, 600, 256), "float32", "float32", {}, None),
]


@pytest.fixture(scope="module", autouse=True)
def on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, and the default backend is {jax.default_backend()}")


@functools.partial(jax.jit, static_argnames="rule")
def compiled(q, position, kept, rule):
    return gpu.attend(q, position, kept, rule)


@pytest.mark.parametrize(("shape", "form", "queries", "rule", "page"), CASES + LARGE, ids=str)
def test_the_kernel_is_its_plain_twin(shape, form, queries, rule, page):
    q, position, source = arrays(shape, form)
    q, spec = q.astype(queries), spec_of(shape, **rule)
    where = source if page is None else in_pages(source, page, groups=2 if shape[0] == 4 else 1)
    is_the_twin(compiled(q, position, where.kept, rule_of(spec)), q, position, source, spec)


def test_slots_in_any_order_and_sinks_are_looked_at():
    shape = (3, 2, 4, 2, 700, 64)
    q, position, source = arrays(shape)
    draw = np.random.default_rng(1)
    slot = np.stack([draw.permutation(700) for _ in range(3)]).astype(np.int32)
    slot[:, ::9] = PAST
    source = source.replace(slot=jnp.asarray(slot))
    for window, sinks in ((200, 0), (60, 4)):
        spec = spec_of(shape, window=window)
        is_the_twin(compiled(q, position, source.kept, rule_of(spec, sinks)), q, position, source, spec, sinks)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_a_query_has_the_same_bits_alone_and_among_other_rows_and_pads_are_zeros(form):
    shape = (3, 2, 8, 2, 1500, 128)
    q, position, source = arrays(shape, form)
    position = position.at[1, 1:].set(PAST).at[2].set(PAST)
    rule = rule_of(spec_of(shape, window=1000))
    together = compiled(q, position, source.kept, rule)
    assert not together[1, 1:].any() and not together[2].any() and together[1, 0].any()
    for b in range(2):
        own = jax.tree.map(lambda x, b=b: x[b : b + 1], source)
        np.testing.assert_array_equal(compiled(q[b : b + 1], position[b : b + 1], own.kept, rule)[0], together[b])


def test_what_no_query_sees_is_not_read():
    shape = (2, 1, 4, 2, 1300, 64)
    q, _, source = arrays(shape)
    position = jnp.array([[900], [70]], jnp.int32)
    rule = rule_of(spec_of(shape, window=500))
    seen = np.zeros((2, 1, 1300, 1), bool)
    seen[0, 0, 401:901] = True
    seen[1, 0, :71] = True
    poisoned = jax.tree.map(lambda x: jnp.where(seen, x, jnp.nan), source)
    clean = compiled(q, position, source.kept, rule)
    np.testing.assert_array_equal(compiled(q, position, poisoned.kept, rule), clean)
    np.testing.assert_array_equal(compiled(q, position, in_pages(poisoned, 16).kept, rule), clean)


@pytest.mark.parametrize("kind", ["dense", "paged:page=8", "int8", "paged:page=8+int8", "ring:window=12"])
def test_it_changes_no_id(kind):
    params, config = tiny_model(softcap=20.0)
    prompts = [list(range(5, 45)), [11, 12, 13], [20]]

    def said(name):
        with kernels.use(KernelChoice(attention=name)):
            cache = jaxinfer.init_cache(config, 3, 96, kind)
            return jaxinfer.generate(params, config, prompts, cache=cache, max_new_tokens=32)

    got, expected = said("gpu"), said("reference")
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


def test_it_is_taken_unless_the_plain_form_is_asked_for():
    params, config = tiny_model(num_layers=1)
    for name in ("auto", "gpu", "reference"):
        cache = jaxinfer.init_cache(config, 2, 64)
        with kernels.use(KernelChoice(attention=name)):
            text = jaxinfer.forward.lower(params, config, jnp.ones((2, 1), jnp.int32), cache).as_text()
        assert (KERNEL in text) == (name != "reference")
