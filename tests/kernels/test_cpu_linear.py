"""The CPU product: equal to its plain twin, with the same bits in any company, on every instruction set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import pairwise

from jaxinfer import kernels, ops, program
from jaxinfer.kernels import KernelChoice, native, products
from jaxinfer.ops.linear import plain
from jaxinfer.ops.mlp import ACTIVATION
from jaxinfer.quantization import Int4, Int8, rounded
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("kernels_are_built")

BOTH = ("float32", "bfloat16")
DTYPES = pytest.mark.parametrize("dtype", BOTH)
SHAPES = [  # M, I, O
    (1, 1, 1), (1, 7, 3), (2, 3, 5), (3, 16, 4), (5, 64, 8), (6, 33, 9), (7, 65, 21), (13, 515, 130), (23, 1024, 4),
    (24, 1025, 31), (70, 515, 33), (1, 4097, 300), (512, 2049, 37), (130, 4100, 6), (150, 4133, 77),
]  # fmt: skip
ROWS = [*range(1, 14), 18, 23, 24, 25, 31, 32, 33, 64, 70, 129, 200]


@pytest.fixture
def isa(request):
    if request.param not in native.isas():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


EVERY_ISA = pytest.mark.parametrize("isa", native.ISAS, indirect=True)


def arrays(shape, dtype, seed=0):
    rows, inner, outer = shape
    draw = np.random.default_rng(seed)
    x, w = draw.standard_normal((rows, inner)), draw.standard_normal((outer, inner))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def exact(x, w):
    """(the product, the sum of its terms' sizes) in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


# --- it is the product ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype", "isa"), pairwise(SHAPES, BOTH, native.ISAS), indirect=["isa"], ids=str)
def test_the_kernel_is_its_plain_twin(shape, dtype, isa):
    x, w = arrays(shape, dtype)
    got = products.linear(x, w, isa)
    truth, size = exact(x, w)
    assert got.dtype == jnp.float32
    assert (np.abs(got - truth) <= 1e-6 * size).all()
    assert (np.abs(got - plain(x, w)) <= 2e-6 * size).all()


@DTYPES
def test_every_number_of_rows_is_its_plain_twin(dtype):
    x, w = arrays((70, 96, 24), dtype)
    truth, size = exact(x, w)
    whole = jax.jit(lambda x: [products.linear(x[:rows], w) for rows in range(1, 71)])(x)
    for rows, got in enumerate(whole, 1):
        assert (np.abs(got - truth[:rows]) <= 1e-6 * size[:rows]).all()


@DTYPES
@EVERY_ISA
def test_infinities_and_nans_stay_in_their_rows(dtype, isa):
    x, w = arrays((9, 65, 7), dtype)
    w = jnp.abs(w) + 1
    x = x.at[2].set(jnp.inf).at[5, 64].set(-jnp.inf).at[7, 30].set(jnp.nan)
    got = np.asarray(products.linear(x, w, isa))
    assert (got[2] == np.inf).all() and (got[5] == -np.inf).all() and np.isnan(got[7]).all()
    rest = [0, 1, 3, 4, 6, 8]
    np.testing.assert_array_equal(got[rest], products.linear(x[jnp.array(rest)], w, isa))
    assert np.isfinite(got[rest]).all()


@DTYPES
@EVERY_ISA
def test_denormal_numbers_count_or_count_as_zero_where_it_says_so(dtype, isa):
    x, w = (np.array(a, np.float64) for a in arrays((5, 48, 9), dtype))
    x *= 2.0**-130
    x, w = jnp.asarray(x, dtype), jnp.asarray(w * 2.0**20, dtype)
    truth, size = exact(np.asarray(x).astype(np.float64), w)
    error = np.abs(np.asarray(products.linear(x, w, isa), np.float64) - truth)
    lost = dtype == "bfloat16" and isa in ("avx512bf16", "amx")
    flushed = np.finfo(np.float32).tiny * np.abs(np.asarray(w, np.float64)).sum(1)  # each input was less than tiny
    assert (error <= (flushed if lost else 1e-6 * size + np.finfo(np.float32).smallest_subnormal)).all()


@DTYPES
def test_an_empty_product_is_zeros(dtype):
    for shape in [(0, 5, 3), (3, 0, 2), (3, 4, 0)]:
        x, w = arrays(shape, dtype)
        np.testing.assert_array_equal(products.linear(x, w), np.zeros((shape[0], shape[2])))


def test_what_it_cannot_multiply_is_refused():
    with pytest.raises(Exception, match="two float32 or two bfloat16"):
        products.linear(jnp.ones((2, 3)), jnp.ones((4, 3), jnp.bfloat16))
    with pytest.raises(Exception, match=r"x \[M, I\] and w \[O, I\]"):
        products.linear(jnp.ones((2, 3)), jnp.ones((4, 5)))


# --- weights in codes ----------------------------------------------------------------------------------------------

IN_CODES = ("int8", "int4:32", "int4:96")
FORMS = pytest.mark.parametrize("form", IN_CODES)
CODED_SHAPES = [  # M, I, O; I is of whole groups
    (1, 192, 1), (2, 96, 130), (4, 1152, 8), (9, 288, 31), (24, 1152, 9), (300, 672, 21),
]  # fmt: skip
EVERY_CODE = pytest.mark.parametrize(
    ("shape", "form", "isa"), pairwise(CODED_SHAPES, IN_CODES, native.ISAS), indirect=["isa"], ids=str
)


def in_codes(w, form):
    name, _, group = form.partition(":")
    return Int8.of(w, 1) if name == "int8" else Int4.of(w, int(group), packed=True)


def coded(x, leaf, isa=None, threads=None, dynamic=False):
    return products.linear(x, leaf.codes, isa, threads, scale=leaf.scale, dynamic=dynamic)


@EVERY_CODE
def test_codes_are_multiplied_as_what_they_stand_for(shape, form, isa):
    x, w = arrays(shape, jnp.float32)
    leaf = in_codes(w, form)
    truth, size = exact(x, leaf.decode())
    assert (np.abs(coded(x, leaf, isa) - truth) <= 1e-6 * size).all()
    assert (np.abs(leaf.plain(x, *leaf.arrays) - truth) <= 2e-6 * size).all()


@EVERY_ISA
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_numbers_far_below_the_largest_of_a_row_count_beside_int8(rows, isa):
    x, w = arrays((rows, 1152, 40), jnp.float32)
    x = x.at[:, 5].set(3e4)
    leaf = in_codes(w, "int8")
    truth, size = exact(x, leaf.decode())
    assert (np.abs(coded(x, leaf, isa) - truth) <= 1e-6 * size).all()


@EVERY_ISA
def test_rows_of_any_size_meet_int8(isa):
    x, w = arrays((4, 192, 40), jnp.float32)
    x = x * jnp.array([[2.0**-140], [2.0**-100], [0], [2.0**100]])
    leaf = in_codes(w * 2.0**15, "int8")
    truth, size = exact(x, leaf.decode())
    assert (np.abs(coded(x, leaf, isa) - truth) <= 1e-6 * size + np.finfo(np.float32).tiny).all()


@EVERY_ISA
def test_int8_sums_as_many_inputs_as_overflow_32_bits(isa):
    inner, bound = (2**18 + 70, 1e-6) if isa == "amx" else (2**17 + 70, 1e-5)  # digits are summed as integers
    x, w = arrays((2, inner, 3), jnp.float32)
    leaf = in_codes(jnp.abs(w) + 1, "int8")
    leaf = leaf.replace(codes=jnp.full_like(leaf.codes, -128))
    x = jnp.full_like(x, 0.3).at[1].set(-2.0)
    truth, size = exact(x, leaf.decode())
    assert (np.abs(coded(x, leaf, isa) - truth) <= bound * size).all()


@EVERY_CODE
def test_rounded_rows_are_multiplied_as_what_their_codes_stand_for(shape, form, isa):
    x, w = arrays(shape, jnp.float32)
    x = x * jnp.logspace(-3, 3, shape[1])  # blocks of very different sizes
    leaf = in_codes(w, form)
    truth, size = exact(rounded(x), leaf.decode())
    assert (np.abs(coded(x, leaf, isa, dynamic=True) - truth) <= 1e-6 * size).all()


def nearest(x):
    """`quantization.rounded` of float32, by NumPy: XLA multiplies with 1 / 127, and of bfloat16 many lie half way."""
    x = np.asarray(x, np.float32)
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    said = np.round(blocks * (1 / scale)) * scale
    return jnp.asarray(said.reshape(len(x), -1)[:, : x.shape[1]])


BESIDE_BFLOAT16 = [
    *(("int8", shape) for shape in [*CODED_SHAPES, (40, 100, 70), (150, 4133, 77)]),
    *(("int4:96", shape) for shape in [*CODED_SHAPES, (40, 192, 70), (150, 4128, 77)]),
    ("int4:32", (17, 2080, 33)),
]


@EVERY_ISA
@pytest.mark.parametrize(("form", "shape"), BESIDE_BFLOAT16, ids=str)
def test_codes_meet_bfloat16_exactly_and_a_row_has_the_same_bits_in_any_company(form, shape, isa):
    x, w = arrays(shape, jnp.bfloat16)
    leaf = in_codes(w.astype(jnp.float32), form)
    if form == "int8":
        leaf = leaf.replace(codes=leaf.codes.at[0, 0].set(-128))
    whole = np.asarray(coded(x, leaf, isa))
    truth, size = exact(x, leaf.decode())
    assert (np.abs(whole - truth) <= 1e-6 * size).all()
    for rows in {1, min(shape[0], 20), min(shape[0], 40)}:
        np.testing.assert_array_equal(coded(x[-rows:], leaf, isa, 2), whole[-rows:])


@EVERY_ISA
@pytest.mark.parametrize(("form", "shape"), BESIDE_BFLOAT16, ids=str)
def test_rows_of_bfloat16_are_rounded_as_those_of_float32(form, shape, isa):
    x, w = arrays(shape, jnp.bfloat16)
    x = (x * jnp.logspace(-3, 3, shape[1])).astype(jnp.bfloat16)  # blocks of very different sizes
    leaf = in_codes(w.astype(jnp.float32), form)
    whole = np.asarray(coded(x, leaf, isa, dynamic=True))
    said = nearest(x)
    if isa == "amx":  # whose tiles take them as numbers of bfloat16
        said = said.astype(jnp.bfloat16)
    truth, size = exact(said, leaf.decode())
    assert (np.abs(whole - truth) <= 1e-6 * size).all()
    for rows in {1, min(shape[0], 20), min(shape[0], 40)}:
        np.testing.assert_array_equal(coded(x[-rows:], leaf, isa, 2, dynamic=True), whole[-rows:])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("form", "codes"), [("int8", "int8"), ("int4:32", "uint8")])
