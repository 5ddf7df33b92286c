"""The published tables of inference arithmetic, to all digits, and by which approximation each of them was made.

The lecture: Stanford CS336, spring 2025, lecture_10.py and its trace var/traces/lecture_10.json (commit bbdbc9c).
The book: "How to Scale Your Model" (Austin et al. 2025), parts 2, 7 and 8 (commit 0819a7d).
"""

import math

import pytest
from published import SHAPES, config

from jaxinfer import roofline
from jaxinfer.roofline import Chip

H100, V5E = roofline.CHIPS["H100"], roofline.CHIPS["TPU v5e"]
GROUPED_13B = config(5120, 13824, 40, 8, 128, 40, 32000)  # the lecture's K = 8, parameters not held constant
BARE = roofline.CacheKind(bits=8)  # int8 without scales, as the book counts
LECTURE = {40: SHAPES["Llama-2-13B"], 8: GROUPED_13B}


def same(number, published):
    """Equal but for the last bit of a float: the lecture itself gives one latency in two ways that differ by it."""
    return math.isclose(number, published, rel_tol=2**-52)


def without_norms(shape):
    """The lecture's parameters: 2 V D + 3 D F L + (2 D N H + 2 D K H) L."""
    return roofline.params_count(shape) - (2 * len(shape.layers) + 1) * shape.width


def everything_read_once(shape, rows, length):
    """The lecture's bytes of a step: all parameters but norms, the embedding too, and the cache of the whole length."""
    return 2 * without_norms(shape) + roofline.cache_bytes(shape, rows, length)


def step_of_the_book(rows, cache, params, param_bytes, chip, chips):
    """Its general step time (part 7): attention waits for memory, the rest for two FLOPs a parameter or for memory."""
    reading = rows * cache / (chips * chip.bandwidth)
    return reading + max(2 * rows * params / (chips * chip.flops), param_bytes / (chips * chip.bandwidth))


# --- intensities ---------------------------------------------------------------------------------------------------


def test_the_ridge_of_the_roofline_lies_where_the_books_say():
    assert H100.ridge == 295.2238805970149  # the lecture's trace
    assert round(V5E.ridge) == 240
    assert round(roofline.critical_batch(SHAPES["Llama-2-13B"], V5E, "int8")) == 120, "int8 weights, bfloat16 products"


def test_the_intensity_of_a_product_is_the_lectures():
    B, D, F = 7, 320, 1280
    intensity = roofline.matmul_flops(B, D, F) / roofline.matmul_bytes(B, D, F)
    assert intensity == pytest.approx(B * D * F / (B * D + B * F + D * F), rel=1e-15)
    wide = roofline.matmul_flops(B, 10**9, 10**9) / roofline.matmul_bytes(B, 10**9, 10**9)
    assert wide == pytest.approx(B, rel=1e-7), "B, as D and F grow"
    assert roofline.matmul_flops(1, D, F) / roofline.matmul_bytes(1, D, F) < 1


def test_the_intensity_of_a_gated_mlp_is_the_lectures_which_writes_what_it_multiplies_but_reads_it_once():
    B, T, D, F = 3, 5, 64, 256
    flops = 2 * roofline.matmul_flops(B * T, D, F) + roofline.matmul_flops(B * T, F, D)
    moved = 2 * roofline.matmul_bytes(B * T, D, F) + roofline.matmul_bytes(B * T, F, D)
    moved -= 2 * B * T * D + 2 * B * T * F  # X once for both, and G x U not again
    assert flops == 6 * B * T * D * F
    assert moved == 4 * B * T * D + 4 * B * T * F + 6 * D * F
    assert flops / moved == pytest.approx(3 * B * D * F * T / (2 * B * D * T + 2 * B * F * T + 3 * D * F), rel=1e-15)


@pytest.mark.parametrize(("S", "T"), [(1024, 1024), (1024, 1), (1000, 8)])
def test_the_intensity_of_attention_is_the_lectures_where_every_token_meets_every_position(S, T):
    spec, D = SHAPES["Llama-2-13B"].layers[0], 5120  # N H = D
    flops = roofline.attention_flops(spec, T, S - T, causal=False)
    kept = roofline.cache_bytes(SHAPES["Llama-2-13B"].replace(layers=(spec,)), 1, S)
    moved = kept + 2 * (2 * T * D)  # and q and the answer
    assert flops == 4 * S * T * D
    assert moved == 4 * S * D + 4 * T * D
    assert flops / moved == S * T / (S + T)
    assert roofline.attention_flops(spec, S, 0, causal=False) / roofline.attention_flops(spec, S, 0) == 2 * S / (S + 1)


