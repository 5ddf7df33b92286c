"""How long a pass takes at least: what bounds it, on one chip and on meshes."""

import jax
import pytest
from published import SHAPES

from jaxinfer import mesh, models, roofline
from jaxinfer.roofline import CHIPS, CacheKind, Chip, Packed
from jaxinfer.testing import tiny_config

SHAPE, H100 = SHAPES["Llama-3-8B"], CHIPS["H100"]


def test_a_limit_says_what_the_counts_and_the_chip_say():
    limit = roofline.decode(SHAPE, 4, [10, 20, 30, 40], "H100")
    assert limit.flops == roofline.decode_flops(SHAPE, 4, [10, 20, 30, 40])
    assert limit.bytes == roofline.decode_bytes(SHAPE, 4, [10, 20, 30, 40])
    assert limit.held == roofline.weight_bytes(SHAPE) + roofline.cache_bytes(SHAPE, 1, 104)
    assert limit.intensity == limit.flops / limit.bytes
    assert (limit.memory_seconds, limit.compute_seconds) == (limit.bytes / 3.35e12, limit.flops / 989e12)
    assert (limit.sent, limit.communication_seconds) == (0, 0)
    assert limit.seconds == limit.latency == limit.memory_seconds
    assert limit.tokens_per_second == 4 / limit.seconds
    assert limit.share(2 * limit.seconds) == 0.5


def test_decoding_waits_for_memory_and_a_prefill_for_arithmetic():
    for name, chip in CHIPS.items():
        assert roofline.decode(SHAPE, 1, 1000, name).bound == "memory"
        first = roofline.prefill(SHAPE, 1, 4096, name)
        assert first.bound == "compute"
        assert first.seconds == first.flops / chip.flops
        assert first.latency == pytest.approx(first.seconds / 4096)


def test_a_prefill_scores_one_token_a_row_and_scoring_scores_all():
    first, scoring = roofline.prefill(SHAPE, 2, 100, "H100"), roofline.forward(SHAPE, 2, 100, 0, "H100")
    assert first.flops == roofline.forward_flops(SHAPE, 100, [0, 0], scored=1)
    assert scoring.flops - first.flops == 2 * 99 * 2 * 4096 * 128256
    assert scoring.bytes == first.bytes
    assert first.tokens == scoring.tokens == 200


@pytest.mark.parametrize(
    ("weights", "math", "ridges"),
    [
        ("bfloat16", "bfloat16", 1),
        ("int8", "bfloat16", 1 / 2),
        ("int8", "int8", 1979 / 989 / 2),
        ("int4", "bfloat16", 1 / 4),
    ],
)
def test_the_critical_batch_is_the_ridge_times_the_bytes_of_a_weight_over_two(weights, math, ridges):
    critical = roofline.critical_batch(SHAPE, "H100", weights, math)
    assert critical == pytest.approx(ridges * H100.ridge, rel=1e-12)
    assert roofline.decode(SHAPE, 3, 100, "H100", weights=weights, math=math).critical_batch == critical


def test_below_the_critical_batch_arithmetic_waits_for_weights_and_above_weights_for_arithmetic():
    critical = roofline.critical_batch(SHAPE, "H100")
    below, above = (roofline.forward(SHAPE, 1, int(critical) + n, 0, "H100") for n in (-20, 20))
    assert (below.bound, above.bound) == ("memory", "compute")


def test_the_scales_of_packed_weights_raise_the_critical_batch():
    bare, packed = Packed(bits=4, scale_bits=0), Packed(bits=4, group=32)
    assert roofline.critical_batch(SHAPE, H100, bare) < roofline.critical_batch(SHAPE, H100, packed)
    whole = roofline.critical_batch(SHAPE, H100, Packed(bits=4, group=32, head=True))
    assert whole == pytest.approx(H100.ridge * 4.5 / 16)


def test_verifying_five_tokens_costs_little_more_than_one_until_the_critical_batch():
    def cost(rows):
        return roofline.forward(SHAPE, rows, 5, 100, "H100").seconds / roofline.decode(SHAPE, rows, 100, "H100").seconds

    assert 1 < cost(1) < 1.001
    assert 1 < cost(32) < 1.01
    assert cost(512) > 4


