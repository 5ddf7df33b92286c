"""Attention by the CPU kernel: equal to its plain twin, the same bits in any company, and it reads what is seen."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import arrays, in_pages, rule_of, spec_of
from covering import pairwise

import jaxinfer
from jaxinfer import kernels, mesh, models, ops, program
from jaxinfer.kernels import Kept, KernelChoice, Rule, native
from jaxinfer.kernels.attention import FEW, attend
from jaxinfer.ops import PAST
from jaxinfer.quantization import Plain
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("kernels_are_built")
SHAPES = [  # B, T, N, K, S, H
    (1, 1, 1, 1, 1, 1), (2, 1, 4, 2, 50, 10), (3, 5, 6, 3, 130, 64), (2, 4, 8, 2, 2100, 20), (1, 16, 6, 1, 1030, 128),
    (4, 2, 6, 6, 77, 7), (1, 1, 8, 8, 33, 100),
]  # fmt: skip
RULES = [{}, {"window": 9}, {"softcap": 2.0}, {"window": 40, "softcap": 5.0}]
FORMS = ("float32", "bfloat16", "int8")


@pytest.fixture
def isa(request):
    if request.param not in native.isas():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


EVERY_ISA = pytest.mark.parametrize("isa", native.ISAS, indirect=True)


def plain(q, position, source, spec, sinks=0):
    """The reference, in float32, of what the source's numbers say."""
    k, v = (x.decode().astype(jnp.float32) for x in (source.k, source.v))
    return ops.attend(q, k, v, position, spec, slot=source.slot, sinks=sinks)


def near(got, exact, most):
    """Whether these are, rounded once to their dtype, numbers that are no more than that from the exact ones."""
    low, high = ((exact + off).astype(got.dtype).astype(jnp.float32) for off in (-most, most))
    got = jnp.asarray(got).astype(jnp.float32)
    return bool(((low <= got) & (got <= high)).all())


@pytest.mark.parametrize(("shape", "isa", "form"), pairwise(SHAPES, native.ISAS, FORMS), indirect=["isa"], ids=str)
def test_the_kernel_is_its_plain_twin(shape, isa, form):
    q, position, source = arrays(shape, form)
    for rule in RULES:
        spec = spec_of(shape, **rule)
        got = attend(q, position, source.kept, rule_of(spec), isa)
        np.testing.assert_allclose(got, plain(q, position, source, spec), atol=2e-6)


@EVERY_ISA
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_of_bfloat16_meet_a_cache_of_it_as_in_its_plain_twin(shape, isa):
    q, position, source = arrays(shape, "bfloat16")
    q = q.astype(jnp.bfloat16)
    bits = Kept(*(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in source.kept[:2]))
    for rule in RULES:
        spec = spec_of(shape, **rule)
        got = attend(q, position, source.kept, rule_of(spec), isa)
        exact = plain(q.astype(jnp.float32), position, source, spec)
        weighed = plain(q.astype(jnp.float32), position, source.replace(v=Plain(jnp.abs(source.v.x))), spec)
        assert near(got, exact, 2**-8 * weighed + 2e-6), "no more than weights that are rounded"
        np.testing.assert_array_equal(attend(q, position, bits, rule_of(spec), isa), got)


@EVERY_ISA
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_of_bfloat16_meet_codes_as_nearly_as_they_meet_numbers(shape, isa):
    q, position, source = arrays(shape, "int8")
    q = q.astype(jnp.bfloat16)
    for rule in RULES:
        spec = spec_of(shape, **rule)
        got = attend(q, position, source.kept, rule_of(spec), isa)
        exact = plain(q.astype(jnp.float32), position, source, spec)
        weighed = plain(q.astype(jnp.float32), position, source.replace(v=Plain(jnp.abs(source.v.decode()))), spec)
        assert near(got, exact, 2**-10 * weighed + 2e-6), "a quarter of what rounding to bfloat16 costs"


