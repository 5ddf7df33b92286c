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


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_committed_programs_with_weights_in_codes_keep_the_laws(form):
    noted = json.loads((COMMITTED.parent / f"weights_{form}.json").read_text())
    assert noted["weights"] == form and [p["rows"] for p in noted["programs"]] == [1, 8, 2]
    for program in noted["programs"]:
        assert broken_laws(program) == []
        assert program["bytes_moved_over_limit"] < (1.05 if program["rows"] < 8 else 1.09)


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
        lone = program["rows"] == 1
        assert program["kernels_per_layer"] <= (9 if lone else 15)
        assert program["product_kernels"] == (4 * 32 if lone else 0), "of a lone row four a layer are products"
        assert program["attention_kernels"] == 2 * 32, "and one that merges, a layer"


MESHES = ("tensor=8", "data=2,tensor=4", "seq=2,tensor=4")
H200_BYTES = 141e9


def broken_laws_of_a_mesh(facts: dict) -> list[str]:
    """Which promises a decode loop on a mesh does not keep: what a device holds, and what a step sends."""
    split = dict(axis.split("=") for axis in facts["mesh"].split(","))
    tensor, seq, data = (int(split.get(name, 1)) for name in ("tensor", "seq", "data"))
    sent = {row["kind"]: row["count"] for row in facts["collectives_per_step"]}
    reduces = facts["layers"] * (2 * (tensor > 1) + 3 * (seq > 1)) + 1 + (data > 1)  # and the embedding, and who runs
    gathered = max((row["bytes"] for row in facts["collectives_per_step"] if row["kind"] == "all-gather"), default=0)
    norms = 0.001 * facts["weight_bytes"]  # they lie whole on every device
    memory = facts["memory_per_device"]
    laws = {
        "does not fit": memory["total"] > H200_BYTES,
        "holds more weights than its part": facts["weight_bytes_per_device"] > facts["weight_bytes"] / tensor + norms,
        "holds a second cache": memory["alias"] < facts["cache_bytes_per_device"],
        "holds large temporaries": memory["temp"] > facts["cache_bytes_per_device"] / 50,
        "copies a weight or a cache": facts["copies_of_weights_or_cache"],
        "sends something else": sent != {"all-reduce": reduces, "all-gather": 1},
        "gathers more than a draw": gathered > 5 * 4 * facts["rows"] * tensor,
        "sends something outside of the loop": facts["collectives_before_and_after"],
    }
    return [sentence for sentence, broken in laws.items() if broken]


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("model", ["llama-3-8b", "llama-3-70b"])
def test_the_committed_programs_of_eight_h200s_keep_the_laws(model, axes):
    name = f"{model}_{axes.replace('=', '').replace(',', '_')}.json"
    facts = json.loads((COMMITTED.parent / name).read_text())
    assert (facts["model"], facts["mesh"], facts["hardware"]) == (model, axes, "NVIDIA H200, compiled without one")
    assert broken_laws_of_a_mesh(facts) == []


KEEPING = {
    "cache_int8.json": "int8",
    "cache_int4.json": "int4",
    "cache_paged.json": "paged",
    "cache_paged_int8.json": "paged+int8",
    "cache_ring.json": "ring:window=1024",
    "cache_h2o.json": "h2o:budget=1024",
}


def broken_laws_of_a_cache(facts: dict) -> list[str]:
    """Which promises a loop over a kind of cache does not keep."""
    laws = {
        "copies the cache": facts["copies_of_the_cache"],
        "gathers a pool, or makes a cache whole": facts["writes_of_the_cache"],
        "does not update the cache in place": facts["memory"]["alias"] < facts["cache_bytes"],
        "holds a tenth of the rows' keys and values beside them": facts["memory"]["temp"]
        > facts["dense_cache_bytes"] / 10,
        "goes to the host": facts["host_callbacks"],
    }
    return [sentence for sentence, broken in laws.items() if broken]