def test_fewer_bits_make_steps_faster_and_no_fewer_flops():
    plain = roofline.decode(SHAPE, 8, 4096, "H200")
    packed = roofline.decode(SHAPE, 8, 4096, "H200", weights=Packed(bits=4, group=128, zero_bits=4), cache="int8")
    assert packed.flops == plain.flops
    assert plain.seconds / packed.seconds > 2
    assert packed.held < plain.held / 2


def test_products_in_eight_bits_take_half_the_time_where_the_chip_has_them():
    plain, eight = (roofline.prefill(SHAPE, 1, 4096, "H200", math=math) for math in ("bfloat16", "fp8"))
    assert plain.seconds / eight.seconds == pytest.approx(1979 / 989)
    assert eight.flops == plain.flops


def test_a_model_fits_or_does_not():
    assert roofline.decode(SHAPES["Llama-3-70B"], 1, 100, "H200").fits is False
    assert roofline.decode(SHAPES["Llama-3-70B"], 1, 100, "H100", {"tensor": 2}).fits is True
    assert roofline.decode(SHAPES["Llama-3-70B"], 1, 100, "H100", weights="int8").fits is True
    assert roofline.decode(SHAPES["Llama-3-70B"], 64, 8192, "H100", weights="int8").fits is False


# --- meshes --------------------------------------------------------------------------------------------------------


def test_over_tensor_each_chip_has_its_part_of_weights_heads_and_cache():
    one, eight = (roofline.decode(SHAPE, 16, 2000, "H100", axes) for axes in (None, {"tensor": 8}))
    assert eight.flops * 8 == one.flops
    norms, looked_up = (2 * 32 + 1) * 4096 * 2, 16 * 4096 * 2  # which every chip reads whole
    assert (eight.bytes - norms - looked_up) * 8 == one.bytes - norms - looked_up
    assert (eight.held - norms) * 8 == one.held - norms
    assert eight.critical_batch == pytest.approx(one.critical_batch)


def test_over_data_each_chip_has_its_rows_and_all_weights():
    four = roofline.decode(SHAPE, 16, 2000, "H100", {"data": 4})
    alone = roofline.decode(SHAPE, 4, 2000, "H100")
    assert (four.flops, four.bytes, four.held, four.seconds) == (alone.flops, alone.bytes, alone.held, alone.seconds)
    assert four.tokens_per_second == 4 * alone.tokens_per_second
    assert four.critical_batch == 4 * alone.critical_batch
    assert four.sent == 0


def test_over_data_the_slowest_chip_is_waited_for():
    lengths = [10, 10, 10, 9000, 10]
    limit = roofline.decode(SHAPE, 5, lengths, "H100", {"data": 2})
    assert limit.seconds == roofline.decode(SHAPE, 2, [9000, 10], "H100").seconds, "three rows here, two there"
    assert limit.tokens_per_second == 5 / limit.seconds


def test_over_seq_each_chip_reads_its_positions_and_all_weights():
    one, four = (roofline.decode(SHAPE, 2, 31_999, "H100", axes) for axes in (None, {"seq": 4}))
    weights = roofline.decode(SHAPE, 2, 0, "H100").bytes
    assert (four.bytes - weights) * 4 == one.bytes - weights
    assert (four.held - roofline.weight_bytes(SHAPE)) * 4 == one.held - roofline.weight_bytes(SHAPE)
    products = roofline.forward_flops(SHAPE, 1, [0, 0], cache=CacheKind(budget=0)) - 2 * 32 * 4 * 32 * 128
    assert (four.flops - products) * 4 == one.flops - products
    assert four.sent > 0