@EVERY_ISA
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_comes_out_is_of_the_dtype_of_the_queries_and_rounded_once(dtype, isa):
    shape = (3, 4, 6, 2, 1200, 20)
    q, position, source = arrays(shape)
    q, rule = q.astype(dtype), rule_of(spec_of(shape))
    position = position.at[1, 2:].set(PAST).at[2].set(PAST)  # pads; and a row of nothing else
    source = source.replace(v=Plain(source.v.x.at[0, 1, 7, 3].set(jnp.nan)))
    exact = attend(q.astype(jnp.float32), position, source.kept, rule, isa)
    got = attend(q, position, source.kept, rule, isa)
    assert got.dtype == q.dtype and np.isnan(exact[0]).any()
    np.testing.assert_array_equal(got.astype(jnp.float32), exact.astype(dtype).astype(jnp.float32))


@EVERY_ISA
def test_slots_in_any_order_and_sinks_are_looked_at(isa):
    shape = (3, 2, 4, 2, 70, 12)
    q, position, source = arrays(shape)
    draw = np.random.default_rng(1)
    slot = np.stack([draw.permutation(70) for _ in range(3)]).astype(np.int32)
    slot[:, ::9] = PAST
    source = source.replace(slot=jnp.asarray(slot))
    for window, sinks in ((None, 0), (20, 0), (6, 3)):
        spec = spec_of(shape, window=window)
        got = attend(q, position + 3, source.kept, rule_of(spec, sinks), isa)
        np.testing.assert_allclose(got, plain(q, position + 3, source, spec, sinks), atol=2e-6)


@EVERY_ISA
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "all bfloat16", "all int8"])
def test_pages_anywhere_in_a_pool_give_the_bits_of_slots_in_a_row(isa, form):
    shape = (4, 3, 6, 2, 1090, 20)
    q, position, source = arrays(shape, form.removeprefix("all "))
    q = q.astype("bfloat16" if form.startswith("all") else "float32")
    rule = rule_of(spec_of(shape, window=1050))
    expected = attend(q, position, source.kept, rule, isa)
    for page, groups in ((4, 1), (12, 2), (16, 4), (64, 1), (2048, 2)):
        pool = in_pages(source, page, groups).kept
        lacking = pool._replace(
            table=jnp.where(jnp.arange(pool.table.shape[1]) * page > position.max(), 1 << 30, pool.table)
        )
        np.testing.assert_array_equal(attend(q, position, lacking, rule, isa), expected)


@EVERY_ISA
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "all bfloat16", "all int8"])
def test_a_query_has_the_same_bits_alone_and_in_any_company(isa, form):
    shape = (3, 4, 6, 2, 1500, 24)
    q, position, source = arrays(shape, form.removeprefix("all "))
    q = q.astype("bfloat16" if form.startswith("all") else "float32")
    position = position.at[1, 2:].set(PAST)  # pads
    rule = rule_of(spec_of(shape, window=700))
    together = np.asarray(attend(q, position, source.kept, rule, isa))
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(attend(q, position, source.kept, rule, isa, threads), together)
    for b, t in itertools.product(range(3), range(4)):
        own = jax.tree.map(lambda x, b=b: x[b : b + 1], source)
        alone = attend(q[b : b + 1, t : t + 1], position[b : b + 1, t : t + 1], own.kept, rule, isa)
        np.testing.assert_array_equal(alone[0, 0], together[b, t])
    assert not together[1, 2:].any(), "what sees nothing is zeros"


@EVERY_ISA
def test_what_no_query_sees_is_not_read(isa):
    shape = (2, 2, 4, 2, 300, 16)
    q, position, source = arrays(shape)
    position = jnp.array([[150, 151], [7, PAST]], jnp.int32)
    rule = rule_of(spec_of(shape, window=50))
    clean = np.asarray(attend(q, position, source.kept, rule, isa))
    seen = np.zeros((2, 1, 300, 1), bool)
    seen[0, 0, 96:152] = True  # from the block of 32 slots in which the window begins
    seen[1, 0, :8] = True
    poisoned = jax.tree.map(lambda x: jnp.where(seen, x, jnp.nan), source)
    np.testing.assert_array_equal(attend(q, position, poisoned.kept, rule, isa), clean)


