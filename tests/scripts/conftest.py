"""What the tests of scripts as programs of their own share: a tiny checkpoint, and runs of decode.py on it."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from compiling import QUICKLY

from jaxinfer import models
from jaxinfer.testing import byte_tokenizer
from jaxinfer.testing.tiny import tiny_params
from jaxinfer.training.export import save_huggingface

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "decode.py"
TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 100000,
    "rope_theta": 10000.0,
}  # three KV heads and fifty units of F: no mesh here divides them


@pytest.fixture(scope="module")
def decode():
    """The script as a module; what it sets in jax is put back afterwards."""
    import decode

    names = [name for name in jax.config.values if "compilation_cache" in name or "persistent_cache" in name]
    before = {name: jax.config.values[name] for name in names}
    yield decode
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def refused(decode, capsys):
    """refused(words, says, code): one line that says it, no traceback, this exit code."""

    def refused(words, says, code):
        try:
            got = decode.main(decode.parse_args(words))
        except SystemExit as end:
            got = end.code
        out, err = capsys.readouterr()
        assert (got, out, err.count("\n")) == (code, "", 1), err
        assert says in err

    return refused


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint whose ids are bytes."""
    return checkpoint(tmp_path_factory.mktemp("tiny") / "model", TINY)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """One of a single layer, where only the processes matter."""
    return checkpoint(tmp_path_factory.mktemp("small") / "model", TINY | {"num_hidden_layers": 1})


@pytest.fixture(scope="session")
def shape(tmp_path_factory):
    """The shape of the small one, for --random-weights."""
    path = tmp_path_factory.mktemp("shape") / "shape.json"
    path.write_text(json.dumps(TINY | {"num_hidden_layers": 1}))
    return path


def checkpoint(directory, raw):
    save_huggingface(directory, tiny_params(models.config_from_hf(raw)), raw)
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts decode.py; all runs share a compilation cache, and are compiled quickly unless they say otherwise."""
    known = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    known |= {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    known |= QUICKLY

    def start(*words, cwd=None, **environment):
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, words)],
            env=known | environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def alone(start):
    """(lines of text, report) of a run with --json in one process; equal runs run once."""

    @functools.cache
    def alone(*words, **environment):
        process = start(*words, "--json", **environment)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        *text, report = out.splitlines()
        return text, json.loads(report)

    return alone


@pytest.fixture
def little(monkeypatch):
    """The ceilings of bench.py, measured on little and seldom."""
    import ceilings
    import measured

    monkeypatch.setattr(measured, "READ", 1 << 16)
    for name, value in {"READ": 1 << 16, "PASSES": 2, "ROUNDS": 2, "CPU": (8, 64, 96)}.items():
        monkeypatch.setattr(ceilings, name, value)