@pytest.mark.parametrize("more", [0, 1])
def test_bfloat16_beside_codes_is_widened_but_where_tiles_are_faster(more, form, codes, dynamic):
    x, w = arrays((products.LONE[codes, dynamic] + more, 64, 32), jnp.bfloat16)
    leaf = in_codes(w.astype(jnp.float32), form).replace(dynamic=dynamic)
    tiled = more and native.best() == "amx"
    assert kernels.choice().readable(x, leaf.codes, dynamic).dtype == (jnp.bfloat16 if tiled else jnp.float32)
    assert native.CODED in jax.jit(leaf.multiply).lower(x).as_text(), "by the kernel in either case"
    said = nearest(x) if dynamic else x
    truth, size = exact(said.astype(jnp.bfloat16) if tiled else said, leaf.decode())
    assert (np.abs(leaf.multiply(x) - truth) <= 1e-6 * size).all()


@EVERY_ISA
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", [1, 17, 33, 100, 1025])
def test_int8_may_have_any_number_of_inputs(inner, dynamic, isa):
    x, w = arrays((5, inner, 9), jnp.float32)
    leaf = in_codes(w, "int8")
    truth, size = exact(rounded(x) if dynamic else x, leaf.decode())
    assert (np.abs(coded(x, leaf, isa, dynamic=dynamic) - truth) <= 1e-6 * size).all()