@EVERY_ISA
def test_a_number_that_is_none_reaches_those_who_see_it(isa):
    q, position, source = arrays((3, 2, 4, 2, 60, 16))
    position = jnp.array([[40, 41], [40, 41], [40, 41]], jnp.int32)
    broken = source.replace(
        k=Plain(source.k.x.at[0, 1, 41, 3].set(jnp.nan)), v=Plain(source.v.x.at[2, 0, 5].set(jnp.inf))
    )
    rule = rule_of(spec_of((3, 2, 4, 2, 60, 16)))
    got, clean = (np.asarray(attend(q, position, x.kept, rule, isa)) for x in (broken, source))
    assert np.isnan(got[0, 1, 2:]).all() and np.isinf(got[2, :, :2]).all()
    np.testing.assert_array_equal(got[0, 0], clean[0, 0])
    np.testing.assert_array_equal(got[0, 1, :2], clean[0, 1, :2])
    np.testing.assert_array_equal(got[1], clean[1])


@EVERY_ISA
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "all bfloat16", "all int8"])
def test_values_that_are_no_numbers_reach_none_who_sees_nothing_near_them(form, isa):
    shape = (2, 2, 4, 2, 2100, 16)
    q, _, source = arrays(shape, form.removeprefix("all "))
    q, rule = q.astype("bfloat16" if form.startswith("all") else "float32"), rule_of(spec_of(shape, window=100))
    position = jnp.array([[50, 2000], [2000, 50]], jnp.int32)
    clean = np.asarray(attend(q, position, source.kept, rule, isa).astype(jnp.float32))
    for slot, blind in ((7, [(0, 1), (1, 0)]), (1950, [(0, 0), (1, 1)])):  # in one span, and they look at another
        kept, nan = source.kept, lambda x, slot=slot: x.at[:, :, slot].set(jnp.nan)
        if kept.scales is None:
            kept = kept._replace(v=nan(kept.v))
        else:
            kept = kept._replace(scales=(kept.scales[0], nan(kept.scales[1])))
        got = np.asarray(attend(q, position, kept, rule, isa).astype(jnp.float32))
        for at in np.ndindex(2, 2):
            assert np.isnan(got[at]).all() or at in blind
            np.testing.assert_array_equal(got[at], clean[at] if at in blind else got[at])


def test_scores_of_any_size_are_weighed_as_the_softmax_weighs_them():
    shape = (1, 1, 2, 1, 500, 8)
    q, _, source = arrays(shape)
    position = jnp.array([[499]], jnp.int32)
    for size in (1e-6, 1.0, 30.0, 1e4, 1e18):
        spec = spec_of(shape).replace(scale=size)
        got = attend(q, position, source.kept, rule_of(spec))
        np.testing.assert_allclose(got, plain(q, position, source, spec), atol=3e-6 + 2e-7 * min(size, 1e3))


@EVERY_ISA
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_queries_of_bfloat16_weigh_scores_of_any_size(form, isa):
    shape = (1, 3, 6, 2, 500, 8)
    q, position, source = arrays(shape, form)
    q = q.astype(jnp.bfloat16)
    for size in (1e-6, 1.0, 30.0, 1e4, 1e18):
        spec = spec_of(shape).replace(scale=size)
        got = attend(q, position, source.kept, rule_of(spec), isa)
        exact = plain(q.astype(jnp.float32), position, source, spec)
        assert np.isfinite(got).all()
        if form == "int8" and size > 100:  # scores of integers of 16 bits: which is largest may be another
            continue
        weighed = plain(q.astype(jnp.float32), position, source.replace(v=Plain(jnp.abs(source.v.decode()))), spec)
        assert near(got, exact, 2**-8 * weighed + 3e-6 + 2e-7 * min(size, 1e3))


