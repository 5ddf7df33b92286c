"""Bytes of caches: against the arrays that are made, a row that is filled token by token, and what is published."""

import jax
import pytest
from published import MIXED, SHAPES

from jaxinfer import cache, roofline
from jaxinfer.roofline import CacheKind

GEMMA = SHAPES["Gemma-3-1B"]
LOCAL, GLOBAL = GEMMA.layers[0].replace(window=512), GEMMA.layers[0]
GEMMA = GEMMA.replace(layers=tuple(GLOBAL if (i + 1) % 6 == 0 else LOCAL for i in range(26)))  # 4 see everything


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_cache_bytes_are_those_of_the_cache_that_is_made(dtype):
    made = jax.eval_shape(lambda: cache.init_cache(MIXED, 3, 29, "dense", dtype=dtype))
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.layers))
    assert roofline.cache_bytes(MIXED, 3, 29, dtype) == arrays


@pytest.mark.parametrize("kind", ["dense", "none", "auto", "int8", "dense+float8", "ring:window=9"])
def test_cache_bytes_are_those_that_the_cache_room_counts(kind):
    lengths = 3 * 4  # which that room keeps beside the keys and values
    counted = cache.cache_bytes(MIXED, 3, 29, kind, dtype="bfloat16") - lengths
    assert roofline.cache_bytes(MIXED, 3, 29, "bfloat16", kind) == counted
    assert (counted > 0) == (kind != "none")


@pytest.mark.parametrize(
    ("name", "published"),
    [("Llama-2-7B", 512 * 1024), ("Llama-2-13B", 800 * 1024), ("Llama-3-8B", 128 * 1024), ("Llama-3-70B", 320 * 1024)],
)
def test_a_token_has_the_bytes_that_are_published_in_16_bits(name, published):
    assert roofline.cache_bytes(SHAPES[name], 1, 1) == published


def test_grouped_heads_divide_the_cache_and_one_head_divides_it_most():
    shape = SHAPES["Llama-3-8B"]

    def heads(K):
        layer = shape.layers[0].replace(num_kv_heads=K)
        return roofline.cache_bytes(shape.replace(layers=(layer,) * 32), 2, 100)

    assert heads(32) == 4 * heads(8) == 32 * heads(1)


def test_a_ring_keeps_the_window_of_local_layers_and_all_of_global_ones():
    token = 2 * 1 * 256 * 2  # of one layer
    for length in (1, 511, 512, 513, 10_000):
        kept = 22 * min(length, 512) + 4 * length
        assert roofline.cache_bytes(GEMMA, 1, length, kind="ring") == kept * token
    assert roofline.cache_bytes(GEMMA, 1, 10_000) == 26 * 10_000 * token


