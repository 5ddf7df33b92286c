"""scripts/train.py on a toy: what it leaves, that an interruption changes nothing, and what it refuses."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import train

from jaxinfer.training import corpus

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "train.py"
TOY = [
    "--tiny", "--layers=1", "--files=6", "--length=128", "--no-progress",
    "--steps=4", "--final-steps=1", "--decay-steps=2", "--warmup=1",
]  # fmt: skip
needs_its_python = pytest.mark.skipif(
    ".".join(map(str, sys.version_info[:3])) != corpus.read_list()["python"], reason="the text is another version's"
)


@pytest.fixture(autouse=True)
def own_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run without interruption."""
    # the same programs are compiled by every run of this file
    old = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))}).items():
        jax.config.update(name, value)
    out = tmp_path_factory.mktemp("toy")
    assert train.main(train.parse_args([*TOY, "--out", str(out)])) == 0
    yield out
    for name, value in old.items():
        jax.config.update(name, value)


CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@needs_its_python
def test_a_run_leaves_a_model_a_curve_and_its_figures(toy):
    result = json.loads((toy / "result.json").read_text())
    assert {path.name for path in (toy / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (toy / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(toy.rglob("*partial*"))
    assert 0 < result["bits_per_byte"] < 9 and result["xz_bits_per_byte"] > 1
    assert result["tokens_seen"] == 4 * 512 and len(result["train_bits_per_byte"]) == 4
    assert [(p["from"], p["to"]) for p in result["by_position"]] == [(0, 64), (64, 128)]
    assert {"hardware", "versions", "command", "seconds", "tokens_per_second"} <= set(result)


@needs_its_python
@pytest.mark.parametrize("changed", [[], ["--steps", "7"]], ids=["the same", "made shorter before the rate falls"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(toy, tmp_path, changed):
    args = [*TOY, "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt, match="saved after step 1 of"):
        train.main(train.parse_args([*args, *changed, "--stop-after", "1"]))
    (tmp_path / "checkpoint.npz.partial").write_bytes(b"what a kill in the middle of a save leaves")
    assert train.main(train.parse_args(args)) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (toy / "model" / name).read_bytes(), name
    with np.load(toy / "checkpoint.npz") as one, np.load(tmp_path / "checkpoint.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in one.files if name != "notes")


@needs_its_python
def test_a_finished_run_with_other_settings_is_refused_by_their_names(toy):
    with pytest.raises(ValueError, match=r"was made with steps 4 \(now 5\), rate 0\.02 \(now 0\.5\).*fresh --out"):
        train.main(train.parse_args([*TOY, "--steps", "5", "--rate", "0.5", "--out", str(toy)]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "3"], "--heads 3 is no multiple of --kv-heads 2"),
        (["--micro", "1000"], "--micro 1000 is no multiple of 512 tokens a row"),
        (["--vocab-size", "200"], "need at least 257"),
        (["--steps", "5"], "exceed --steps 5"),
        (["--head-dim", "7"], "it must be even"),
    ],
)
def test_flags_that_cannot_be_trained_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        train.parse_args([*flags, "--out", "nowhere"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_another_library_is_refused_in_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--stdlib", str(tmp_path)]
    where = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=where)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "CPython 3.11.7" in done.stderr
