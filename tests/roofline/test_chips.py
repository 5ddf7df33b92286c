"""The table of chips, and what a caller measured instead."""

import pytest
from published import SHAPES

from jaxinfer import roofline


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


def test_every_chip_has_figures_in_their_units():
    for name, chip in roofline.CHIPS.items():
        assert 100e12 < chip.flops < 3000e12, name
        assert 0.2e12 < chip.bandwidth < 10e12, name
        assert 15e9 < chip.memory < 200e9, name
        assert 30e9 < chip.interconnect < chip.bandwidth, name
        assert chip.rate("int8") in (chip.flops, pytest.approx(2 * chip.flops, rel=3e-3)), name  # v4: no faster


def test_a_chip_that_is_not_known_is_refused_with_the_names_that_are():
    with pytest.raises(ValueError, match="chip 'H300' is not known: take one of A100 40GB, A100, H100, .* TPU v6e, or"):
        roofline.decode(SHAPES["Llama-3-8B"], 1, 100, "H300")


def test_products_in_a_dtype_that_a_chip_has_no_figure_for_are_refused():
    assert roofline.CHIPS["H100"].rate("fp8") == 1979e12
    with pytest.raises(
        ValueError, match="no FLOP/s of fp8 products are known of this chip: take one of bfloat16, int8"
    ):
        roofline.CHIPS["A100"].rate("fp8")
    with pytest.raises(ValueError, match="no FLOP/s of int8 .* take one of bfloat16$"):
        roofline.Chip(1e12, 2e10, 16e9).rate("int8")


def test_a_measured_machine_is_a_chip_like_any_other():
    shape, machine = SHAPES["Llama-3.2-1B"], roofline.Chip(flops=1e11, bandwidth=20e9, memory=8e9)
    limit = roofline.decode(shape, 1, 100, machine)
    assert (limit.bound, limit.fits) == ("memory", True)
    assert limit.seconds == roofline.decode_bytes(shape, 1, 100) / 20e9
    assert roofline.decode(shape, 16, 100, machine).bound == "compute", "this one's ridge is at 5 FLOPs a byte"


def test_the_limit_is_the_slower_of_memory_and_arithmetic():
    chip = roofline.Chip(flops=100.0, bandwidth=10.0, memory=1.0)
    assert roofline.limit_seconds(50, 100, chip) == 5
    assert roofline.limit_seconds(5, 1000, chip, num_chips=2) == 5
    assert roofline.share_of_limit(20.0, 50, 100, chip) == 0.25