@FORMS
@EVERY_ISA
@pytest.mark.parametrize("dtype", BOTH)
def test_what_is_odd_in_a_row_that_is_rounded_stays_in_it(dtype, form, isa):
    x, w = arrays((6, 192, 7), dtype)
    w = w.astype(jnp.float32)
    leaf = in_codes(w, form)
    x = x.at[1, 40].set(jnp.nan).at[3, 100].set(jnp.inf).at[4].set(0).at[5].set(1e-41)
    got = np.asarray(coded(x, leaf, isa, dynamic=True))
    assert not np.isfinite(got[1]).any() and not np.isfinite(got[3]).any()
    np.testing.assert_array_equal(got[4:], 0)
    np.testing.assert_array_equal(got[[0, 2]], coded(x[jnp.array([0, 2])], leaf, isa, dynamic=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["int8", "int4:64"])
@EVERY_ISA
def test_a_row_times_codes_has_the_same_bits_in_any_company_and_on_any_threads(form, dynamic, isa):
    x, w = arrays((512, 1152, 43), jnp.float32)
    leaf = in_codes(w, form)
    whole = np.asarray(coded(x, leaf, isa, 1, dynamic))
    for threads in (None, 2, 7):
        np.testing.assert_array_equal(coded(x, leaf, isa, threads, dynamic), whole)
    for rows in (1, 2, 5, 24, 200):
        got = coded(x[-rows:], leaf, isa, dynamic=dynamic)
        np.testing.assert_array_equal(got, whole[-rows:])


@EVERY_ISA
def test_scales_of_any_float16_are_read_rightly(isa):
    halves = np.array([0, 1, 2, 1023, 1024, 1025, 0x7BFF, 0x8001, 0x8400, 0xBC00, 0xFBFF, 0x3555, 0x0200], np.uint16)
    scale = halves.view(np.float16)[None]
    codes = jnp.full((1, 16 * len(halves)), 0x99, jnp.uint8)  # every code is 9: one times the scale
    x = jnp.eye(len(halves)).repeat(32, 1) / 32
    np.testing.assert_array_equal(
        products.linear(x, codes, isa, scale=jnp.asarray(scale))[:, 0], scale[0].astype(np.float32)
    )


def test_codes_that_it_cannot_multiply_are_refused():
    x, int8, int4 = jnp.ones((2, 64)), jnp.ones((4, 64), jnp.int8), jnp.ones((4, 32), jnp.uint8)
    half = jnp.ones((4, 2), jnp.float16)
    for codes, scale in ((int8, half), (int4, jnp.ones(4)), (jnp.ones((4, 64)), jnp.ones(4))):
        with pytest.raises(Exception, match="int8 with float32 scales, or uint8 with float16"):
            products.linear(x, codes, scale=scale)
    for codes, scale in ((int8, jnp.ones(3)), (int4, half[:3]), (int4, jnp.ones((4, 4), jnp.float16))):
        with pytest.raises(Exception, match=r"w \[O, I\] and scale \[O\]"):
            products.linear(x, codes, scale=scale)


# --- a row's bits are its own --------------------------------------------------------------------------------------


@DTYPES
@EVERY_ISA
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(dtype, isa):
    x, w = arrays((512, 1093, 43), dtype)
    whole = np.asarray(products.linear(x, w, isa))
    for rows, got in zip(ROWS, jax.jit(lambda x: [products.linear(x[-n:], w, isa) for n in ROWS])(x), strict=True):
        np.testing.assert_array_equal(got, whole[-rows:])


@DTYPES
@EVERY_ISA
def test_a_long_row_has_the_same_bits_whatever_the_number_of_rows(dtype, isa):
    x, w = arrays((150, 4133, 77), dtype)
    whole = np.asarray(products.linear(x, w, isa))
    for rows in (1, 20, 40):
        np.testing.assert_array_equal(products.linear(x[-rows:], w, isa), whole[-rows:])


@DTYPES
@EVERY_ISA
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_a_row_has_the_same_bits_whatever_the_number_of_threads(rows, dtype, isa):
    x, w = arrays((rows, 1093, 203), dtype)
    alone = np.asarray(products.linear(x, w, isa, threads=1))
    for threads in (None, 2, 3, 7, 64):
        for _ in range(3):
            np.testing.assert_array_equal(products.linear(x, w, isa, threads), alone)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 33])
