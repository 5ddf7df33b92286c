"""`roofline` against published parameter counts, against the arrays that are really made, and against the books."""

import itertools

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from jaxinfer import cache, models, roofline
from jaxinfer.config import LayerSpec, ModelConfig, NormSpec


def config(D, F, N, K, H, L, V, tied=False, positions=0, **layer) -> ModelConfig:
    spec = LayerSpec(num_heads=N, num_kv_heads=K, head_width=H, scale=1.0, ffn_width=F, **layer)
    norm = layer.get("norm", NormSpec())
    layers = (spec,) * L
    return ModelConfig(
        vocab_size=V, width=D, layers=layers, tied=tied, num_positions=positions, norm=norm, dtype="bfloat16"
    )


HEAD, WHOLE, LAYER = {"qk_norm": "head"}, {"qk_norm": "projection"}, {"norm": NormSpec(kind="layer")}
GPT2 = LAYER | {"gated": False, "qkv_bias": True, "out_bias": True, "ffn_bias": True, "positions": 1024}

PUBLISHED = {  # what the checkpoints on the hub hold
    "Llama-2-7B": (6_738_415_616, config(4096, 11008, 32, 32, 128, 32, 32000)),
    "Llama-2-13B": (13_015_864_320, config(5120, 13824, 40, 40, 128, 40, 32000)),
    "Llama-3-8B": (8_030_261_248, config(4096, 14336, 32, 8, 128, 32, 128256)),
    "Llama-3-70B": (70_553_706_496, config(8192, 28672, 64, 8, 128, 80, 128256)),
    "Llama-3.2-1B": (1_235_814_400, config(2048, 8192, 32, 8, 64, 16, 128256, tied=True)),
    "Llama-3.2-3B": (3_212_749_824, config(3072, 8192, 24, 8, 128, 28, 128256, tied=True)),
    "Mistral-7B": (7_241_732_096, config(4096, 14336, 32, 8, 128, 32, 32000, window=4096)),
    "Qwen2.5-0.5B": (494_032_768, config(896, 4864, 14, 2, 64, 24, 151936, tied=True, qkv_bias=True)),
    "Qwen2.5-7B": (7_615_616_512, config(3584, 18944, 28, 4, 128, 28, 152064, qkv_bias=True)),
    "Qwen3-0.6B": (596_049_920, config(1024, 3072, 16, 8, 128, 28, 151936, tied=True, **HEAD)),
    "Qwen3-8B": (8_190_735_360, config(4096, 12288, 32, 8, 128, 36, 151936, **HEAD)),
    "Gemma-2-2B": (2_614_341_888, config(2304, 9216, 8, 4, 256, 26, 256000, tied=True, post_norm=True)),
    "Gemma-2-9B": (9_241_705_984, config(3584, 14336, 16, 8, 256, 42, 256000, tied=True, post_norm=True)),
    "Gemma-3-1B": (999_885_952, config(1152, 6912, 4, 1, 256, 26, 262144, tied=True, post_norm=True, **HEAD)),
    "Phi-3-mini": (3_821_079_552, config(3072, 8192, 32, 32, 96, 32, 32064)),
    "OLMo-2-7B": (7_298_617_344, config(4096, 11008, 32, 32, 128, 32, 100352, pre_norm=False, post_norm=True, **WHOLE)),
    "SmolLM3-3B": (3_075_098_624, config(2048, 11008, 16, 4, 128, 36, 128256, tied=True)),
    "GPT-2": (124_439_808, config(768, 3072, 12, 12, 64, 12, 50257, tied=True, **GPT2)),
}
MIXED = ModelConfig(  # every field of LayerSpec that makes a parameter, in layers that differ
    vocab_size=97,
    width=24,
    layers=tuple(
        LayerSpec(
            num_heads=6,
            num_kv_heads=3,
            head_width=10,
            scale=1.0,
            ffn_width=40 + index,
            qk_norm=qk_norm,
            gated=gated,
            qkv_bias=bias,
            out_bias=not bias,
            ffn_bias=bias,
            pre_norm=gated,
            post_norm=not gated or bias,
            norm=NormSpec(kind=kind),
            window=7 if bias else None,
        )
        for index, (qk_norm, gated, bias, kind) in enumerate(
            itertools.product(["none", "head", "projection"], [True, False], [True, False], ["rms", "layer"])
        )
    ),
    num_positions=31,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_count_is_the_published_one(name):
    published, shape = PUBLISHED[name]
    assert roofline.params_count(shape) == published


@pytest.mark.parametrize("shape", [MIXED, MIXED.replace(tied=True), *(shape for _, shape in PUBLISHED.values())])
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_cache_bytes_are_those_of_the_cache_that_is_made(dtype):
    made = jax.eval_shape(lambda: cache.init_cache(MIXED, 3, 29, dtype=dtype))
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.layers))
    assert roofline.cache_bytes(MIXED, 3, 29, dtype) == arrays


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), (jnp.bfloat16, 2), (jnp.dtype("int8"), 1), ("float8_e4m3fn", 1), ("uint4", 0.5)],
)
def test_a_dtype_has_a_width(dtype, size):
    assert roofline.itemsize(dtype) == size