@EVERY_ISA
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_no_number_reaches_only_those_queries_of_bfloat16_who_see_it(form, isa):
    shape = (3, 2, 8, 2, 60, 16)
    q, _, source = arrays(shape, form)
    q, rule = q.astype(jnp.bfloat16), rule_of(spec_of(shape))
    position = jnp.array([[40, 41], [40, 41], [40, 41]], jnp.int32)
    clean = np.asarray(attend(q, position, source.kept, rule, isa))
    broken = np.array(attend(q.at[1, 0, 5, 3].set(jnp.nan), position, source.kept, rule, isa))
    assert np.isnan(broken[1, 0, 5]).all()
    broken[1, 0, 5] = clean[1, 0, 5]
    np.testing.assert_array_equal(broken, clean)
    kept = source.kept
    if form == "int8":  # a scale that is none
        kept = kept._replace(scales=(kept.scales[0].at[2, 1, 7].set(jnp.nan), kept.scales[1].at[0, 0, 8].set(jnp.nan)))
    else:
        kept = kept._replace(k=kept.k.at[2, 1, 7, 3].set(jnp.nan), v=kept.v.at[0, 0, 8].set(jnp.nan))
    broken = np.asarray(attend(q, position, kept, rule, isa))
    assert np.isnan(broken[2, :, 4:]).all() and np.isnan(broken[0, :, :4]).all()
    np.testing.assert_array_equal(broken[1], clean[1])
    np.testing.assert_array_equal(broken[2, :, :4], clean[2, :, :4])
    np.testing.assert_array_equal(broken[0, :, 4:], clean[0, :, 4:])


# --- many queries of bfloat16: by tiles -----------------------------------------------------------------------------

CROWDS = [  # B, T, N, K, S, H; T above FEW
    (1, 17, 1, 1, 20, 1), (2, 40, 4, 2, 50, 10), (3, 33, 6, 3, 130, 64), (1, 64, 8, 2, 600, 20),
    (1, 100, 6, 1, 330, 128), (2, 70, 6, 6, 77, 7), (1, 20, 8, 8, 33, 100),
]  # fmt: skip
TILES = pytest.mark.parametrize("isa", ["amx"], indirect=True)


@TILES
@pytest.mark.parametrize("shape", CROWDS, ids=str)
def test_many_queries_are_weighed_as_in_their_plain_twin(shape, isa):
    q, position, source = arrays(shape, "bfloat16")
    q = q.astype(jnp.bfloat16)
    position = position.at[0, 5:7].set(PAST)  # pads
    seen = (np.asarray(position) < PAST)[..., None, None]
    bits = Kept(*(jax.lax.bitcast_convert_type(x, jnp.uint16) for x in source.kept[:2]))
    for rule in RULES:
        spec = spec_of(shape, **rule)
        got = np.asarray(attend(q, position, source.kept, rule_of(spec), isa))
        exact = plain(q.astype(jnp.float32), position, source, spec)
        weighed = plain(q.astype(jnp.float32), position, source.replace(v=Plain(jnp.abs(source.v.x))), spec)
        assert near(got, exact * seen, 2**-8 * weighed + 2e-6), "no more than weights that are rounded"
        np.testing.assert_array_equal(attend(q, position, bits, rule_of(spec), isa), got)


@TILES
def test_many_queries_look_at_slots_in_any_order_and_sinks(isa):
    shape = (3, 20, 4, 2, 300, 12)
    q, position, source = arrays(shape, "bfloat16")
    q, draw = q.astype(jnp.bfloat16), np.random.default_rng(1)
    slot = np.stack([draw.permutation(300) for _ in range(3)]).astype(np.int32)
    slot[:, ::9] = PAST
    for source in (source, source.replace(slot=jnp.asarray(slot))):  # noqa: B020
        for window, sinks in ((None, 0), (20, 0), (6, 3)):
            spec = spec_of(shape, window=window)
            got = attend(q, position + 3, source.kept, rule_of(spec, sinks), isa)
            exact = plain(q.astype(jnp.float32), position + 3, source, spec, sinks)
            size = source.replace(v=Plain(jnp.abs(source.v.x)))
            weighed = plain(q.astype(jnp.float32), position + 3, size, spec, sinks)
            assert near(got, exact, 2**-8 * weighed + 2e-6)


