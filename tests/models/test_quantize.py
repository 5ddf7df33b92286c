"""A model with weights in codes says what one with the numbers that these stand for says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from covering import in_full

import jaxinfer
from jaxinfer import mesh, models
from jaxinfer.models import quantize
from jaxinfer.quantization import Int4, Int8, Weight
from jaxinfer.speculation import HeadDraft, LayersDraft, NGram, speculate
from jaxinfer.testing import tiny_config, tiny_model, tiny_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [11, 12, 13], [20]]
WIDE = {"width": 64, "ffn_width": 128, "head_width": 32}  # so that groups of 32 are to be had


def decoded(params):
    """Plain params of what the codes stand for."""
    leaf = lambda x: isinstance(x, Weight)  # noqa: E731
    return jax.tree.map(lambda x: x.decode() if leaf(x) else x, params, is_leaf=leaf)


def tied_model(tied, **changes):
    config = tiny_config(**changes).replace(tied=tied)
    return tiny_params(config), config


def said(params, config, **more):
    return np.asarray(jaxinfer.generate(params, config, PROMPTS, max_new_tokens=16, **more).ids)


def scores(params, config):
    ids = jnp.array(PROMPTS[:1])
    return np.asarray(jaxinfer.forward(params, config, ids, jaxinfer.init_cache(config, 1, 16))[0])


CASES = [  # each form; the rest when asked for
    pytest.param(family, form, marks=() if i < 4 else pytest.mark.full)
    for i, (family, form) in enumerate(
        zip(tiny_models.CASES, itertools.cycle(("int8", "int4:group=4", "int4:group=8")), strict=False)
    )
]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_every_family_says_what_its_decoded_weights_say(family, form, tmp_path):
    tiny_models.write_checkpoint(tmp_path, family, "plain" if family != "gpt2" else "long")
    params, config = jaxinfer.load(tmp_path, dtype=jnp.float32)
    coded = quantize(params, form)
    np.testing.assert_allclose(scores(coded, config), scores(decoded(coded), config), atol=1e-4)
    np.testing.assert_array_equal(said(coded, config), said(decoded(coded), config))
    loaded, _ = jaxinfer.load(tmp_path, dtype=jnp.float32, quantize=form)
    jax.tree.map(np.testing.assert_array_equal, loaded, coded)


PLACED = (
    ("int8", "data=2,tensor=2"), ("int4", "tensor=4"), in_full("int8", "tensor=2"),
    in_full("int4:group=8", "data=2,tensor=2"),
    ("int4:group=16", "seq=2,tensor=2"), ("int4:group=12", "tensor=2"),
)  # fmt: skip


@pytest.mark.parametrize(("form", "axes"), PLACED)
def test_a_mesh_changes_nothing_where_groups_lie_on_one_device(form, axes, on_mesh):
    params, config = tiny_model(**WIDE)
    with on_mesh(axes):
        arranged, there = models.arrange(params, config)
        placed = mesh.shard(arranged, models.letters(there))
        coded = quantize(placed, form)
        got = said(coded, there)
        whole = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), decoded(coded))
    plain = jax.tree.map(jnp.asarray, whole)
    with on_mesh(axes):
        expected = said(mesh.shard(plain, models.letters(there)), there)
    np.testing.assert_array_equal(got, expected)
    if form == "int8" and there is config:
        np.testing.assert_array_equal(got, said(quantize(params, form), config))


def test_a_checkpoint_is_read_into_codes_on_a_mesh(on_mesh):
    with on_mesh("data=2,tensor=4"):
        params, config = jaxinfer.load("builtin", jnp.float32, quantize="int8")
        got = said(params, config)
        assert params["layers"][0]["q"].codes.sharding.spec[0] == "tensor"
    params, config = jaxinfer.load("builtin", jnp.float32, quantize="int8")
    np.testing.assert_array_equal(got, said(params, config))


@pytest.mark.parametrize("form", [in_full("int8"), "int4"])
def test_drafts_on_coded_weights_change_nothing(form):
    params, config = tiny_model(num_layers=2, **WIDE)
    coded = quantize(params, form)
    own = models.head_config(config)
    head = HeadDraft(models.init_head(own, jax.random.key(0), jnp.float32), coded, own, config)
    for draft in (NGram(), LayersDraft(coded, config, 1), head):
        got = speculate(coded, config, PROMPTS, draft=draft, num_draft_tokens=3, max_new_tokens=16)
        np.testing.assert_array_equal(got.ids, said(coded, config))


@pytest.mark.parametrize("form", ["int8:dynamic", "int4:group=32,dynamic"])
def test_a_dynamic_model_is_near_the_exact_one_and_says_the_same_to_a_row_alone(form):
    params, config = tiny_model(**WIDE)
    coded, exact = quantize(params, form), quantize(params, form.replace("dynamic", "").rstrip(":,"))
    assert models.form_of(coded) == form
    near, far = (np.abs(scores(coded, config) - scores(exact, config)).max() for exact in (exact, params))
    assert 0 < near < far + 0.5
    together = said(coded, config)
    for row, prompt in enumerate(PROMPTS):
        alone = jaxinfer.generate(coded, config, [prompt], max_new_tokens=16)
        np.testing.assert_array_equal(alone.ids[0], together[row])
    np.testing.assert_array_equal(
        speculate(coded, config, PROMPTS, draft=NGram(), num_draft_tokens=3, max_new_tokens=16).ids, together
    )


def test_products_are_in_codes_and_all_else_stays():
    params, config = tied_model(False, qkv_bias=True, **WIDE)
    coded = quantize(params, "int4:group=16")
    first = coded["layers"][0]
    assert {name for name, x in first.items() if isinstance(x, Int4)} == {"q", "k", "v", "o", "up", "gate", "down"}
    assert first["q"].packed and first["o"].scale.shape == (config.width, first["o"].shape[1], 2)
    assert isinstance(coded["head"], Int8) and coded["embed"] is params["embed"]
    assert isinstance(quantize(tied_model(True, **WIDE)[0], "int4")["embed"], Int8)
    assert isinstance(quantize(params, "int4:group=48")["layers"][0]["q"], Int8), "48 does not divide 64"
    jax.tree.map(np.testing.assert_array_equal, first["q_bias"], params["layers"][0]["q_bias"])


def test_bytes_are_those_of_the_formula():
    params, config = tied_model(True, **WIDE)
    for form in ("int8", "int4", "int4:group=16"):
        held = sum(x.nbytes for x in jax.tree.leaves(quantize(params, form)))
        assert held == jaxinfer.roofline.weight_bytes(config, jaxinfer.roofline.weights_of(form))


@pytest.mark.parametrize(
    "form",
    ["int7", "int4:groups=3", "int4:group=3", "int4:group=0", "int8:group=32", "int8,x", "int4:dynamic,group=8", ""],
)
def test_another_form_is_refused_by_its_name(form):
    with pytest.raises(ValueError, match=r"int8, int4 or int4:group=G|even number"):
        quantize(tiny_model()[0], form)


def test_what_codes_cannot_do_is_refused(on_mesh):
    params, config = tiny_model(**WIDE)
    coded = quantize(params, "int8")
    with pytest.raises(ValueError, match="in codes already"):
        quantize(coded, "int8")
    with on_mesh("tensor=8"), pytest.raises(ValueError, match="then quantize"):
        models.arrange(coded, config)


def test_a_fingerprint_of_codes_says_the_sizes_alone():
    params, config = tied_model(True)
    whole, coded = models.fingerprint(params, config), models.fingerprint(quantize(params, "int8"), config)
    assert whole.startswith(coded) and coded == "D36-V101-L2-"