def test_a_lone_row_of_linear_has_the_bits_it_has_in_a_batch(rows, dtype):
    x = jax.random.normal(jax.random.key(0), (rows, 1, 165), dtype)
    w = jax.random.normal(jax.random.key(1), (3, 7, 165), dtype)
    product = jax.jit(lambda x: ops.linear(x, w, "BTD,NHD->BTNH"))
    whole = product(x)
    assert kernels.choice().product(x[:, 0], w[0]) is not None
    for row in range(rows):
        np.testing.assert_array_equal(product(x[row : row + 1])[0], whole[row])


# --- a gate and what it opens --------------------------------------------------------------------------------------

GATES = pytest.mark.parametrize("activation", products.ACTIVATIONS)


def gate(shape, seed=0):
    """(x, gate, up, what comes of them in float64)."""
    x, weights = arrays((shape[0], shape[1], 2 * shape[2]), jnp.bfloat16, seed)
    weights = (weights.astype(jnp.float32) * 2 / shape[1] ** 0.5).astype(jnp.bfloat16)
    return x, weights[: shape[2]], weights[shape[2] :]


@pytest.mark.parametrize(
    ("shape", "activation", "isa"), pairwise(SHAPES, products.ACTIVATIONS, native.ISAS), indirect=["isa"], ids=str
)
def test_a_gate_and_what_it_opens_are_one_product_that_is_rounded_once(shape, activation, isa):
    x, first, second = gate(shape)
    got = products.gated(x, first, second, activation, isa)
    opened = np.asarray(ACTIVATION[activation](jnp.float32(exact(x, first)[0])), np.float64) * exact(x, second)[0]
    assert got.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(got, np.float64) - opened) <= 2**-8 * np.abs(opened) + 1e-5).all()