@TILES
@pytest.mark.parametrize("H", [20, 64])
def test_many_queries_have_the_same_bits_in_any_company_on_any_threads_and_over_pages(H, isa):
    shape = (4, 100, 6, 2, 1090, H)
    q, position, source = arrays(shape, "bfloat16")
    q, rule = q.astype(jnp.bfloat16), rule_of(spec_of(shape, window=700))
    whole = np.asarray(attend(q, position, source.kept, rule, isa))
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(attend(q, position, source.kept, rule, isa, threads), whole)
    for b, t, n in ((1, 0, 17), (3, 41, 59), (2, 66, 34)):
        own = jax.tree.map(lambda x, b=b: x[b : b + 1], source)
        got = attend(q[b : b + 1, t : t + n], position[b : b + 1, t : t + n], own.kept, rule, isa)
        np.testing.assert_array_equal(got[0], whole[b, t : t + n])
    for page, groups in ((4, 1), (12, 2), (64, 1), (2048, 2)):
        pool = in_pages(source, page, groups).kept
        np.testing.assert_array_equal(attend(q, position, pool, rule, isa), whole)


@TILES
def test_what_none_of_many_queries_sees_is_not_read(isa):
    shape = (2, 20, 4, 2, 700, 16)
    q, _, source = arrays(shape, "bfloat16")
    q = q.astype(jnp.bfloat16)
    position = jnp.stack([jnp.arange(400, 420), jnp.where(jnp.arange(20) < 8, jnp.arange(20), PAST)])
    rule = rule_of(spec_of(shape, window=50))
    clean = np.asarray(attend(q, position, source.kept, rule, isa))
    seen = np.zeros((2, 1, 700, 1), bool)
    seen[0, 0, 256:420] = True  # from the span of 128 slots in which the window begins
    seen[1, 0, :8] = True
    poisoned = jax.tree.map(lambda x: jnp.where(seen, x, jnp.nan), source)
    np.testing.assert_array_equal(attend(q, position, poisoned.kept, rule, isa), clean)


@TILES
def test_many_scores_of_any_size_are_weighed_as_the_softmax_weighs_them(isa):
    shape = (1, 20, 2, 1, 500, 8)
    q, position, source = arrays(shape, "bfloat16")
    q = q.astype(jnp.bfloat16)
    for size in (1e-6, 1.0, 30.0, 1e4, 1e18):
        spec = spec_of(shape).replace(scale=size)
        got = attend(q, position, source.kept, rule_of(spec), isa)
        exact = plain(q.astype(jnp.float32), position, source, spec)
        weighed = plain(q.astype(jnp.float32), position, source.replace(v=Plain(jnp.abs(source.v.x))), spec)
        assert near(got, exact, 2**-8 * weighed + 3e-6 + 2e-7 * min(size, 1e3))


# --- in programs ---------------------------------------------------------------------------------------------------


def uses_the_kernel(kind="dense", T=1, dtype=None, choice=None):
    params, config = tiny_model()
    cache = jaxinfer.init_cache(config, 2, 64, kind, dtype=dtype)
    with kernels.use(choice or KernelChoice()):
        text = jaxinfer.forward.lower(params, config, jnp.ones((2, T), jnp.int32), cache).as_text()
    return native.ATTENTION in text


def test_it_is_taken_for_few_queries_and_caches_that_it_can_read():
    for kind in ("dense", "int8", "ring:window=8", "ring:window=8+int8", "paged:page=8", "paged:page=4+int8"):
        assert uses_the_kernel(kind)
    assert uses_the_kernel(T=FEW) and not uses_the_kernel(T=FEW + 1)
    assert uses_the_kernel(dtype="bfloat16") and not uses_the_kernel(dtype="float16")
    assert not uses_the_kernel(T=FEW + 1, dtype="bfloat16"), "queries of float32 are not rounded"
    assert not uses_the_kernel("float8") and not uses_the_kernel("paged:page=6")
    assert not uses_the_kernel(choice=KernelChoice(attention="reference"))


def test_it_is_taken_for_many_queries_of_bfloat16_where_the_processor_has_tiles_for_them():
    params, config = tiny_model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = config.replace(dtype="bfloat16")
    ids = jnp.ones((2, FEW + 1), jnp.int32)
    for kind, readable in (("dense", True), ("paged:page=8", True), ("int8", False)):
        cache = jaxinfer.init_cache(config, 2, 64, kind)
        text = jaxinfer.forward.lower(params, config, ids, cache).as_text()
        assert (native.ATTENTION in text) == (readable and native.best() == "amx")