def test_grouped_heads_multiply_the_intensity_of_decoding_attention():
    S, N, K, H = 1024, 32, 8, 128
    flops, kept = roofline.attention_flops(SHAPES["Llama-3-8B"].layers[0], 1, S - 1), 4 * S * K * H
    assert flops == 4 * S * N * H
    assert flops / (kept + 4 * N * H) == pytest.approx(N / K, rel=0.005)


# --- the lecture's 13B on an H100 ----------------------------------------------------------------------------------


def test_the_lectures_parameters_come_out_norms_left_out():
    assert without_norms(LECTURE[40]) == 13_015_449_600
    assert without_norms(LECTURE[8]) == 11_337_728_000


def test_the_lectures_formulas_in_the_batch_come_out_to_their_fifteen_digits():
    per_row, weights = roofline.cache_bytes(LECTURE[40], 1, 1024), 2 * without_norms(LECTURE[40])
    assert (per_row, weights) == (838_860_800, 26_030_899_200)
    assert f"{per_row / H100.bandwidth:.15g}" == "0.000250406208955224"
    assert f"{weights / H100.bandwidth:.15g}" == "0.00777041767164179"
    assert per_row * 993 == weights * 32
    assert f"{H100.bandwidth * 32 / per_row:.15g}" == "127792.358398438"


@pytest.mark.parametrize(
    ("K", "rows", "memory", "latency", "throughput"),
    [
        (40, 1, 26_869_760_000, 0.008020823880597015, 124.6754716082317),
        (40, 64, 79_717_990_400, 0.02379641504477612, 2689.480742354489),
        (40, 64, 79_717_990_400, 0.023796415044776118, 2689.480742354489),
        (40, 256, 240_779_264_000, 0.0718744071641791, 3561.7685084376703),
        (8, 64, 33_412_874_240, 0.00997399231044776, 6416.688323787855),
        (8, 256, 65_625_128_960, 0.01958959073432836, 13068.164795877605),
    ],
)
def test_the_lectures_table_of_a_13b_on_an_h100_comes_out_everything_read_once(K, rows, memory, latency, throughput):
    moved = everything_read_once(LECTURE[K], rows, 1024)
    seconds = roofline.limit_seconds(moved, 0, H100)
    assert moved == memory
    assert same(seconds, latency)
    assert same(rows / seconds, throughput)
    assert (moved <= H100.memory) == ((K, rows) != (40, 256)), "doesn't fit into memory"


@pytest.mark.parametrize(
    ("K", "table"),
    [
        (
            40,
            {8: ("9.7737", "818.53"), 16: ("11.777", "1358.59"), 32: ("15.783", "2027.44"), 128: ("39.82", "3214.27")},
        ),
        (
            8,
            {
                1: ("6.819", "146.65"),
                8: ("7.169", "1115.85"),
                16: ("7.570", "2113.58"),
                32: ("8.371", "3822.54"),
                128: ("13.18", "9712.28"),
            },
        ),
    ],
)
def test_the_lectures_formula_at_other_batches_is_what_was_worked_out_before(K, table):
    for rows, (milliseconds, throughput) in table.items():
        seconds = roofline.limit_seconds(everything_read_once(LECTURE[K], rows, 1024), 0, H100)
        digits = len(milliseconds.partition(".")[2])
        assert (f"{1e3 * seconds:.{digits}f}", f"{rows / seconds:.2f}") == (milliseconds, throughput)


@pytest.mark.parametrize(("K", "rows"), [(40, 1), (40, 64), (8, 64)])
def test_our_own_step_of_the_lectures_model_is_faster_by_the_embedding_that_is_not_read(K, rows):
    shape = LECTURE[K]
    limit = roofline.decode(shape, rows, 1024, "H100")
    norms, table = 2 * (2 * 40 + 1) * 5120, 2 * 32000 * 5120
    new = roofline.cache_bytes(shape, rows, 1) + rows * 2 * 5120  # written, and looked up
    assert limit.bytes == everything_read_once(shape, rows, 1024) + norms - table + new
    assert limit.bound == "memory"


# --- the book's 13B on eight v5e -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "memory", "total", "steps", "throughput"),
    [
        (
            6.7,
            [6.7, 53.6, 107.2, 214.4, 428.8, 1608],
            [32.7, 79.6, 133.2, 240.4, 454.8, 1634],
            [4.98, 12.13, 20.30, 36.65, 69.33, 249.09],
            [200.61, 659.30, 787.99, 873.21, 923.13, 963.53],
        ),
        (
            1.34,
            [1.34, 10.72, 21.44, 42.88, 85.76, 321.6],
            [27.34, 36.72, 47.44, 68.88, 111.76, 347.6],
            [4.17, 5.60, 7.23, 10.50, 17.04, 52.99],
            [239.94, 1429.19, 2212.48, 3047.62, 3756.62, 4529.34],
        ),
    ],
)
def test_the_books_tables_of_a_13b_on_eight_v5e_come_out_of_its_rounded_26_and_6_7_gb(
    cache, memory, total, steps, throughput
):
    batches = (1, 8, 16, 32, 64, 240)
    seconds = [roofline.limit_seconds((26 + rows * cache) * 1e9, 0, V5E, 8) for rows in batches]
    assert [round(rows * cache, 2) for rows in batches] == memory
    assert [round(26 + rows * cache, 2) for rows in batches] == total
    assert [round(1e3 * step, 2) for step in seconds] == steps
    assert [round(rows / step, 2) for rows, step in zip(batches, seconds, strict=True)] == throughput