@EVERY_ISA
def test_a_gated_row_has_the_same_bits_in_any_company_and_on_any_threads(isa):
    x, first, second = gate((150, 4133, 77))
    whole = np.asarray(products.gated(x, first, second, "silu", isa), np.float32)
    for rows in (1, 20, 40, 129):
        np.testing.assert_array_equal(products.gated(x[-rows:], first, second, "silu", isa), whole[-rows:])
    for threads in (1, 2, 7):
        np.testing.assert_array_equal(products.gated(x, first, second, "silu", isa, threads), whole)


@GATES
@EVERY_ISA
def test_numbers_that_are_none_stay_in_their_gated_rows(activation, isa):
    x, first, second = gate((9, 65, 7))
    got = np.asarray(products.gated(x.at[3, 5].set(jnp.nan), first, second, activation, isa), np.float32)
    assert np.isnan(got[3]).all()
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(got[rest], np.asarray(products.gated(x, first, second, activation, isa))[rest])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_feed_forward_block_takes_the_gated_product_where_there_is_one(dtype):
    params, config = tiny_model()
    spec, p = config.layers[0], jax.tree.map(lambda x: x.astype(dtype), params["layers"][0])
    x = jax.random.normal(jax.random.key(0), (2, 3, config.width), dtype)

    def block(x, p):
        return ops.mlp(x, p, spec, p["ffn_norm"]).astype(jnp.float32) / 16

    taken = native.GATED in jax.jit(block).lower(x, p).as_text()
    assert taken == (dtype == "bfloat16" and native.best() == "amx")
    close(both(block, x, p), 3e-2 if dtype == "bfloat16" else 2e-5)
    close(both(jax.grad(lambda x, p: block(x, p).sum(), (0, 1)), x, p), 0.1 if dtype == "bfloat16" else 1e-4)
    alone = jnp.stack([jax.jit(block)(x[i : i + 1], p)[0] for i in range(2)])
    np.testing.assert_array_equal(jax.jit(block)(x, p), alone)
    np.testing.assert_array_equal(jax.jit(jax.vmap(block, (0, None)))(x, p), alone)
    several = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), p)
    each = [jax.jit(block)(x, jax.tree.map(lambda w, i=i: w[i], several)) for i in range(2)]
    np.testing.assert_array_equal(jax.jit(jax.vmap(block, (None, 0)))(x, several), jnp.stack(each))
    there = jax.export.export(jax.jit(block), platforms=["cuda"])(x, p).mlir_module()
    assert native.GATED not in there


# --- it lives with JAX's transformations ---------------------------------------------------------------------------