def test_a_kernel_that_cannot_be_is_an_error_only_when_asked_for_by_name():
    asked = KernelChoice(attention="cpu")
    assert uses_the_kernel(choice=asked)
    with pytest.raises(RuntimeError, match=r"attention='cpu' is not to be had: it reads no caches of float16"):
        uses_the_kernel(dtype="float16", choice=asked)
    assert not uses_the_kernel(T=FEW + 1, choice=asked)
    with pytest.raises(ValueError, match="attention='fast' names no kernel"):
        KernelChoice(attention="fast")


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("kind", ["dense", "int8", "ring:window=12", "ring:window=12+int8"])
def test_it_changes_no_id(kind):
    params, config = tiny_model(softcap=20.0)
    prompts = [list(range(5, 30)), [11, 12, 13], [20]]

    def said(**choice):
        with kernels.use(KernelChoice(**choice)):
            cache = jaxinfer.init_cache(config, 3, 64, kind)
            return jaxinfer.generate(params, config, prompts, cache=cache, max_new_tokens=32)

    got, expected = said(attention="cpu"), said(attention="reference")
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize("axes", ["tensor=2", "data=2,tensor=2", "seq=2"])
def test_each_device_of_a_mesh_looks_at_its_own_part(axes, on_mesh):
    params, config = tiny_model(num_heads=4, num_kv_heads=2, width=32, ffn_width=64, vocab_size=64)
    ids = jnp.array([[3], [4]])
    expected = jaxinfer.forward(params, config, ids, jaxinfer.init_cache(config, 2, 32))[0]
    with on_mesh(axes):
        placed = mesh.shard(params, models.letters(config))
        cache = jaxinfer.init_cache(config, 2, 32)
        compiled = jaxinfer.forward.lower(placed, config, ids, cache).compile()
        assert (native.ATTENTION in compiled.as_text()) == (axes != "seq=2"), "positions that are split are XLA's"
        sent = {row["kind"] for row in program.collectives(compiled, True)}
        got = jaxinfer.forward(placed, config, ids, cache)[0]
    assert "all-gather" not in sent
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_derivatives_and_batches_are_those_of_the_plain_form():
    shape = (2, 2, 4, 2, 20, 8)
    q, position, source = arrays(shape)
    spec = spec_of(shape)

    def twin(q, position, source):
        return ops.attend(q, source.kept.k, source.kept.v, position, spec)

    def kernel(q, source):
        return ops.attend_kernel(twin, "cpu", q, source, position, spec)

    for argument in (0, 1):
        got = jax.grad(lambda *a: (kernel(*a) ** 2).sum(), argument)(q, source)
        expected = jax.grad(lambda q, s: (twin(q, position, s) ** 2).sum(), argument)(q, source)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
    several = jnp.stack([q, 2 * q])
    got = jax.vmap(kernel, (0, None))(several, source)
    np.testing.assert_array_equal(got, jnp.stack([kernel(x, source) for x in several]))


def test_programs_for_other_platforms_are_without_it():
    params, config = tiny_model()
    cache = jaxinfer.init_cache(config, 2, 32)
    traced = jaxinfer.forward.trace(params, config, jnp.ones((2, 1), jnp.int32), cache)
    assert native.ATTENTION not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert native.ATTENTION in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_what_it_cannot_read_is_refused():
    q, position, source = arrays((2, 1, 4, 2, 20, 8))
    with pytest.raises(Exception, match="caches of float32, bfloat16 or int8"):
        attend(q, position, Kept(source.k.x.astype(jnp.float16), source.v.x.astype(jnp.float16)), Rule(1.0))
    with pytest.raises(Exception, match=r"k and v \[B, K, S, H\]"):
        attend(q[..., :4], position, source.kept, Rule(1.0))
    codes = arrays((2, 1, 4, 2, 20, 8), "int8")[2].kept
    with pytest.raises(Exception, match="scales of int8 are float32"):
        attend(q, position, codes._replace(scales=(codes.scales[0][:, :1], codes.scales[1])), Rule(1.0))
