"""Parameters and their bytes, against published counts and against the arrays that are really made."""

import math

import jax
import jax.numpy as jnp
import pytest
import tiny_models
from published import MIXED, PUBLISHED, SHAPES

from jaxinfer import mesh, models, roofline
from jaxinfer.roofline import Packed


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_count_is_the_published_one(name):
    published, shape = PUBLISHED[name]
    assert roofline.params_count(shape) == published


@pytest.mark.parametrize("shape", [MIXED, MIXED.replace(tied=True), *SHAPES.values()])
def test_params_count_is_that_of_the_params_that_are_made(shape):
    made = jax.tree.leaves(models.param_shapes(shape))
    assert roofline.params_count(shape) == sum(leaf.size for leaf in made)
    assert roofline.weight_bytes(shape, "bfloat16") == 2 * sum(leaf.size for leaf in made)


@pytest.mark.parametrize(
    ("family", "variant"),
    [(family, variant) for family, cases in tiny_models.CASES.items() if family != "gemma3" for variant in cases],
)
def test_params_count_is_that_of_transformers_for_every_family(family, variant):
    # gemma3 is left out: its torch model has eyes too
    raw = tiny_models.hf_config(family, variant).to_dict()
    oracle = tiny_models.hf_model(family, variant)
    assert roofline.params_count(models.config_from_hf(raw)) == oracle.num_parameters()


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"data": 2, "tensor": 4}, {"seq": 2, "tensor": 2}, {"data": 8}])
@pytest.mark.parametrize("shape", [MIXED, MIXED.replace(tied=True), SHAPES["Llama-3-70B"]])
def test_a_chip_of_a_mesh_holds_the_bytes_of_its_part_of_every_array(shape, axes):
    devices = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    wide = models.arrange_config(shape, devices)
    made, homes = models.param_shapes(wide, "bfloat16"), mesh.shardings(models.letters(wide), devices)
    assert roofline.weight_bytes(wide, "bfloat16") == sum(2 * leaf.size for leaf in jax.tree.leaves(made))
    held = jax.tree.map(lambda x, home: 2 * math.prod(home.shard_shape(x.shape)), made, homes)
    assert roofline.weight_bytes(roofline.part(wide, axes), "bfloat16") == sum(jax.tree.leaves(held))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), (jnp.bfloat16, 2), (jnp.dtype("int8"), 1), ("float8_e4m3fn", 1), ("uint4", 0.5)],
)
def test_a_dtype_has_a_width(dtype, size):
    assert roofline.itemsize(dtype) == size


def test_a_dtype_without_a_width_is_refused():
    with pytest.raises(ValueError, match="dtype 'bool' has no width"):
        roofline.itemsize("bool")


# --- packed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packed", "bits"),
    [
        (Packed(bits=4, group=32), 8 * 18 / 32),  # GGUF Q4_0: 18 bytes a block of 32
        (Packed(bits=4, group=32, zero_bits=16), 8 * 20 / 32),  # Q4_1: 20
        (Packed(bits=8, group=32), 8 * 34 / 32),  # Q8_0: 34
        (Packed(bits=4, group=32, scale_bits=8), 8 * 17 / 32),  # MXFP4: 17
        (Packed(bits=4, group=64, scale_bits=32), 4.5),  # NF4 (QLoRA, Dettmers et al. 2023, section 3): 0.5 a parameter
        (Packed(bits=4, group=64, scale_bits=8 + 32 / 256), 4 + 0.127),  # and 0.127 with double quantization
        (Packed(bits=4, group=128, zero_bits=4), 4 + 20 / 128),  # GPTQ and AWQ: qweight, scales, qzeros
        (Packed(bits=8), 8 + 16 / 4096),  # a scale an output
    ],
)
def test_a_packed_weight_has_the_bits_that_its_format_publishes(packed, bits):
    assert packed.bytes(1024, 4096) * 8 / (1024 * 4096) == pytest.approx(bits, abs=5e-4)


def test_a_group_that_is_not_full_has_a_scale_and_a_zero_too():
    packed = Packed(bits=4, group=16, scale_bits=16, zero_bits=8)
    scales = [start for _ in range(3) for start in range(0, 37, 16)]
    assert packed.bytes(3, 37) == 3 * 37 / 2 + 3 * len(scales)


@pytest.mark.parametrize("shape", [MIXED, MIXED.replace(tied=True), SHAPES["Llama-3-8B"]])
def test_only_the_layers_products_are_packed_and_the_head_where_asked(shape):
    plain, lone = roofline.weight_bytes(shape, "bfloat16"), Packed(bits=8, scale_bits=0)
    products = sum(o * i for spec in shape.layers for o, i in roofline.products(shape, spec))
    shape = shape.replace(dtype="bfloat16")
    assert roofline.weight_bytes(shape, lone) == plain - products
    head = shape.vocab_size * shape.width
    assert roofline.weight_bytes(shape, Packed(bits=8, scale_bits=0, head=True)) == plain - products - head


def test_a_step_reads_packed_vectors_from_a_packed_table():
    shape, packed = SHAPES["Llama-3.2-1B"], Packed(bits=8, scale_bits=32, head=True)
    kept = roofline.cache_bytes(shape, 1, 1)
    assert roofline.decode_bytes(shape, 1, 0, packed) == roofline.weight_bytes(shape, packed) + (2048 + 4) + kept
    outside = Packed(bits=8, scale_bits=32)
    assert roofline.decode_bytes(shape, 1, 0, outside) == roofline.weight_bytes(shape, outside) + 2 * 2048 + kept
