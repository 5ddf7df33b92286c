"""scripts/bench.py: what it measures adds up, and what it cannot measure it refuses in one line."""

import json
import pathlib

import bench
import pytest
from suites import attention, matmul

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(capsys, monkeypatch, little):
    """Runs it on little; gives the lines of stdout and the JSON."""
    for suite in (attention, matmul):
        monkeypatch.setattr(suite, "DISTINCT", 1 << 12)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["bench.py", *words])
        bench.main(bench.parse_args([*words, "--rounds", "2", "--json"]))
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)

    return run


def test_attention_is_measured_over_what_is_valid(run, tmp_path):
    where = tmp_path / "new" / "attention.json"
    lines, told = run(
        "attention", "--rows", "2", "--valid", "8", "16", "--allocated", "16", "--heads", "4", "--kv-heads", "2",
        "--head-dim", "16", "--dtype", "float32", "int8", "--out", str(where),
    )  # fmt: skip
    assert json.loads(where.read_text()) == told and told["suite"] == "attention"
    assert told["command"].startswith("python scripts/bench.py attention") and "attention.json" in told["command"]
    assert str(tmp_path) not in told["command"]
    assert told["queries"] == "bfloat16"
    assert len(told["results"]) == 8 and len(told["ceilings"]["products"]) == 3
    assert len([line for line in lines if " of the ceiling, " in line]) == 8
    for line in told["results"]:
        one = 16 * 4 if line["dtype"] == "float32" else 16 + 4  # bytes of a vector
        moved = 2 * 2 * 2 * line["valid"] * one
        assert line["gb_per_second"] == pytest.approx(moved / line["ms"]["median"] / 1e6, rel=0.05, abs=0.006)
        assert line["share"] == pytest.approx(line["gb_per_second"] / told["ceilings"]["read"]["rate"], abs=1e-3)
        beside = max(line["plain_read"] - 0.005, 1e-9)  # as it was before it was rounded, or less
        assert 0 <= line["share_beside"] <= min(1, line["gb_per_second"] / beside + 1e-3)
        assert line["ms"]["min"] <= line["ms"]["median"] <= line["ms"]["max"]


def test_room_that_is_empty_is_compared_with_none_in_the_same_rounds(run):
    words = "--rows 2 --valid 8 16 --allocated 8 32 --heads 4 --kv-heads 2 --head-dim 16 --dtype float32"
    lines, told = run("attention", *words.split())
    took = {(x["valid"], x["allocated"], x["kernel"]): x for x in told["results"]}
    assert len(took) == 6
    for (valid, room, kernel), line in took.items():
        over = line["over_packed"]
        if room == valid or valid == 16:  # 16 valid and allocated was not measured
            assert over is None
            continue
        packed = took[valid, valid, kernel]["ms"]["median"]
        assert over["ratio"] == pytest.approx(line["ms"]["median"] / packed, rel=0.1)
        assert over["min"] <= over["median"] <= over["max"]
    assert len([line for line in lines if " times what 8 of 8 take " in line]) == 2


def test_caches_that_do_not_fit_at_once_are_refused_before_any_is_made(monkeypatch, little):
    words = "attention --rows 1 --valid 8 16 --heads 4 --kv-heads 2 --head-dim 16 --dtype float32"
    monkeypatch.setattr(attention, "DISTINCT", 1 << 12)
    held = 2 * 4096 + 2 * 4 + 2 * 2 * 16 * 16 * 4 + (1 << 16)  # two caches with lengths, a layer widened, the read
    for free in (held, held - 1):
        monkeypatch.setattr("jaxinfer.kernels.free_memory", lambda free=free: free)
        if free == held:
            bench.attention.check_memory(bench.parse_args(words.split()), [(8, 8), (16, 16)], "float32")
            continue
        with pytest.raises(ValueError, match="the float32 caches of 2 shapes, measured in turns, need .* at once but"):
            bench.main(bench.parse_args(words.split()))


def test_products_are_measured_in_every_form(run):
    lines, told = run("matmul", "--shape", "64x32", "--rows", "1", "3", "--form", "bfloat16", "int4:group=32")
    assert len(told["results"]) == 8 and len([line for line in lines if " GFLOP/s, " in line]) == 8
    for line in told["results"]:
        size = 64 * 32 * 2 if line["form"] == "bfloat16" else 64 * 32 // 2 + 64 // 32 * 32 * 2
        assert line["gb_per_second"] == pytest.approx(size / line["ms"]["median"] / 1e6, rel=0.05, abs=0.006)
        math = told["ceilings"]["products"]["bfloat16" if line["form"] == "bfloat16" else "float32"]["rate"]
        assert line["share_of_products"] == pytest.approx(line["gflops_per_second"] / math, abs=1e-3)
        flops = 2 * 64 * 32 * line["rows"]
        assert line["gflops_per_second"] == pytest.approx(flops / line["ms"]["median"] / 1e6, rel=0.05, abs=0.06)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("attention --heads 7", "--heads is 7: it must be a multiple of --kv-heads 8"),
        ("attention --valid 64 --allocated 32", "there must be room for --valid 64"),
        ("matmul --shape 2x", "--shape is 2x: write inputs x outputs"),
        ("matmul --form int7", "'int7': take int8, int4"),
        ("peers --shape nowhere.toml", "nowhere.toml is no file"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        bench.main(bench.parse_args(words.split()))


@pytest.mark.parametrize(
    "words", ["attention --valid 512 0", "matmul --rows -1", "attention --rounds 0", "peers", "nothing"]
)
def test_a_command_line_that_says_nothing_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_args(words.split())
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


def test_in_what_was_found_the_kernels_are_ahead_of_what_xla_makes():
    found = json.loads((BENCHMARKS / "cpu" / "attention.json").read_text())["results"]
    took = {(x["valid"], x["allocated"], x["dtype"], x["kernel"]): x["ms"]["median"] for x in found}
    for *shape, kernel in took:
        if kernel == "auto":
            assert took[(*shape, "auto")] < 0.7 * took[(*shape, "reference")]
