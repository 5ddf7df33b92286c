"""Attention by the GPU's kernel: equal to its plain twin (worked out on the CPU), and it reads what is seen.

The kernel itself runs in tests/gpu; here it is interpreted, operation by operation, and lowered for a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import CASES, arrays, in_pages, is_the_twin, rule_of, spec_of

import jaxinfer
from jaxinfer import kernels, mesh, models, ops
from jaxinfer.kernels import Kept, KernelChoice, Rule, attention
from jaxinfer.kernels.gpu import attention as gpu
from jaxinfer.kernels.gpu import unavailable
from jaxinfer.ops import PAST
from jaxinfer.quantization import Plain
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
KERNEL = "__gpu$xla.gpu.triton"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, and shares of several, of few slots."""
    monkeypatch.setattr(gpu, "BLOCK", 1)  # the least: 16 slots
    monkeypatch.setattr(gpu, "SHARE", 40)


@pytest.fixture
def for_an_h200():
    """Programs here are for a GPU that is not there."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


@functools.partial(jax.jit, static_argnames="rule")
def interpreted(q, position, kept, rule):
    return gpu.attend(q, position, kept, rule, interpret=True)


@pytest.mark.parametrize(("shape", "form", "queries", "rule", "page"), CASES, ids=str)
def test_the_kernel_is_its_plain_twin(shape, form, queries, rule, page):
    q, position, source = arrays(shape, form)
    q, spec = q.astype(queries), spec_of(shape, **rule)
    where = source if page is None else in_pages(source, page, groups=2 if shape[0] == 4 else 1)
    got = interpreted(q, position, where.kept, rule_of(spec))
    assert got.dtype == q.dtype and got.shape == q.shape
    is_the_twin(got, q, position, source, spec)


def test_slots_in_any_order_and_sinks_are_looked_at():
    shape = (3, 2, 4, 2, 70, 12)
    q, position, source = arrays(shape)
    draw = np.random.default_rng(1)
    slot = np.stack([draw.permutation(70) for _ in range(3)]).astype(np.int32)
    slot[:, ::9] = PAST
    source = source.replace(slot=jnp.asarray(slot))
    for window, sinks in ((20, 0), (6, 3)):
        spec = spec_of(shape, window=window)
        got = interpreted(q, position + 3, source.kept, rule_of(spec, sinks))
        is_the_twin(got, q, position + 3, source, spec, sinks)


def test_sinks_are_seen_from_behind_the_window_of_slots_in_order_too():
    shape = (2, 1, 2, 1, 100, 8)
    q, _, source = arrays(shape)
    position, spec = jnp.array([[90], [33]], jnp.int32), spec_of(shape, window=10)
    is_the_twin(interpreted(q, position, source.kept, rule_of(spec, 5)), q, position, source, spec, 5)


@pytest.mark.parametrize("page", [None, 8])
def test_a_query_has_the_same_bits_alone_and_among_other_rows_and_pads_are_zeros(page):
    q, position, source = arrays((3, 3, 6, 2, 150, 12))
    position = position.at[1, 1:].set(PAST).at[2].set(PAST)
    rule = rule_of(spec_of((3, 3, 6, 2, 150, 12), window=100))
    together = interpreted(q, position, (in_pages(source, page) if page else source).kept, rule)
    assert not together[1, 1:].any() and not together[2].any() and together[1, 0].all()
    for b in range(2):
        own = jax.tree.map(lambda x, b=b: x[b : b + 1], source)
        kept = (in_pages(own, page) if page else own).kept
        np.testing.assert_array_equal(interpreted(q[b : b + 1], position[b : b + 1], kept, rule)[0], together[b])


def test_what_no_query_sees_is_not_read():
    shape = (2, 2, 4, 2, 130, 16)
    q, _, source = arrays(shape)
    position = jnp.array([[90, 91], [7, PAST]], jnp.int32)
    rule = rule_of(spec_of(shape, window=50))
    seen = np.zeros((2, 1, 130, 1), bool)
    seen[0, 0, 41:92] = True
    seen[1, 0, :8] = True
    poisoned = jax.tree.map(lambda x: jnp.where(seen, x, jnp.nan), source)
    clean = interpreted(q, position, source.kept, rule)
    np.testing.assert_array_equal(interpreted(q, position, poisoned.kept, rule), clean)
    np.testing.assert_array_equal(interpreted(q, position, in_pages(poisoned, 4).kept, rule), clean)


def test_rows_that_have_pages_in_common_read_the_same():
    shape = (2, 1, 4, 2, 64, 8)
    q, _, source = arrays(shape)
    pool = in_pages(source, 16)
    shared = pool.replace(table=pool.table.at[1, :3].set(pool.table[0, :3]))
    same = jax.tree.map(lambda x: x.at[1, :, :48].set(x[0, :, :48]), source)
    position = jnp.array([[60], [55]], jnp.int32)
    spec = spec_of(shape)
    is_the_twin(interpreted(q, position, shared.kept, rule_of(spec)), q, position, same, spec)


def test_a_number_that_is_none_reaches_those_who_see_it():
    shape = (2, 1, 4, 2, 60, 8)
    q, _, source = arrays(shape)
    position = jnp.array([[40], [40]], jnp.int32)
    broken = source.replace(k=Plain(source.k.x.at[0, 1, 7, 3].set(jnp.nan)))
    rule = rule_of(spec_of(shape))
    got, clean = (interpreted(q, position, x.kept, rule) for x in (broken, source))
    assert np.isnan(got[0, 0, 2:]).all()
    np.testing.assert_array_equal(got[0, 0, :2], clean[0, 0, :2])
    np.testing.assert_array_equal(got[1], clean[1])


# --- in programs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """As if this CPU were a GPU: the kernel is chosen as there, and interpreted."""

    def interpret(q, position, kept, rule):
        return gpu.attend(q, position, kept, rule, interpret=True)

    monkeypatch.setitem(attention.KERNELS, "cpu", interpret)
    refused = []

    def attends(self, q, kept):
        reason = gpu.unknown(q, kept)
        refused.append(reason)
        return None if reason or self.attention == "reference" else "cpu"

    monkeypatch.setattr(KernelChoice, "attends", attends)
    return refused


def test_it_changes_no_id(taken, kind="paged:page=8+int8"):
    params, config = tiny_model(num_layers=1, softcap=20.0)
    prompts = [list(range(5, 25)), [11, 12, 13], [20]]

    def said(**named):
        with kernels.use(KernelChoice(**named)):
            cache = jaxinfer.init_cache(config, 3, 48, kind)
            return jaxinfer.generate(params, config, prompts, cache=cache, max_new_tokens=16)

    got = said()
    assert taken and not any(taken)
    expected = said(attention="reference")
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "paged:page=8"])
def test_each_device_of_a_mesh_looks_at_its_own_part(kind, on_mesh, taken):
    params, config = tiny_model(num_layers=1, num_heads=4, num_kv_heads=2, width=32, ffn_width=64, vocab_size=64)
    ids = jnp.array([[3, 4, 5], [4, 6, 7]])
    with kernels.use(KernelChoice(linear="reference", attention="reference")):  # XLA makes the products of a mesh too
        expected = jaxinfer.forward(params, config, ids, jaxinfer.init_cache(config, 2, 32))[0]
    with on_mesh("data=2,tensor=2"):
        placed = mesh.shard(params, models.letters(config))
        got = jaxinfer.forward(placed, config, ids, jaxinfer.init_cache(config, 2, 32, kind))[0]
    assert taken and not any(taken)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def lowered(function, *args):
    return jax.jit(lambda *args: function(*args)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("form", "queries", "page"),
    [
        ("float32", "float32", None),
        ("bfloat16", "bfloat16", 16),
        ("float16", "float16", None),
        ("int8", "bfloat16", 16),
        ("int8", "float32", None),
    ],
)
def test_it_lowers_for_a_gpu(form, queries, page, for_an_h200, monkeypatch):
    monkeypatch.undo()  # blocks as they are used
    for shape in ((2, 1, 14, 2, 600, 96), (1, 70, 8, 4, 256, 64)):
        q, position, source = arrays(shape, form)
        where = in_pages(source, page) if page else source.replace(slot=jnp.zeros((shape[0], shape[4]), jnp.int32))
        text = lowered(lambda *a: gpu.attend(*a, Rule(0.1, 30.0, 50, 4)), q.astype(queries), position, where.kept)
        assert text.count(KERNEL) == 2 if shape[1] == 1 else text.count(KERNEL) >= 1
    several = jax.vmap(lambda q: gpu.attend(q, position, where.kept, Rule(0.1)))
    assert KERNEL in lowered(several, jnp.stack([q, q]).astype(queries))


def uses_the_kernel(kind="dense", T=1, dtype=None, **choice):
    params, config = tiny_model(num_layers=1)
    cache = jaxinfer.init_cache(config, 2, 64, kind, dtype=dtype)
    with kernels.use(KernelChoice(**choice)):
        traced = jaxinfer.forward.trace(params, config, jnp.ones((2, T), jnp.int32), cache)
        return KERNEL in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_it_is_taken_in_programs_for_a_gpu(for_an_h200):
    for kind in ("int8", "ring:window=8", "paged:page=8"):
        assert uses_the_kernel(kind), kind
    assert uses_the_kernel(T=20, dtype="float16") and uses_the_kernel(attention="gpu")
    assert not uses_the_kernel("int4") and not uses_the_kernel("ring:window=8", T=20)
    assert not uses_the_kernel(attention="reference")


def test_programs_for_a_cpu_are_without_it():
    assert not uses_the_kernel()
    with pytest.raises(RuntimeError, match="attention='gpu' is not to be had: programs here are for a cpu: run it on"):
        uses_the_kernel(attention="gpu")


def test_where_it_cannot_be_that_is_an_error_only_when_asked_for_by_name(for_an_h200):
    for dtype, reason in (("uint8", "it reads no caches of uint8"), ("float64", "it reads no caches of float64")):
        kept = Kept(*[jax.ShapeDtypeStruct((1, 1, 4, 8), dtype)] * 2)
        q = jax.ShapeDtypeStruct((1, 1, 1, 8), jnp.float32)
        assert gpu.unknown(q, kept) == reason
    codes = Kept(*[jax.ShapeDtypeStruct((300, 8, 8192, 128), jnp.int8)] * 2, (None, None))
    assert gpu.unknown(q, codes) == "it cannot count to the end of codes of 2 to 4 GiB"
    assert not uses_the_kernel("float8")
    with pytest.raises(
        RuntimeError, match="attention='gpu' is not to be had: it reads no caches of uint8: use a cache"
    ):
        uses_the_kernel("float8", attention="gpu")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [("9.0", None), ("8.0", None), ("12.1", None), ("7.5", "capability 7.5"), ("gfx942", "capability gfx942")],
)
def test_a_gpu_that_triton_does_not_compile_for_has_none(capability, reason):
    class Device:
        platform, compute_capability = "gpu", capability

    told = unavailable(Device())
    assert told is None if reason is None else reason in told


def test_derivatives_are_those_of_the_plain_form(for_an_h200):
    shape = (2, 1, 4, 2, 20, 8)
    q, position, source = arrays(shape)
    spec = spec_of(shape)

    def twin(q, position, source):
        return ops.attend(q, source.kept.k, source.kept.v, position, spec)

    def squared(q, source):
        return (ops.attend_kernel(twin, "cuda", q, source, position, spec) ** 2).sum()

    assert KERNEL in lowered(jax.grad(squared), q, source), "what is squared is the kernel's"
    expected = jax.jit(jax.grad(lambda q: (twin(q, position, source) ** 2).sum()))(q)
    np.testing.assert_allclose(jax.jit(jax.grad(squared))(q, source), expected, atol=1e-5)
