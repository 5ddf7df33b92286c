"""Weights in codes are saved as codes, and come back bit for bit, on one device or a mesh that divides them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import models
from jaxinfer.quantization import Int4
from jaxinfer.testing import tiny_model
from jaxinfer.weights import convert

pytest.importorskip("orbax.checkpoint")
FORMS = pytest.mark.parametrize("form", ["int8", "int4:group=16"])
WIDE = {"num_layers": 2, "vocab_size": 104, "width": 64, "ffn_width": 128, "head_width": 32, "num_heads": 4}


def saved(directory, form):
    params, config = tiny_model(**WIDE)
    coded = models.quantize(params, form)
    jaxinfer.save(directory, coded, config)
    return coded, config


def equal(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), got, wanted)


@FORMS
def test_codes_come_back_bit_for_bit(form, tmp_path):
    coded, config = saved(tmp_path / "x", form)
    got, read = jaxinfer.load(tmp_path / "x")
    assert read == config and models.form_of(got) == form
    equal(got, coded)
    equal(jaxinfer.load(tmp_path / "x", quantize=form)[0], coded)
    assert json.loads((tmp_path / "x" / "current" / "jaxinfer.json").read_text())["weights"] == form


@FORMS
def test_another_dtype_is_that_of_what_is_no_code(form, tmp_path):
    coded, _ = saved(tmp_path / "x", form)
    got, config = jaxinfer.load(tmp_path / "x", "bfloat16")
    assert config.dtype == "bfloat16" and got["norm"]["scale"].dtype == jnp.bfloat16
    equal(got["layers"][0]["q"], coded["layers"][0]["q"])


@FORMS
@pytest.mark.parametrize("axes", ["tensor=2", "data=2,tensor=2"])
def test_a_mesh_reads_its_parts(form, axes, tmp_path, on_mesh):
    coded, config = saved(tmp_path / "x", form)
    with on_mesh(axes):
        got, read = jaxinfer.load(tmp_path / "x")
        assert read == config and got["layers"][0]["q"].codes.sharding.spec[0] == "tensor"
        jaxinfer.save(tmp_path / "y", got, config)
    equal(jaxinfer.load(tmp_path / "y")[0], coded)


@FORMS
def test_a_mesh_that_does_not_divide_them_is_refused(form, tmp_path, on_mesh):
    saved(tmp_path / "x", form)
    with on_mesh("tensor=8"), pytest.raises(ValueError, match="in codes .*take a mesh that divides"):
        jaxinfer.load(tmp_path / "x")


def test_arranged_codes_and_conversions_are_refused(tmp_path, on_mesh):
    params, config = tiny_model(**WIDE)
    with on_mesh("tensor=8"):
        arranged, there = models.arrange(params, config)
        with pytest.raises(ValueError, match="arranged for a mesh"):
            jaxinfer.save(tmp_path / "x", models.quantize(arranged, "int8"), there)
    coded, config = jaxinfer.load("builtin", quantize="int8")
    jaxinfer.save(tmp_path / "y", coded, config, tokenizer="builtin")
    with pytest.raises(ValueError, match=r"in codes \(int8\)"):
        convert.to_huggingface(tmp_path / "y", tmp_path / "z")


def test_codes_of_a_gpu_are_saved_as_those_of_a_cpu(tmp_path):
    params, config = tiny_model(**WIDE)
    packed, apart = (models.quantize(params, "int4:group=16", packed=packed) for packed in (True, False))
    jaxinfer.save(tmp_path / "x", apart, config)
    equal(jaxinfer.load(tmp_path / "x")[0], packed)
    leaf = apart["layers"][0]["q"]
    assert isinstance(leaf, Int4) and leaf.codes.dtype == jnp.int4
    np.testing.assert_array_equal(leaf.decode(), packed["layers"][0]["q"].decode())
    equal(models.repacked(packed, packed=False), apart)
