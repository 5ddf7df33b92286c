"""scripts/bench.py: what it measures adds up, and what it cannot measure it refuses in one line."""

import json
import pathlib

import bench
import pytest
from suites import attention, matmul

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs it on little; gives the lines of stdout and the JSON."""
    monkeypatch.setattr(bench.measured, "plain_read", lambda: 10.0)
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
    assert len(lines) == len(told["results"]) == 8
    for line in told["results"]:
        one = 16 * 4 if line["dtype"] == "float32" else 16 + 4  # bytes of a vector
        moved = 2 * 2 * 2 * line["valid"] * one
        assert line["gb_per_second"] == pytest.approx(moved / line["ms"]["median"] / 1e6, rel=0.05, abs=0.006)
        assert line["share"] == pytest.approx(line["gb_per_second"] / 10, abs=1e-3)
        assert line["ms"]["min"] <= line["ms"]["median"] <= line["ms"]["max"]


def test_products_are_measured_in_every_form(run):
    lines, told = run("matmul", "--shape", "64x32", "--rows", "1", "3", "--form", "bfloat16", "int4:group=32")
    assert len(lines) == len(told["results"]) == 8
    for line in told["results"]:
        size = 64 * 32 * 2 if line["form"] == "bfloat16" else 64 * 32 // 2 + 64 // 32 * 32 * 2
        assert line["gb_per_second"] == pytest.approx(size / line["ms"]["median"] / 1e6, rel=0.05, abs=0.006)
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