def test_a_dtype_without_a_width_is_refused():
    with pytest.raises(ValueError, match="dtype 'bool' has no width"):
        roofline.itemsize("bool")


# --- one step ----------------------------------------------------------------------------------------------------


def test_a_step_reads_the_head_but_not_the_embedding():
    untied, tied = PUBLISHED["Llama-3-8B"][1], PUBLISHED["Llama-3.2-1B"][1]
    table = 128256 * 4096
    read = roofline.decode_bytes(untied, 1, 0)
    assert read == 2 * (8_030_261_248 - table + 4096 + 32 * 2 * 8 * 128)
    assert roofline.decode_bytes(tied, 1, 0) == 2 * (1_235_814_400 + 2048 + 16 * 2 * 8 * 64)


def test_a_step_reads_what_its_rows_see():
    shape = PUBLISHED["Llama-3-8B"][1]

    def bytes_of(rows, length, **options):
        return roofline.decode_bytes(shape, rows, length, **options)

    per_token = 2 * 32 * 2 * 8 * 128
    assert bytes_of(1, 4096) - bytes_of(1, 0) == 4096 * per_token
    assert bytes_of(3, [10, 0, 7]) - bytes_of(3, 0) == 17 * per_token
    assert bytes_of(1, 100, cache_dtype="int8") - bytes_of(1, 0, cache_dtype="int8") == 100 * per_token / 2
    with pytest.raises(ValueError, match="length has 2 entries but there are 3 rows"):
        bytes_of(3, [1, 2])


def test_a_window_bounds_what_is_read_and_computed():
    shape = PUBLISHED["Mistral-7B"][1]
    assert roofline.decode_bytes(shape, 2, 9000) == roofline.decode_bytes(shape, 2, 4096)
    assert roofline.decode_bytes(shape, 2, 9000, windowed=False) > roofline.decode_bytes(shape, 2, 4096)
    assert roofline.decode_flops(shape, 2, 9000) == roofline.decode_flops(shape, 2, 4096)


def test_decode_flops_are_those_of_the_products():
    shape = PUBLISHED["Llama-3-8B"][1]
    norms, embedding = (2 * 32 + 1) * 4096, 128256 * 4096
    products = 8_030_261_248 - norms - embedding
    assert roofline.decode_flops(shape, 5, 0) == 2 * 5 * products
    assert roofline.decode_flops(shape, 5, 100) == 2 * 5 * products + 5 * 32 * 4 * 100 * 32 * 128


# --- the books ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "memory", "latency"),
    [
        (1, 26_869_760_000, 0.008020823880597015),
        (64, 79_717_990_400, 0.02379641504477612),
        (256, 240_779_264_000, 0.0718744071641791),
    ],
)
def test_the_lecture_table_of_llama_2_13b_on_an_h100_comes_out(rows, memory, latency):
    # Stanford CS336 lecture 10: S = 1024, norms ignored, everything read once
    shape = PUBLISHED["Llama-2-13B"][1]
    norms = (2 * 40 + 1) * 5120
    moved = roofline.weight_bytes(shape, "bfloat16") - 2 * norms + roofline.cache_bytes(shape, rows, 1024, "bfloat16")
    assert moved == memory
    assert roofline.limit_seconds(moved, 0, roofline.CHIPS["H100"]) == pytest.approx(latency, rel=1e-14)


def test_the_scaling_book_table_of_a_13b_on_eight_v5e_comes_out():
    # "How to Scale Your Model", inference: 26 GB of weights, 6.7 GB of cache a row
    chip = roofline.CHIPS["TPU v5e"]
    steps = [1e3 * roofline.limit_seconds(26e9 + rows * 6.7e9, 0, chip, 8) for rows in (1, 8, 16, 32, 64, 240)]
    assert [round(step, 2) for step in steps] == [4.98, 12.13, 20.30, 36.65, 69.33, 249.09]


def test_the_ridge_of_the_roofline_lies_where_the_books_say():
    ridge = {name: chip.flops / chip.bandwidth for name, chip in roofline.CHIPS.items()}
    assert round(ridge["H100"], 2) == 295.22
    assert round(ridge["TPU v5e"]) == 240


def test_the_limit_is_the_slower_of_memory_and_arithmetic():
    chip = roofline.Chip(flops=100.0, bandwidth=10.0, memory=1.0)
    assert roofline.limit_seconds(50, 100, chip) == 5
    assert roofline.limit_seconds(5, 1000, chip, num_chips=2) == 5
    assert roofline.share_of_limit(20.0, 50, 100, chip) == 0.25


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_chip_is_known_by_the_name_that_jax_gives_it(kind, name):
    assert roofline.chip(kind) == (roofline.CHIPS[name] if name else None)