def loss(x, w):
    return jnp.sum(jnp.sin(ops.linear(x, w, "BTD,NHD->BTNH", dtype=jnp.float32)))


def both(function, *args):
    """(with the kernel, with the plain product)."""
    got = jax.jit(function)(*args)
    with kernels.use(KernelChoice(linear="reference")):
        return got, jax.jit(function)(*args)


def close(pair, tolerance=2e-5):
    for got, wanted in zip(jax.tree.leaves(pair[0]), jax.tree.leaves(pair[1]), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(np.float64(got), np.float64(wanted), rtol=tolerance, atol=tolerance)


def example(dtype, rows=3):
    x = jax.random.normal(jax.random.key(0), (rows, 2, 35), dtype)
    return x, jax.random.normal(jax.random.key(1), (3, 7, 35), dtype) / 6


@DTYPES
@pytest.mark.parametrize("rows", [1, 3])
def test_its_gradient_is_the_plain_products(rows, dtype):
    x, w = example(dtype, rows)
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    close(both(jax.value_and_grad(loss, (0, 1)), x, w), tolerance)
    close(both(jax.grad(jax.checkpoint(loss), (0, 1)), x, w), tolerance)
    close(both(lambda x, w: jax.jvp(loss, (x, w), (x, w)), x, w), tolerance)


def test_its_second_derivative_is_the_plain_products():
    x, w = example(jnp.float32)
    close(both(lambda x, w: jax.jvp(jax.grad(loss), (x, w), (x, w)), x, w))


@DTYPES
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["x", "w", "both"])
def test_a_batch_of_products_is_each_of_them(axes, dtype):
    xs, ws = (jnp.stack([a, 2 * a, a - 1]) for a in example(dtype))
    one = functools.partial(ops.linear, equation="BTD,NHD->BTNH")
    x, w = (a if axis == 0 else a[0] for a, axis in zip((xs, ws), axes, strict=True))
    got = jax.jit(jax.vmap(one, axes))(x, w)
    for i in range(3):
        pair = (a[i] if axis == 0 else a for a, axis in zip((x, w), axes, strict=True))
        np.testing.assert_array_equal(got[i], one(*pair))


def test_a_batch_of_gradients_is_each_of_them():
    x, w = example(jnp.float32)
    xs = jnp.stack([x, 2 * x])
    got = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None)))(xs, w)
    for i in range(2):
        close(([g[i] for g in got], jax.grad(loss, (0, 1))(xs[i], w)))


@DTYPES
def test_it_runs_inside_loops(dtype):
    x, w = example(dtype)
    w = w.reshape(21, 35)[:, :21]
    x = x[..., :21]

    def step(x, _):
        return ops.linear(x, w, "BTD,FD->BTF"), None

    looped = jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, step(c[1], None)[0]), (0, x))[1]
    scanned = jax.jit(lambda x: jax.lax.scan(step, x, length=4)[0])(x)
    for _ in range(4):
        x = step(x, None)[0]
    np.testing.assert_array_equal(looped, x)
    np.testing.assert_array_equal(scanned, x)


# --- the programs --------------------------------------------------------------------------------------------------


def lowered(dtype, rows=1):
    shapes = jax.ShapeDtypeStruct((rows, 64), dtype), jax.ShapeDtypeStruct((96, 64), dtype)
    return jax.jit(lambda x, w: ops.linear(x, w, "BD,OD->BO", dtype=jnp.float32)), shapes


@DTYPES
@pytest.mark.parametrize("rows", [1, 3])
def test_the_program_is_one_call_and_moves_what_it_reads_and_writes(dtype, rows):
    function, shapes = lowered(dtype, rows)
    compiled = function.lower(*shapes).compile()
    assert program.kernels(compiled) == {"custom-call": 1}
    assert program.bytes_moved(compiled) == (rows * 64 + 96 * 64) * jnp.dtype(dtype).itemsize + rows * 96 * 4
    assert native.LINEAR in compiled.as_text()


def test_a_program_for_another_platform_has_the_plain_product():
    function, shapes = lowered(jnp.float32)
    there = jax.export.export(function, platforms=["cuda"])(*shapes).mlir_module()
    assert native.LINEAR not in there and "stablehlo.dot_general" in there