@pytest.mark.parametrize("qk_norm", ["none", "projection"])
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"seq": 4}, {"data": 2, "seq": 2, "tensor": 2}])
def test_what_is_sent_is_what_the_layers_must(axes, qk_norm):
    # the table that tests/mesh/test_programs_on_meshes.py holds compiled programs to, each sum sent round a ring
    shape = tiny_config(num_heads=4, num_kv_heads=2, ffn_width=52, vocab_size=102, qk_norm=qk_norm)
    tensor, seq, data = (axes.get(name, 1) for name in ("tensor", "seq", "data"))
    D, L, N, H = 36, 2, 4, 10
    over_tensor = D + 2 * D * L + 2 * L * (qk_norm == "projection")
    over_seq = L * (N // tensor) * (H + 2)
    rows = 8 // data
    sent = 4 * rows * (2 * (tensor - 1) / tensor * over_tensor + 2 * (seq - 1) / seq * over_seq)
    assert roofline.decode(shape, 8, 20, "H100", axes).sent == sent


def test_a_mesh_may_wait_for_what_its_chips_send():
    limit = roofline.decode(SHAPE, 256, 100, "H100", {"tensor": 8})
    assert limit.bound == "communication"
    assert limit.seconds == limit.sent / 450e9
    assert roofline.decode(SHAPE, 1, 100, "H100", {"tensor": 8}).bound == "memory"


def test_a_mesh_that_does_not_divide_is_refused_and_the_arranged_config_is_not():
    with pytest.raises(
        ValueError, match="K = 8 does not divide over tensor = 16: take another mesh, or the config that"
    ):
        roofline.decode(SHAPE, 1, 100, "TPU v5e", {"tensor": 16})
    with pytest.raises(ValueError, match="V = 50257 does not divide over tensor = 2"):
        roofline.prefill(SHAPES["GPT-2"], 1, 100, "H100", {"tensor": 2})
    wide = models.arrange_config(SHAPE, jax.sharding.AbstractMesh((16,), ("tensor",)))
    spread, narrow = (
        roofline.decode(wide, 1, 9000, "TPU v5e", {"tensor": 16}),
        roofline.decode(SHAPE, 1, 9000, "TPU v5e"),
    )
    assert narrow.bytes / 16 < spread.bytes < narrow.bytes / 14, "keys and values lie twice"


def test_rows_that_do_not_divide_are_padded_as_the_cache_pads_them():
    assert roofline.decode(SHAPE, 5, 100, "H100", {"data": 4}).bytes == roofline.decode_bytes(SHAPE, 2, 100)
    assert roofline.decode(SHAPE, 1, 100, "H100", {"data": 4}).bytes == roofline.decode_bytes(SHAPE, 1, 100)


# --- what cannot be asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (
            lambda: roofline.decode(SHAPES["GPT-2"], 2, [5, 1024], "H100"),
            "would hold 1025 tokens but the model has 1024",
        ),
        (lambda: roofline.prefill(SHAPES["GPT-2"], 1, 2000, "H100"), "would hold 2000 tokens but the model has 1024"),
        (lambda: roofline.decode(SHAPE, 2, [5], "H100"), "length has 1 entries but there are 2 rows"),
        (lambda: roofline.decode(SHAPE, 0, 5, "H100"), "a pass of 1 tokens for 0 rows does nothing"),
        (lambda: roofline.prefill(SHAPE, 1, 0, "H100"), "a pass of 0 tokens for 1 rows does nothing"),
        (lambda: roofline.decode(SHAPE, 1, -1, "H100"), "lengths 0"),
        (lambda: roofline.forward(SHAPE, 1, 4, 0, "H100", scored=5), "5 of 4 new tokens cannot be scored"),
        (
            lambda: roofline.decode(SHAPE, 1, 5, "H100", {"model": 2}),
            "mesh axis model = 2 cannot be: take some of data",
        ),
        (lambda: roofline.decode(SHAPE, 1, 5, "H100", {"tensor": 0}), "mesh axis tensor = 0 cannot be"),
        (
            lambda: roofline.decode(SHAPE, 1, 5, Chip(1e12, 1e11, 1e9), {"seq": 2}),
            "interconnect is not known, and mesh",
        ),
        (lambda: roofline.decode(SHAPE, 1, 5, "H100", cache="dens"), "cache kind 'dens' is not known"),
        (lambda: roofline.decode(SHAPE, 1, 5, "A100", math="fp8"), "no FLOP/s of fp8 products"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(ask, sentence):
    with pytest.raises(ValueError) as refused:
        ask()
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_last_learned_position_may_be_filled():
    assert roofline.decode(SHAPES["GPT-2"], 1, 1023, "H100").tokens == 1


def test_the_axes_of_a_limit_are_those_of_the_mesh_room():
    assert {mesh.RULES[letter] for letter in "BSNKFV"} == {"data", "seq", "tensor"}
