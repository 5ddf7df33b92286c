"""Decode programs compiled for an NVIDIA H200 on a machine without one: no copies, one cache, few bytes too many.

Opt-in: tests/h200/setup.sh makes the environment, `pytest -m h200` runs these. The committed facts of Llama-3-8B
(benchmarks/h200/decode_compile.json) are held to the same laws in every run.
"""

import functools
import json
import os
import pathlib
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = pathlib.Path(os.environ.get("H200_COMPILE", "~/.cache/h200-compile")).expanduser() / "bin" / "python"
COMMITTED = ROOT / "benchmarks" / "h200" / "decode_compile.json"


@functools.cache
def compiled(*options: str) -> dict:
    """What facts.py says, run in the environment of setup.sh (Python 3.12 and the CUDA plugin, which this has not)."""
    command = [str(PYTHON), str(HERE / "facts.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def facts():
    """`compiled`, where it can be had."""
    if not PYTHON.exists():
        pytest.skip("there is no environment that compiles for an H200: run tests/h200/setup.sh")
    return compiled


def broken_laws(program: dict) -> list[str]:
    """Which promises a decode program does not keep."""
    laws = {
        "copies a weight or a cache": program["copies_of_weights_or_cache"],
        "writes something as large as a weight or a cache": program["writes_of_weights_or_cache"],
        "holds a second cache": program["memory"]["alias"] < program["cache_bytes"],
        "holds large temporaries": program["memory"]["temp"] > max(program["cache_bytes"], 1 << 28) / 100,
    }
    return [sentence for sentence, broken in laws.items() if broken]


def test_the_committed_programs_of_llama_3_8b_keep_the_laws():
    noted = json.loads(COMMITTED.read_text())
    assert noted["hardware"] == "NVIDIA H200, compiled without one"
    assert [(p["program"], p["rows"]) for p in noted["programs"]] == [
        ("generate", 1),
        ("generate", 8),
        ("decode_step", 2),
    ]
    for program in noted["programs"]:
        assert broken_laws(program) == []
        assert program["bytes_moved_over_limit"] < 1.06
        assert program["kernels_per_layer"] <= 24


@pytest.mark.h200
@pytest.mark.parametrize("model", ["tiny", "llama-3-8b"])
def test_decode_programs_for_an_h200_keep_the_laws(facts, model):
    for program in facts("--model", model)["programs"]:
        assert broken_laws(program) == [], program


@pytest.mark.h200
def test_decode_programs_for_an_h200_move_few_bytes_too_many(facts):
    for program in facts("--model", "llama-3-8b")["programs"]:
        assert program["bytes_moved_over_limit"] < 1.1, program
        assert program["kernels_per_layer"] <= 24, program


@pytest.mark.h200
def test_a_cache_that_is_not_donated_breaks_the_laws(facts):
    for program in facts("--model", "tiny", "--keep-cache")["programs"]:
        assert {"copies a weight or a cache", "holds a second cache"} <= set(broken_laws(program)), program
