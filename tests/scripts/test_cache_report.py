"""scripts/cache_report.py, and what it found on the built-in model."""

import json
import pathlib

import pytest

pytestmark = pytest.mark.usefixtures("quickly_compiled")
FOUND = pathlib.Path(__file__).parents[2] / "benchmarks" / "cache" / "builtin.json"


@pytest.fixture
def report(tiny, tmp_path, capsys):
    """Runs the script on a tiny model and a text: (exit code, stdout, stderr)."""
    import cache_report

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, " * 8)

    def report(*words):
        try:
            usual = () if "--shape" in words else ("--model", str(tiny), "--text", str(text))
            code = cache_report.main(cache_report.parse_args([*usual, *words]))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return report


def test_kinds_are_compared_on_a_text(report, tmp_path):
    words = ("--kinds", "int8", "snapkv:budget=12,window=4", "--prompt-length", "32", "--length", "60", "--rows", "2",
             "--speed-length", "48", "--speed-rows", "1", "--steps", "2", "--rounds", "2")  # fmt: skip
    code, out, _ = report(*words, "--json", "--out", str(tmp_path / "found"))
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told == json.loads((tmp_path / "found.json").read_text())
    assert (tmp_path / "found.png").stat().st_size > 10_000
    dense, eight, snap = told["kinds"]
    assert [row["kind"] for row in told["kinds"]] == ["dense", "int8", "snapkv:budget=12,window=4"]
    assert dense["lost"] == dense["kl_to_dense"] == 0 and dense["over_dense"] == 1
    assert dense["bytes_per_token"] > eight["bytes_per_token"]
    assert 0 < eight["kl_to_dense"] < 1e-2 < snap["kl_to_dense"]
    assert all(row["tokens_per_second"] > 0 for row in told["kinds"])


def test_of_a_shape_the_speed_is_told_and_nothing_else(report, shape, tmp_path):
    words = ("--speed-length", "40", "--speed-rows", "2", "--steps", "2", "--rounds", "2", "--json")
    code, out, _ = report(
        "--shape", str(shape), "--kinds", "int8", "paged:page=4", *words, "--out", str(tmp_path / "found.1b")
    )
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and (tmp_path / "found.1b.png").stat().st_size > 5_000
    assert [row["kind"] for row in told["kinds"]] == ["dense", "int8", "paged:page=4"]
    assert all(row["tokens_per_second"] > 0 and "lost" not in row for row in told["kinds"])
    code, _, err = report("--shape", str(shape), "--kinds", "h2o:budget=8,recent=4", *words)
    assert code == 1 and "h2o:budget=8,recent=4 keeps what a text says it should, and --shape has none" in err


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ("--kinds paper", "cache kind 'paper' is not known", 1),
        ("--prompt-length 4 --length 4", "leaves nothing to count", 2),
        ("--budget 2", "--budget is 2.0: give a share", 2),
        ("--rounds 0", "--rounds is 0", 2),
        ("--length 9999", "no text has 9999 tokens", 1),
        ("--nonsense", "unrecognized arguments", 2),
        ("--shape a.toml --text b", "--shape has random weights", 2),
        ("--shape a.toml --speed-length 0", "leaves nothing to measure", 2),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(report, words, says, code):
    got, out, err = report(*words.split())
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert says in err


def test_what_was_found_on_the_builtin_model_keeps_what_is_promised():
    found = {row["kind"]: row for row in json.loads(FOUND.read_text())["kinds"]}
    assert abs(found["int8"]["lost"]) < 0.001
    assert abs(found["int4"]["lost"]) < 0.01
    assert abs(found["paged"]["lost"]) < 1e-6
    budget = 205  # 20 % of 1024
    for kind in (f"ring:window={budget}", f"streaming:sinks=4,recent={budget - 4}", f"h2o:budget={budget},recent=102"):
        assert found[kind]["bytes_per_token"] < 0.21 * found["dense"]["bytes_per_token"]
    assert found[f"ring:window={budget}"]["over_dense"] > 1
