"""bench.py latency and startup, and the ceilings below them: figures add up, and what cannot be is one line."""

import json
import pathlib
import sys
import types

import bench
import ceilings
import jax
import matplotlib.image
import measured
import numpy as np
import pytest
from compiling import QUICKLY
from suites import latency, startup

import jaxinfer
from jaxinfer import models, roofline
from jaxinfer.kernels import native

pytestmark = pytest.mark.usefixtures("little", "quickly_compiled")

FEW = ("--input-len", 5, "--output-len", 4, "--batch-size", 3, 1, "--num-iters", 2, "--num-iters-warmup", 1)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs it; gives the lines of stdout and the JSON. Nothing is said on stderr."""

    def run(*words):
        words = [str(word) for word in words]
        monkeypatch.setattr("sys.argv", ["bench.py", *words])
        bench.main(bench.parse_args([*words, "--json"]))
        out, err = capsys.readouterr()
        assert err == ""
        *lines, last = out.splitlines()
        return lines, json.loads(last)

    return run


@pytest.fixture
def limits():
    """Ceilings that are easy to count with."""
    products = {name: ceilings.Ceiling(100.0, "kernel", 100.0) for name in ceilings.PRODUCTS}
    return ceilings.Ceilings({"read": ceilings.Ceiling(10.0, "numpy", 10.0), **products}, 1 << 16)


@pytest.fixture
def work(tiny):
    """Prompts of 5 and 4 new tokens, in the tiny model."""
    config = models.config_from_hf(json.loads((tiny / "config.json").read_text())).replace(dtype="float32")
    return latency.Work(config, None, roofline.kind_of("dense"), input_len=5, output_len=4)


def times(*prefill):
    """Iterations whose prefill took so long, the first token twice that and all others three times."""
    return [{"prefill": s, "first_token": 2 * s, "decode": 3 * s, "peak_memory": round(1e6 * s)} for s in prefill]


# --- latency -------------------------------------------------------------------------------------------------------


def test_rates_are_rows_times_tokens_over_seconds(work, limits):
    line = latency.figures(3, work, times(0.1, 0.4, 0.2), limits, "float32")
    assert line["tokens_per_second"] == pytest.approx(
        {"prefill": 3 * 5 / 0.2, "decode": 3 * 3 / 0.6, "output": 3 * 4 / (0.4 + 0.6)}
    )
    seconds = line["seconds"]
    assert seconds["token"]["50"] == pytest.approx(0.6 / 3) and line["peak_memory"] == 400_000
    assert seconds["latency"]["avg"] == pytest.approx(seconds["first_token"]["avg"] + 3 * seconds["token"]["avg"])


def test_percentiles_of_known_numbers():
    values = list(np.random.default_rng(0).permutation(101) / 100)
    assert latency.percentiles(values) == pytest.approx(
        {"avg": 0.5, "10": 0.1, "25": 0.25, "50": 0.5, "75": 0.75, "90": 0.9, "99": 0.99}
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_flops_and_bytes_are_those_of_the_products_and_of_what_is_read(work, tiny, limits, rows):
    raw = json.loads((tiny / "config.json").read_text())
    V, D, F, L = (raw[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"))
    N, K, H = (raw[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    line = latency.figures(rows, work, times(1.0), limits, "float32")
    layer, T = 2 * (2 * N * H * D + 2 * K * H * D + 3 * F * D), 5  # FLOPs a token
    prefill = T * L * layer + 2 * V * D + L * 4 * N * H * (1 + 2 + 3 + 4 + 5)
    steps = [L * layer + 2 * V * D + L * 4 * N * H * seen for seen in (6, 7, 8)]
    assert (line["prefill"]["flops"], line["decode"]["flops"]) == (rows * prefill, rows * sum(steps))
    read = [roofline.decode_bytes(work.config, rows, length) for length in (5, 6, 7)]
    assert line["decode"]["bytes"] == sum(read)
    kept = 4 * 2 * K * H * L * rows  # bytes that a token of every row leaves in the cache
    weights = roofline.weight_bytes(work.config) - 4 * D * (V - rows)  # of the embedding what is looked up
    assert read[0] == weights + 6 * kept  # five are read, one is written
    assert line["prefill"]["bytes"] == weights + 4 * D * 4 * rows + 5 * kept
    for phase in ("prefill", "decode"):
        of = line[phase]
        assert of["gflops_per_second"] == pytest.approx(of["flops"] / of["seconds"] / 1e9)
        assert of["gb_per_second"] == pytest.approx(of["bytes"] / of["seconds"] / 1e9)


def test_a_phase_is_bound_by_what_takes_longer_here(work, limits):
    line = latency.figures(3, work, times(1.0), limits, "float32")
    for bandwidth, bound, share in ((1e-9, "memory", "share_of_read"), (1e9, "compute", "share_of_products")):
        limits.of["read"] = ceilings.Ceiling(bandwidth, "numpy", bandwidth)
        limits.reached("read", line["prefill"]["gb_per_second"], "prefill")
        told = latency.judged(line["prefill"], limits, "float32")
        assert told["bound"] == bound and told["share"] == pytest.approx(told[share])
        assert told["share"] == pytest.approx(max(told["share_of_read"], told["share_of_products"]))


def test_a_run_tells_what_it_did_and_compiles_nothing_while_it_is_timed(run, small, tmp_path):
    where = tmp_path / "new" / "latency.json"
    lines, told = run("latency", "--model", small, "--dtype", "float32", *FEW, "--out", where)
    assert json.loads(where.read_text()) == told and told["compiled_while_timed"] == 0
    assert [line["batch_size"] for line in told["results"]] == [1, 3]
    for line in told["results"]:
        for phase in (line["prefill"], line["decode"]):
            most = max(phase["share_of_read"], phase["share_of_products"])
            assert phase["share"] == pytest.approx(most) and most <= 1
            reached = phase["gb_per_second"] / told["ceilings"]["read"]["rate"]
            assert phase["share_of_read"] == pytest.approx(reached)
        assert line["peak_memory"] is None or line["peak_memory"] > 0
    assert [line.split(":")[0] for line in lines if "first token " in line and "tokens/s" in line] == [
        "1 row",
        "3 rows",
    ]
    picture = matplotlib.image.imread(where.with_suffix(".png"))
    assert picture.std() > 0.05 and picture.shape[0] > 500


def test_a_shape_in_codes_is_judged_by_the_products_that_it_is_made_of(run, shape):
    tiles = native.best() == "amx"  # where rows of float32 meet codes of eight bits as digits
    for form, products in (("int8", "int8" if tiles else "float32"), ("int4:group=2,dynamic", "int8")):
        _, told = run("latency", "--shape", shape, "--quantize", form, *FEW[:4], "--batch-size", 2, *FEW[-4:])
        assert (told["weights"], told["products"], told["dtype"]) == (form, products, "float32")
        (line,) = told["results"]
        rate = told["ceilings"]["products"][products]["rate"]
        assert line["prefill"]["share_of_products"] == pytest.approx(line["prefill"]["gflops_per_second"] / rate)


def test_a_cache_that_made_the_prompt_small_goes_on_after_the_first_token(run, small):
    kind = "snapkv:budget=40,window=4"
    words = ("--input-len", 50, "--output-len", 30, "--batch-size", 2, *FEW[-4:])
    _, told = run("latency", "--model", small, "--cache", kind, *words)
    assert told["cache"] == kind and told["compiled_while_timed"] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("latency --output-len 1", "--output-len is 1: it must be at least 2"),
        ("latency -p 1000 -n 100", "make rows of 1100 tokens but the model was made for 1024: shorten one of them"),
        ("latency --cache none", "--cache none keeps nothing"),
        ("latency --cache full", "cache kind 'full' is not known"),
        ("latency --quantize int7", "'int7': take int8, int4"),
        ("latency --batch-size 8 100000000", "--batch-size 100000000 needs a cache of .* are free"),
        ("latency --shape nowhere.toml", "nowhere.toml"),
        ("latency --model nowhere", "there is no directory nowhere"),
        ("startup --model nowhere", "there is no directory nowhere"),
        ("startup --shape nowhere.toml", "nowhere.toml"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, says):
    with pytest.raises((ValueError, OSError), match=says):
        bench.main(bench.parse_args(words.split()))


@pytest.mark.parametrize(
    "words",
    ["latency --num-iters 0", "latency --num-iters-warmup 0", "latency --batch-size 1 0", "latency --input-len -3",
     "latency --model builtin --shape s.toml", "startup --rounds 0", "startup --model builtin --shape s.toml"],
)  # fmt: skip
def test_a_command_line_that_says_nothing_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_args(words.split())
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


def test_without_matplotlib_a_line_says_what_brings_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    measured.draw(tmp_path / "new" / "latency.png", lambda *_: pytest.fail("it drew"), {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latency.png was not drawn") and "pip install" in line
    assert not (tmp_path / "new").exists()


# --- ceilings ------------------------------------------------------------------------------------------------------


def test_a_faster_program_raises_the_ceiling_and_no_share_is_above_one(limits, capsys):
    limits.reached("read", 8.0, "slower")
    assert (limits.share("read", 8.0), limits.of["read"].by) == (0.8, "numpy")
    limits.show_raised()
    assert capsys.readouterr().out == ""
    limits.reached("read", 16.0, "attention")
    assert (limits.share("read", 16.0), limits.share("read", 8.0)) == (1.0, 0.5)
    limits.show_raised()
    assert "read raised from 10.0 to 16.0 GB/s by attention" in capsys.readouterr().out
    told = limits.told()["read"]
    assert (told["rate"], told["measured"], told["by"], told["unit"]) == (16.0, 10.0, "attention", "GB/s")


@pytest.mark.parametrize("suite", ["attention --rows 1 --valid 8 --dtype float32", "matmul --shape 64x32 --rows 1 2"])
def test_ceilings_that_are_too_low_are_raised_by_what_was_measured(run, monkeypatch, limits, suite):
    for name in limits.of:
        limits.of[name] = ceilings.Ceiling(1e-9, "nothing", 1e-9)
    monkeypatch.setattr(ceilings, "measure", lambda: limits)
    for name in ("attention", "matmul"):
        monkeypatch.setattr(getattr(bench, name), "DISTINCT", 1 << 16)
    lines, told = run(*suite.split(), "--rounds", 1)
    assert max(line["share"] for line in told["results"]) == 1
    assert told["ceilings"]["read"]["rate"] == max(line["gb_per_second"] for line in told["results"])
    assert told["ceilings"]["read"]["measured"] == 1e-9
    assert any(line.startswith("ceiling: read raised from 0.0 to ") for line in lines)


def test_the_fastest_round_of_the_fastest_way_counts(monkeypatch):
    monkeypatch.setattr(measured, "seconds", lambda ways, rounds: {"slow": [4.0, 3.0], "fast": [9.0, 2.0]})
    found = ceilings.best(8e9, {}, 2)
    assert (found.rate, found.by, found.measured) == (4.0, "fast", 4.0)


def test_reads_pass_over_all_of_the_memory_by_every_core(monkeypatch):
    size, seen = 1 << 16, []
    monkeypatch.setattr(measured.os, "cpu_count", lambda: 3)
    monkeypatch.setattr("jaxinfer.kernels.native.unavailable", lambda: None)
    monkeypatch.setattr("jaxinfer.kernels.native.read", lambda words: seen.append((words.ctypes.data, words.nbytes)))
    reads = measured.reads(size)
    reads.ways["kernel"]()
    assert set(reads.ways) == {"numpy", "kernel"} and len(dict(seen)) == 3
    assert reads.moved == sum(dict(seen).values()) and size <= reads.moved < size + 3 * 8
    assert reads.rate({"numpy": [2.0, 4.0], "kernel": [3.0], "other": [1.0]}) == reads.moved / 2.0 / 1e9
    monkeypatch.setattr("jaxinfer.kernels.native.unavailable", lambda: "no compiler")
    assert set(measured.reads(size).ways) == {"numpy"}


def test_less_memory_is_read_where_less_is_free_and_a_line_says_so(monkeypatch, capsys):
    for free, size in ((None, ceilings.READ), (2 * ceilings.READ, ceilings.READ), (ceilings.READ, ceilings.READ // 2)):
        capsys.readouterr()
        monkeypatch.setattr("jaxinfer.kernels.free_memory", lambda free=free: free)
        assert ceilings.room() == size
    assert "ceiling: reading 32.8 kB, not 65.5 kB, as 65.5 kB of memory are free" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ceilings.PRODUCTS)
def test_what_is_timed_is_the_product_it_is_counted_as(dtype):
    flops, ways = ceilings.programs(dtype)
    rows, inner, outer = ceilings.CPU
    assert flops == 2 * rows * inner * outer and set(ways) == {"kernel", "xla"}
    one, two = (np.asarray(way()) for way in ways.values())
    assert one.shape == (rows, outer)
    drawn = ceilings.rows_of(dtype)
    x, w = (jax.random.normal(jax.random.key(i), (n, inner), drawn) for i, n in ((0, rows), (1, outer)))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    far = 0.5 if dtype == "int8" else 1e-3  # of sums about 8 in size
    np.testing.assert_allclose(one, exact, atol=far)
    np.testing.assert_allclose(two, exact, atol=far)


# --- startup -------------------------------------------------------------------------------------------------------


def told(first, **seconds):
    """As decode.py --json tells it."""
    seconds = {"load": 1.0, "compile": 2.0, "prefill": 0.5, "decode": 0.25, "first_token": first, **seconds}
    return {"seconds": seconds, "compiled_programs": 4, "dtype": "float32", "weights": None, "weight_bytes": 8}


def test_a_start_is_made_in_every_case_in_turn_and_its_parts_add_up(run, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    calls = []

    def child(command, environment):
        if command[1] == "-c":
            return 0.125, ""
        home = pathlib.Path(environment["XDG_CACHE_HOME"])
        programs = pathlib.Path(environment.get("JAX_COMPILATION_CACHE_DIR", home / "programs"))
        calls.append((home.name, home.exists(), programs.exists(), "--aot" in command))
        programs.mkdir(parents=True, exist_ok=True)
        home.mkdir(exist_ok=True)
        return 9.0, json.dumps(told(5.0 + len(calls)))

    monkeypatch.setattr(startup, "child", child)
    lines, found = run("startup", "--rounds", "2")
    kinds = {case: [calls[2 + i], calls[6 + i]] for i, case in enumerate(startup.CASES)}
    assert calls[:2] == [("warm", False, False, False), ("warm", True, True, True)] and len(calls) == 10  # not counted
    assert [call[1:] for call in kinds["cold"]] == [(False, False, False)] * 2
    assert kinds["cold, kernels"] == [("warm", True, False, False)] * 2  # kernels, but no programs
    assert kinds["warm"] == [("warm", True, True, False)] * 2
    assert kinds["aot"] == [("warm", True, True, True)] * 2
    assert [line["case"] for line in found["results"]] == list(startup.CASES)
    for place, line in enumerate(found["results"]):
        firsts = [5.0 + place + 3, 5.0 + place + 7]
        seconds = {name: spread["median"] for name, spread in line["seconds"].items()}
        assert seconds["first_token"] == np.median(firsts) and line["compiled_programs"] == 4
        assert sum(seconds[part] for part in startup.PARTS) == pytest.approx(seconds["first_token"])
    assert set(found["imports"]) == set(startup.IMPORTS) and len(lines) >= 7


def test_a_child_finds_the_package_and_no_programs_of_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    code = "import os, jaxinfer, suites; print(os.environ.get('JAX_COMPILATION_CACHE_DIR'), os.environ['MINE'])"
    took, out = startup.child([sys.executable, "-c", code], {"MINE": "5"})
    assert out.split() == ["None", "5"] and took > 0
    with pytest.raises(ValueError, match="failed: .* no such thing"):
        startup.child([sys.executable, "-c", "raise SystemExit('there is no such thing')"], {})


def test_a_warm_start_compiles_nothing(monkeypatch, tiny, tmp_path):
    for name, value in QUICKLY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler: kernels take long to build, and are not what is tested
    words = ["--model", str(tiny), "--prompt-length", "4", "--max-new-tokens", "1", "--json"]
    cold, warm = (startup.start(words, tmp_path / "cache") for _ in range(2))
    assert cold["compiled_programs"] > 0 and warm["compiled_programs"] == 0
    for start in (cold, warm):
        parts = startup.parts(start)
        assert 0 < parts["import"] < parts["first_token"] < parts["process"]
        assert sum(parts[name] for name in startup.PARTS) == pytest.approx(parts["first_token"])


def test_a_shape_is_saved_as_a_checkpoint_that_loads(shape, tmp_path):
    startup.save(str(shape), "bfloat16", str(tmp_path / "model"))
    params, config = jaxinfer.load(tmp_path / "model")
    same = models.init_params(config, jax.random.key(0), "bfloat16")
    assert config.dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert jaxinfer.Tokenizer(tmp_path / "model").decode([3, config.vocab_size - 1]).split() == ["3", "255"]


def test_a_shape_that_the_disk_has_no_room_for_is_refused_and_nothing_is_left(monkeypatch, shape, tmp_path):
    monkeypatch.setattr(startup.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(startup, "child", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(startup.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"needs .* on disk but 1.0 kB are free in .*: set TMPDIR"):
        bench.main(bench.parse_args(["startup", "--shape", str(shape)]))
    assert list(tmp_path.iterdir()) == []
