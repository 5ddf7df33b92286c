"""Weights in codes: how far off they are, and that a product with them is one with what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import kernels, ops, program
from jaxinfer.kernels import KernelChoice
from jaxinfer.quantization import Int4, Int8, parse_form, rounded
from jaxinfer.quantization.weights import pack, unpack

FORMS = {
    "int8": lambda w, outer: Int8.of(w, outer),
    "int4, packed": lambda w, outer: Int4.of(w, 32, True),
    "int4 of 8": lambda w, outer: Int4.of(w, 8, True),
    "int4": lambda w, outer: Int4.of(w, 32, False),
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
EQUATIONS = {"BTD,NHD->BTNH": ((2, 3, 96), (4, 5, 96)), "BTNH,DNH->BTD": ((2, 3, 3, 32), (7, 3, 32))}


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_eight_bits_are_off_by_half_a_scale():
    w = drawn((6, 4, 96)) * jnp.logspace(-6, 6, 6)[:, None, None]
    leaf = Int8.of(w, 2)
    error = np.abs(np.asarray(leaf.decode(), np.float64) - np.asarray(w, np.float64))
    assert leaf.scale.shape == (6, 4) and leaf.codes.dtype == jnp.int8
    assert (error <= np.asarray(leaf.scale, np.float64)[..., None] * 0.50001).all()
    np.testing.assert_allclose(leaf.scale, jnp.abs(w).max(-1) / 127, rtol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("group", [2, 8, 32, 96])
def test_four_bits_are_off_by_half_a_scale_and_by_one_opposite_the_furthest(group, packed):
    w = drawn((5, 3, 192))
    leaf = Int4.of(w, group, packed)
    assert leaf.scale.shape == (5, 3, 192 // group) and leaf.shape == w.shape
    groups, got = (np.asarray(x, np.float64).reshape(5, 3, -1, group) for x in (w, leaf.decode()))
    scale = np.abs(np.asarray(leaf.scale, np.float64))[..., None]
    furthest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    opposite = np.sign(groups) != np.sign(furthest)
    assert (np.abs(got - groups) <= scale * np.where(opposite, 1.01, 0.51)).all()
    at = np.abs(groups).argmax(-1)[..., None]
    np.testing.assert_allclose(np.take_along_axis(got, at, -1), furthest, rtol=1e-3)  # a float16 scale, and no more


def test_four_bits_are_those_of_ggufs_q4_0():
    """ggml, quantize_row_q4_0_ref: d = the furthest / -8, code = the integer part of x / d + 8.5, at most 15."""
    blocks = np.asarray(drawn((40, 32)))
    d = (blocks[np.arange(40), np.abs(blocks).argmax(1)] / -8)[:, None]
    codes = np.minimum((blocks / d + 8.5).astype(np.int8), 15)
    leaf = Int4.of(jnp.asarray(blocks), 32, True)
    np.testing.assert_array_equal(leaf.scale, d.astype(np.float16))
    differ = np.asarray(unpack(leaf.codes, 32)) + 8 != codes  # a scale is rounded to float16 before it divides
    assert differ.mean() < 0.01
    np.testing.assert_array_equal(leaf.codes[0, 0] & 15, codes[0, 0])  # the first half in the low bits
    np.testing.assert_array_equal(leaf.codes[0, 0] >> 4, codes[0, 16])


@pytest.mark.parametrize("unit", [2, 8, 32])
def test_packing_loses_nothing(unit):
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 5, 96)), jnp.int8)
    packed = pack(codes, unit)
    assert packed.shape == (3, 5, 48) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed, unit), codes)


@EVERY_FORM
def test_what_is_zero_stays_zero(form):
    assert not FORMS[form](jnp.zeros((3, 64)), 1).decode().any()


@EVERY_FORM
@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_with_codes_is_one_with_what_they_stand_for(equation, choice, form):
    x, w = (drawn(shape, seed) for seed, shape in enumerate(EQUATIONS[equation]))
    leaf = FORMS[form](w, 2 if "NHD" in equation else 1)
    with kernels.use(KernelChoice(linear=choice)):
        got = jax.jit(lambda x, leaf: ops.linear(x, leaf, equation))(x, leaf)
    np.testing.assert_allclose(got, ops.linear(x, leaf.decode(), equation), atol=1e-4)


@EVERY_FORM
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_row_times_codes_has_the_same_bits_alone(form, choice):
    x, leaf = drawn((9, 1, 192)), FORMS[form](drawn((4, 5, 192), 1), 2)
    product = jax.jit(lambda x: ops.linear(x, leaf, "BTD,NHD->BTNH"))
    with kernels.use(KernelChoice(linear=choice)):
        whole = product(x)
        for row in range(9):
            np.testing.assert_array_equal(product(x[row : row + 1])[0], whole[row])


@EVERY_FORM
@pytest.mark.parametrize("axes", ["tensor=4", "data=2,tensor=2"])
@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [("BTD,NHD->BTNH", (2, 3, 96), (4, 5, 96)), ("BTNH,DNH->BTD", (2, 3, 4, 32), (7, 4, 32)),
     ("BTF,DF->BTD", (2, 3, 256), (7, 256)), ("BTD,FD->BTF", (2, 3, 96), (8, 96))],
)  # fmt: skip
def test_each_device_multiplies_with_its_part_of_the_codes(equation, x, w, axes, form, on_mesh):
    x, w = drawn(x), drawn(w, 1)
    words = equation.split("->")[0].split(",")
    leaf = FORMS[form](w, sum(letter not in words[0] for letter in words[1]))
    expected = ops.linear(x, leaf, equation)
    with on_mesh(axes) as mesh_:
        placed = jaxinfer.shard({"w": leaf}, {"w": words[1]}, mesh_)["w"]
        got = jax.jit(lambda x, w: ops.linear(x, w, equation))(jaxinfer.shard(x, words[0], mesh_), placed)
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("form", ["int8", "int4, packed"])  # int4 in arrays of its own is for GPUs: see tests/h200
@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_no_program_writes_the_numbers_of_the_codes(rows, choice, form):
    x, leaf = jnp.zeros((rows, 1, 1024), jnp.bfloat16), FORMS[form](drawn((32, 64, 1024)), 2)
    with kernels.use(KernelChoice(linear=choice)):
        compiled = jax.jit(lambda x, leaf: ops.linear(x, leaf, "BTD,NHD->BTNH")).lower(x, leaf).compile()
    numbers = 32 * 64 * 1024
    assert not [w for w in program.writes(compiled) if w.bytes > numbers / 2], "a whole weight, even in four bits"
    assert program.temporaries(compiled)["temp"] < 2 * numbers


def test_rounding_is_to_the_nearest_code_of_a_block():
    x = drawn((3, 100)) * jnp.logspace(-4, 4, 100)
    got, exact = np.asarray(rounded(x), np.float64), np.asarray(x, np.float64)
    for start in range(0, 100, 32):
        part = slice(start, start + 32)
        scale = np.abs(exact[:, part]).max(1, keepdims=True) / 127
        assert (np.abs(got[:, part] - exact[:, part]) <= scale * 0.501).all()
    np.testing.assert_array_equal(rounded(jnp.zeros((2, 40))), 0)
    odd = rounded(x.at[1, 40].set(jnp.nan))
    assert np.isnan(odd[1, 32:64]).all() and np.isfinite(odd[1, :32]).all() and np.isfinite(odd[0]).all()


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("of", [lambda w: Int8.of(w, 1, True), lambda w: Int4.of(w, 32, True, True)])
def test_a_dynamic_weight_meets_rounded_rows(of, choice):
    x, leaf = drawn((5, 2, 96)), of(drawn((7, 96), 1))
    with kernels.use(KernelChoice(linear=choice)):
        got = jax.jit(lambda x, leaf: ops.linear(x, leaf, "BTD,FD->BTF"))(x, leaf)
    said = rounded(x.reshape(10, 96)).reshape(x.shape)
    np.testing.assert_allclose(got, ops.linear(said, leaf.decode(), "BTD,FD->BTF"), atol=1e-4)
    assert np.abs(got - ops.linear(x, leaf.decode(), "BTD,FD->BTF")).max() > 1e-3, "it was to be rounded"


@pytest.mark.parametrize("name", ["int8", "int8:dynamic", "int4:group=32", "int4:group=64,dynamic"])
def test_a_form_has_the_name_that_is_read(name):
    assert parse_form(name).name == name
    assert parse_form("int4") == parse_form("int4:group=32") and parse_form("int4:dynamic").dynamic


def test_rows_of_codes_are_looked_up_and_none_is_another_ones():
    table = drawn((11, 32))
    leaf = Int8.of(table, 1)
    got = ops.embed(leaf, jnp.array([[0, 10, 11, -1]]))
    np.testing.assert_array_equal(got[0, :2], leaf.decode()[jnp.array([0, 10])])
    assert np.isnan(got[0, 2:]).all()