@pytest.mark.parametrize("name", KEEPING)
def test_the_committed_programs_of_caches_keep_the_laws(name):
    facts = json.loads((COMMITTED.parent / name).read_text())
    assert (facts["model"], facts["cache"]) == ("llama-3-8b", KEEPING[name])
    assert broken_laws_of_a_cache(facts) == []


@pytest.mark.parametrize(
    "name", ["cache_int8.json", "cache_paged.json", "cache_paged_int8.json", "cache_ring.json", "cache_int4.json"]
)
def test_the_committed_programs_look_at_caches_by_the_kernel(name):
    facts = json.loads((COMMITTED.parent / name).read_text())
    assert facts["attention_kernels"] == (0 if facts["cache"] == "int4" else 2 * 32), "and one that merges, a layer"


@pytest.mark.h200
@pytest.mark.parametrize("kind", KEEPING.values())
def test_programs_of_caches_for_an_h200_keep_the_laws(facts, kind):
    assert broken_laws_of_a_cache(facts("--model", "tiny", "--cache", kind)) == []


@pytest.mark.h200
@pytest.mark.parametrize("kind", ["dense", "int8", "paged", "paged+int8", "ring:window=1024"])
def test_programs_for_an_h200_look_at_caches_by_the_kernel(facts, kind):
    """And no more bytes are moved than lie there, weights and cache, and 10 MB of what a step holds on the way."""
    told = facts("--model", "tiny", "--cache", kind)
    assert told["attention_kernels"] == 2 * 4, "and one that merges, a layer"
    assert broken_laws_of_a_cache(told) == []
    assert told["bytes_moved_per_step"] < told["memory"]["argument"] + 10e6


SPECULATING = {
    "speculate_model.json": ("--draft", "model"),
    "speculate_head.json": ("--draft", "head"),
    "speculate_ngram.json": ("--draft", "ngram"),
    "speculate_model_tree_adaptive.json": ("--draft", "model", "--tree", "--adaptive"),
}


def broken_laws_of_speculation(facts: dict) -> list[str]:
    """Which promises a loop that drafts does not keep."""
    room = max(facts["cache_bytes"] / 8, 1 << 24)  # most of it for the scores of 64 prompt tokens, 33 MB
    laws = {
        "has another loop at the top": facts["loops_at_the_top"] != [None],
        "copies a weight or a cache": facts["copies_in_the_loop"],
        "writes something as large as a weight or a cache": facts["writes_in_the_loop"],
        "does not update the cache in place": facts["memory"]["alias"] < facts["cache_bytes"],
        "holds a second cache": facts["memory"]["temp"] > room + facts["draft_cache_bytes"],
        "goes to the host": facts["host_callbacks"],
    }
    return [sentence for sentence, broken in laws.items() if broken]


@pytest.mark.parametrize("name", SPECULATING)
def test_the_committed_programs_of_speculation_keep_the_laws(name):
    facts = json.loads((COMMITTED.parent / name).read_text())
    assert (facts["model"], facts["hardware"]) == ("llama-3-8b", "NVIDIA H200, compiled without one")
    assert broken_laws_of_speculation(facts) == []


@pytest.mark.h200
@pytest.mark.parametrize("options", SPECULATING.values(), ids=SPECULATING)
def test_programs_of_speculation_for_an_h200_keep_the_laws(facts, options):
    assert broken_laws_of_speculation(facts("--model", "tiny", *options)) == []


@pytest.mark.h200
@pytest.mark.parametrize("axes", MESHES)
def test_programs_for_eight_h200s_keep_the_laws(facts, axes):
    assert broken_laws_of_a_mesh(facts("--model", "llama-3-8b", "--mesh", axes)) == []


@pytest.mark.h200
def test_a_weight_that_lies_whole_on_every_h200_breaks_the_laws(facts):
    assert broken_laws_of_a_mesh(facts("--model", "llama-3-8b", "--mesh", "tensor=8", "--mistake"))


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
