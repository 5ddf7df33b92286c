"""FLOPs and bytes of a pass: against products counted by hand, and against those of the traced forward."""

import jax
import jax.numpy as jnp
import pytest
from published import MIXED, SHAPES

from jaxinfer import kernels, models, roofline
from jaxinfer.cache import init_cache
from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.roofline import CacheKind

LAYER = LayerSpec(num_heads=4, num_kv_heads=2, head_width=8, scale=1.0, ffn_width=48)
TINY = ModelConfig(vocab_size=100, width=32, layers=(LAYER, LAYER.replace(window=3, gated=False)), tied=True)


def traced_flops(jaxpr) -> int:
    """2 m n k of every product in a traced program, and of the programs in it."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (inner, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            k = 1
            for axis in inner:
                k *= left[axis]
            total += 2 * k * equation.outvars[0].aval.size
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            total += traced_flops(inside) if hasattr(inside, "eqns") else 0
    return total


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def test_flops_of_a_tiny_pass_are_those_counted_by_hand():
    # two rows, three new tokens each; one row held two tokens before, the other none
    tokens = 2 * 3
    both = 2 * tokens * (32 * 4 * 8 + 2 * 32 * 2 * 8 + 4 * 8 * 32)  # BTD,NHD->BTNH  BTD,KHD->BTKH twice  BTNH,DNH->BTD
    ffn = 2 * tokens * (3 * 32 * 48) + 2 * tokens * (2 * 32 * 48)  # BTD,FD->BTF  BTF,DF->BTD; the second has no gate
    logits = 2 * 2 * 32 * 100  # BTD,VD->BTV of the last token
    everything = (3 + 4 + 5) + (1 + 2 + 3)  # positions that a token sees, row by row
    windowed = (3 + 3 + 3) + (1 + 2 + 3)
    attention = 2 * 2 * 4 * 8 * (everything + windowed)  # BTKGH,BKSH->BKGTS and BKGTS,BKSH->BTKGH
    assert roofline.forward_flops(TINY, 3, [2, 0], scored=1) == 2 * both + ffn + logits + attention


@pytest.mark.parametrize("shape", [TINY, MIXED.replace(num_positions=0)])
def test_flops_are_those_of_every_product_in_the_traced_forward(shape):
    # which multiplies every token with all S slots, and masks: causal=False
    B, T, S = 2, 5, 12
    shape = shape.replace(dtype="float32")

    def forward(params, ids, cache):
        (hidden, _), _ = models.decoder(params, shape, ids, cache, cache.step(jnp.full(B, T), T))
        return models.logits(params, shape, hidden)

    cache = jax.eval_shape(lambda: init_cache(shape, B, S, "dense", dtype="float32"))
    with kernels.use(kernels.KernelChoice(linear="reference", attention="reference")):
        traced = jax.make_jaxpr(forward)(models.param_shapes(shape), jax.ShapeDtypeStruct((B, T), "int32"), cache)
    assert traced_flops(traced.jaxpr) == roofline.forward_flops(shape, T, [S - T] * B, causal=False)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 100])
def test_pairs_are_those_of_the_mask(window):
    spec = LAYER.replace(window=window)
    for length in range(9):
        for num in range(1, 9):
            queries = range(length, length + num)
            seen = [(q, s) for q in queries for s in range(q + 1) if window is None or s > q - window]
            assert roofline.pairs(spec, num, length) == len(seen)
            assert roofline.pairs(spec, num, length, causal=False) == len(queries) * (length + num)


@pytest.mark.parametrize("shape", [TINY, SHAPES["Mistral-7B"]])
def test_a_pass_of_many_tokens_computes_what_as_many_steps_do(shape):
    steps = sum(roofline.decode_flops(shape, 1, n) for n in range(4090, 4102))
    assert roofline.forward_flops(shape, 12, [4090]) == steps
    chunks = roofline.forward_flops(shape, 7, [4090]) + roofline.forward_flops(shape, 5, [4097])
    assert chunks == steps
    assert roofline.forward_flops(shape, 12, [4090], scored=1) == steps - 11 * 2 * shape.vocab_size * shape.width


def test_decode_flops_are_those_of_the_products():
    shape = SHAPES["Llama-3-8B"]
    norms, embedding = (2 * 32 + 1) * 4096, 128256 * 4096
    products = 8_030_261_248 - norms - embedding
    own = 32 * 4 * 32 * 128  # a token sees itself
    assert roofline.decode_flops(shape, 5, 0) == 5 * (2 * products + own)
    assert roofline.decode_flops(shape, 5, 100) == 5 * (2 * products + 101 * own)
    assert roofline.decode_flops(shape, 2, [7, 30]) == 2 * 2 * products + (8 + 31) * own


def test_heads_that_share_keys_compute_as_much_and_read_less():
    shape = SHAPES["Llama-2-7B"]
    spec, grouped = shape.layers[0], shape.layers[0].replace(num_kv_heads=8)
    assert roofline.attention_flops(spec, 1, 1023) == roofline.attention_flops(grouped, 1, 1023) == 4 * 1024 * 32 * 128
    fewer = shape.replace(layers=(grouped,) * 32)
    assert roofline.cache_bytes(shape, 1, 1023) == 4 * roofline.cache_bytes(fewer, 1, 1023)


def test_what_was_evicted_is_neither_computed_nor_read():
    shape, kind = SHAPES["Llama-3-8B"], CacheKind(budget=512)
    for counted in (roofline.forward_flops, roofline.forward_bytes):
        assert counted(shape, 1, [9000], cache=kind) == counted(shape, 1, [512], cache=kind)
        assert counted(shape, 1, [9000], cache=kind) == counted(shape, 1, [512])
        assert counted(shape, 1, [9000]) > counted(shape, 1, [512])


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_a_step_reads_the_head_but_not_the_embedding():
    untied, tied = SHAPES["Llama-3-8B"], SHAPES["Llama-3.2-1B"]
    table = 128256 * 4096
    assert roofline.decode_bytes(untied, 1, 0) == 2 * (8_030_261_248 - table + 4096 + 32 * 2 * 8 * 128)
    assert roofline.decode_bytes(tied, 1, 0) == 2 * (1_235_814_400 + 2048 + 16 * 2 * 8 * 64)


def test_a_step_reads_the_learned_positions_of_its_tokens_only():
    shape = SHAPES["GPT-2"]
    weights = 124_439_808 - 1024 * 768 + 3 * (768 + 768)
    assert roofline.decode_bytes(shape, 3, 0) == 2 * (weights + 3 * 12 * 2 * 12 * 64)


def test_a_step_reads_what_its_rows_see():
    shape = SHAPES["Llama-3-8B"]

    def bytes_of(rows, length, **options):
        return roofline.decode_bytes(shape, rows, length, **options)

    per_token = 2 * 32 * 2 * 8 * 128
    assert bytes_of(1, 4096) - bytes_of(1, 0) == 4096 * per_token
    assert bytes_of(3, [10, 0, 7]) - bytes_of(3, 0) == 17 * per_token
    assert bytes_of(1, 100, cache_dtype="int8") - bytes_of(1, 0, cache_dtype="int8") == 100 * per_token / 2
    with pytest.raises(ValueError, match="length has 2 entries but there are 3 rows"):
        bytes_of(3, [1, 2])


def test_a_window_bounds_what_is_read_and_computed():
    shape = SHAPES["Mistral-7B"]
    assert roofline.decode_bytes(shape, 2, 9000) == roofline.decode_bytes(shape, 2, 4095)
    assert roofline.decode_bytes(shape, 2, 4095) > roofline.decode_bytes(shape, 2, 4094), "W - 1 old ones are read"
    assert roofline.decode_bytes(shape, 2, 9000, windowed=False) == roofline.decode_bytes(
        shape.replace(layers=(shape.layers[0].replace(window=None),) * 32), 2, 9000
    )
    assert roofline.decode_flops(shape, 2, 9000) == roofline.decode_flops(shape, 2, 4095)


def test_a_prefill_reads_the_weights_once_and_writes_the_cache():
    shape = SHAPES["Llama-3-8B"]
    one, many = roofline.forward_bytes(shape, 1, [0]), roofline.forward_bytes(shape, 1000, [0])
    assert many - one == 999 * (2 * 4096 + 128 * 1024), "the tokens' vectors, their keys and values"


def test_a_paged_step_reads_whole_pages():
    shape, token = SHAPES["Llama-3-8B"], 128 * 1024
    read = [
        roofline.forward_bytes(shape, 1, [n], cache="paged") - roofline.forward_bytes(shape, 1, [0])
        for n in (1, 16, 17)
    ]
    assert read == [16 * token, 16 * token, 32 * token]