def test_the_books_26_and_6_7_gb_are_our_counts_rounded():
    shape = SHAPES["Llama-2-13B"]
    assert round(roofline.weight_bytes(shape) / 1e9) == 26
    assert round(roofline.cache_bytes(shape, 1, 8192) / 1e9, 1) == 6.7
    assert round(roofline.cache_bytes(GROUPED_13B, 1, 8192) / 1e9, 2) == 1.34


def test_our_own_step_of_the_books_model_is_a_percent_from_its_table():
    published = {1: 4.98, 8: 12.13, 16: 20.30, 32: 36.65, 64: 69.33, 240: 249.09}
    for rows, milliseconds in published.items():
        limit = roofline.decode(SHAPES["Llama-2-13B"], rows, 8192, "TPU v5e", {"tensor": 8})
        assert 1e3 * limit.memory_seconds == pytest.approx(milliseconds, rel=0.012)
        assert limit.fits == (rows <= 8), "128 GB of HBM: the book says up to 16, whose own total is 133.2"


# --- the book's worked problems --------------------------------------------------------------------------------------


def test_the_books_pop_quiz_comes_out_of_two_flops_a_parameter_its_digits_cut():
    chip = Chip(flops=1.97e14, bandwidth=8.1e11, memory=16e9)  # as the book has it there
    kept = 100e3 * 8192
    small, large = (1e3 * step_of_the_book(rows, kept, 30e9, 30e9, chip, 16) for rows in (4, 256))
    assert math.floor(10 * small) / 10 == 2.5  # 2.568: cut, not rounded
    assert round(large) == 21


def test_the_books_first_worked_question_comes_out():
    shape = config(4096, 16384, 32, 8, 256, 64, 32128, tied=True)
    assert round(without_norms(shape) / 1e9, 1) == 18.4
    assert without_norms(shape) == 64 * 4096 * (3 * 16384 + 2 * 256 * (32 + 8)) + 4096 * 32128
    assert roofline.cache_bytes(shape, 1, 1, "int8") == 262_144


def test_the_books_llama_70b_in_int8_comes_out_of_its_rounded_sizes():
    chip = Chip(flops=1.97e14, bandwidth=8.1e11, memory=16e9)
    kept = 160e3 * 8192 * 32
    assert round(kept / 1e9, 1) == 41.9
    assert round((kept + 70e9) / 1e9) == 112
    assert round(1e3 * roofline.limit_seconds(112e9, 0, chip, 8)) == 17
    ours = roofline.decode(SHAPES["Llama-3-70B"], 32, 8192, chip=V5E, axes={"tensor": 8}, weights="int8", cache=BARE)
    assert 1e3 * ours.memory_seconds == pytest.approx(17, rel=0.01)


def test_the_books_matmul_over_32_chips_comes_out_its_digits_cut():
    B, D, F, Y = 64, 8192, 28672, 32
    sending = 2 * B * D / V5E.interconnect  # one all-gather of a long ring
    reading = 2 * D * F / (Y * 8.1e11)
    computing = roofline.matmul_flops(B, D, F) / (Y * V5E.flops)
    assert [int(1e6 * seconds) for seconds in (sending, reading, computing)] == [11, 18, 4]


def test_the_books_prefill_comes_out_of_two_flops_a_parameter_at_40_percent():
    seconds = roofline.limit_seconds(0, 2 * 70e9 * 8192, V5E, 16) / 0.4
    assert round(seconds, 2) == 0.91


def test_two_flops_a_parameter_leave_attention_out_and_count_norms_and_embeddings():
    shape, T = SHAPES["Llama-3-8B"], 8192
    approximate = 2 * roofline.params_count(shape) * T
    norms, table = (2 * 32 + 1) * 4096, 128256 * 4096
    attention = 32 * 4 * 32 * 128 * (T * (T + 1) // 2)
    exact = roofline.forward_flops(shape, T, [0])
    assert exact == approximate - 2 * T * (norms + table) + attention
    assert attention == pytest.approx(4 * 32 * 32 * 128 * T**2 / 2, rel=1 / T), "half the square, but for the diagonal"