@pytest.mark.parametrize("Z", [1, 16, 24])
def test_pages_hold_the_positions_that_are_kept_and_are_counted_whole(Z):
    token = 2 * 1 * 256 * 2
    for length in (1, 15, 16, 17, 511, 512, 513, 530, 1000):
        all_of = len({position // Z for position in range(length)})
        local = len({position // Z for position in range(max(length - 512, 0), length)})
        kind = CacheKind(page=Z, ring=True)
        assert roofline.cache_bytes(GEMMA, 1, length, kind=kind) == (22 * local + 4 * all_of) * Z * token


def test_pages_of_sixteen_waste_less_than_a_page_a_row():
    # Kwon et al. 2023, section 4: only a row's last page is not full
    token = roofline.cache_bytes(SHAPES["Llama-3-8B"], 1, 1)
    for length in range(1, 100):
        waste = roofline.cache_bytes(SHAPES["Llama-3-8B"], 1, length, kind="paged") - length * token
        assert waste % token == 0
        assert waste // token == -length % 16


def test_an_evicting_kind_keeps_its_budget_and_no_more():
    shape, kind = SHAPES["Llama-3-8B"], CacheKind(budget=516, page=16)
    kept = [roofline.cache_bytes(shape, 1, n, kind=kind) // (128 * 1024) for n in (1, 516, 517, 100_000)]
    assert kept == [16, 528, 528, 528]
    assert (
        roofline.decode_bytes(shape, 1, 515)
        == roofline.decode(shape, 1, 9999, "H100", cache=CacheKind(budget=515)).bytes
    )


def test_int8_keeps_a_code_a_number_and_a_scale_a_token_and_head():
    shape = SHAPES["Llama-3-8B"]
    assert roofline.cache_bytes(shape, 3, 100, kind="int8") == 3 * 100 * 32 * 2 * 8 * (128 + 4)
    bare = CacheKind(bits=8)
    assert roofline.cache_bytes(SHAPES["Llama-3-70B"], 1, 1, kind=bare) == 160 * 1024, "published: half of 320 KiB"


def filled(length, K, H, bits=4, group=32, residual=128):
    """Bytes of a layer into which `length` tokens came one by one, each full group coded once `residual` are newer."""
    plain = coded = 0
    for _ in range(length):
        plain += 1
        if plain == residual + group:
            plain, coded = residual, coded + group
    scales = coded // group * H + -(-H // group) * coded  # keys a channel at a time, values a token at a time
    return K * (2 * coded * H * bits / 8 + 4 * scales + 2 * 2 * H * plain)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 300, 1000, 1024])
@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_keeps_what_a_row_has_that_was_filled_token_by_token(length, bits):
    shape = SHAPES["Llama-2-7B"]
    kind = CacheKind(bits=bits, group=32, scale_bits=16, zero_bits=16, residual=128)
    assert roofline.cache_bytes(shape, 2, length, kind=kind) == 2 * 32 * filled(length, 32, 128, bits)
    if bits == 4:
        assert roofline.cache_bytes(shape, 2, length, kind="int4") == 2 * 32 * filled(length, 32, 128)
    narrow = shape.replace(layers=(shape.layers[0].replace(head_width=40),))  # groups of values that are not full
    assert roofline.cache_bytes(narrow, 1, length, kind=kind) == filled(length, 32, 40, bits)


def test_the_tokens_that_a_step_writes_are_what_the_cache_then_holds_more():
    shape, none = SHAPES["Llama-3-8B"], CacheKind(budget=0)
    bare = roofline.forward_bytes(shape, 40, [0], cache=none)  # weights and looked up vectors
    for kind in ("dense", "ring", "int8"):
        written = roofline.forward_bytes(shape, 40, [0], cache=kind) - bare
        assert written == roofline.cache_bytes(shape, 1, 40, kind=kind)
    written = roofline.forward_bytes(shape, 40, [0], cache="int4") - bare
    codes = 32 * 2 * 8 * 40 * (128 / 2 + 4 * 4)
    assert written == roofline.cache_bytes(shape, 1, 40, kind="int4") + codes, "once plain, and later as codes"
    assert roofline.forward_bytes(shape, 40, [0], cache=CacheKind(budget=30)) - bare == roofline.cache_bytes(
        shape, 1, 30
    )


def test_a_kind_that_is_not_known_is_refused_with_the_names_that_are():
    with pytest.raises(
        ValueError, match="cache kind 'dens' is not known: take one of auto, dense, ring, .* none, with"
    ):
        roofline.cache_bytes(MIXED, 1, 1, kind="dens")


# --- by number -----------------------------------------------------------------------------------------------------


def test_a_latent_cache_has_the_bytes_that_are_published_of_deepseek():
    assert roofline.latent_cache_bytes(61, 512, 64) == 70_272  # V3
    assert roofline.latent_cache_bytes(60, 512, 64) == 69_120  # V2
    # DeepSeek-V2, table 9: elements a token, thousands; against the multi-head models of the same table
    assert round(roofline.latent_cache_bytes(60, 512, 64, size=1) / 1e3, 1) == 34.6
    assert round(roofline.latent_cache_bytes(27, 512, 64, size=1) / 1e3, 1) == 15.6
    assert round(roofline.shared_cache_bytes(27, 1, 16, 128, size=1) / 1e3, 1) == 110.6
    assert round(roofline.shared_cache_bytes(60, 1, 56, 128, size=1) / 1e3, 1) == 860.2  # 56 x 128 is what 860.2K is


def test_absorbed_latent_attention_is_that_of_one_shared_head_with_wide_keys_and_narrower_values():
    heads, seen = 128, 1000
    scores = roofline.matmul_flops(heads, 512 + 64, seen)
    values = roofline.matmul_flops(heads, seen, 512)
    assert roofline.latent_attention_flops(heads, 512, 64, seen) == scores + values


def test_layers_that_share_keys_and_values_divide_the_cache():
    # Brandon et al. 2024, figure 3: kB a token of models with 20 layers and one kv head of 128, or of 64
    kilobytes = [roofline.shared_cache_bytes(20, share, 1, H) / 1e3 for share, H in ((1, 128), (2, 128), (1, 64))]
    assert [round(kB, 1) for kB in kilobytes] == [10.2, 5.1, 5.1]
    assert roofline.shared_cache_bytes(7, 3, 2, 8) == 3 * 2 * 2 * 8 * 2, "a last group that is not full keeps its own"
    assert roofline.shared_cache_bytes(32, 1, 8, 128, 100) == roofline.cache_bytes(SHAPES["Llama-3-8B"], 1, 100)
