"""decode.py --aot: a restart compiles nothing. With or without it programs are compiled while the weights are read."""

import json
import os
import pathlib
import threading

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxinfer
from jaxinfer.aot import Programs

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PROMPT = ("--prompt", "def f(x):", "--max-new-tokens", "6", "--temperature", "0")
LONG = 60  # seconds that no side here takes


@pytest.fixture
def run(decode, small, capsys):
    """Runs the script as if in a process of its own: (exit code, report or "", stderr)."""

    def run(*words):
        jax.clear_caches()
        compilation_cache.reset_cache()
        code = decode.main(decode.parse_args(["--model", str(small), *map(str, words), "--json"]))
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else "", err

    yield run
    compilation_cache.reset_cache()


# --- a restart -----------------------------------------------------------------------------------------------------


def test_a_restart_compiles_nothing_and_says_the_same(start, small, tmp_path):
    words = ("--model", small, *PROMPT, "--cache", "snapkv:budget=64", "--quantize", "int8")
    home = os.environ.get("XDG_CACHE_HOME", str(pathlib.Path.home() / ".cache"))  # the CPU kernels are built there
    reports = []
    for _ in range(2):
        process = start(*words, "--aot", tmp_path / "programs", "--json", XDG_CACHE_HOME=home)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        reports.append(json.loads(out.splitlines()[-1]))
    cold, warm = reports
    assert cold["compiled_programs"] > 4
    assert warm["compiled_programs"] == 0
    assert (warm["ids"], warm["text"], warm["weights"]) == (cold["ids"], cold["text"], cold["weights"])


def test_settings_live_side_by_side_and_each_restart_finds_its_own(run, tmp_path):
    words = ("--mesh", "data=2,tensor=2")
    plain = run(*PROMPT, "--aot", tmp_path)[1]
    cold = run(*PROMPT, *words, "--aot", tmp_path)[1]
    assert cold["compiled_programs"] > 0
    warm = run(*PROMPT, *words, "--aot", tmp_path)[1]
    again = run(*PROMPT, "--aot", tmp_path)[1]
    assert warm["compiled_programs"] == again["compiled_programs"] == 0
    assert warm["ids"] == cold["ids"] and again["ids"] == plain["ids"]
    assert warm["collectives"] == cold["collectives"], "a program that was loaded says what it does, too"


@pytest.mark.parametrize(("words", "says", "code"), [
    (("--aot", ""), "--aot is empty", 2),
    (("--aot", "d", "--no-compile-cache"), "--aot and --no-compile-cache contradict each other", 2),
    (("--aot", "d", "--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "0"), "one process", 2),
    (("--aot", __file__), "is no directory", 1),
])  # fmt: skip
def test_an_aot_directory_that_cannot_be_is_refused_in_one_line(words, says, code, refused):
    refused([*PROMPT, *words], says, code)


# --- while the weights are read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ("--quantize", "int4"), ("--mesh", "data=2,tensor=2", "--quantize", "int8"), ("--draft", "ngram"),
], ids=["int4", "mesh", "draft"])  # fmt: skip
def test_programs_are_compiled_once_while_the_weights_are_read(words, run, decode, monkeypatch):
    made, compiled, load = [], threading.Event(), jaxinfer.load
    make = Programs._make

    def noted(self, key, *rest):
        program = make(self, key, *rest)
        made.append(key[0].__name__)
        if made[-1] == "run":
            compiled.set()
        return program

    def slowly(*arguments, **options):
        assert compiled.wait(LONG), "nothing was compiled while the weights were read"
        return load(*arguments, **options)

    monkeypatch.setattr(decode, "weigh", lambda *_: None)  # what a pass of the draft costs: two more programs
    monkeypatch.setattr(Programs, "_make", noted)
    monkeypatch.setattr(jaxinfer, "load", slowly, raising=False)
    code, report, err = run(*PROMPT, *words, "--no-compile-cache")
    assert (code, len(report["ids"][0])) == (0, 6), err
    assert made == ["read_chunk", "run"], "what was compiled is used"


def test_neither_side_waits_for_the_other_to_fail(run, monkeypatch):
    go = threading.Event()
    make = Programs._make

    def waits(*_, **__):
        go.wait(LONG)

    def damaged(*_, **__):
        raise ValueError("tensor 'x' is damaged")

    def broken(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    for compiling, loading, says in ((waits, damaged, "tensor 'x' is damaged"), (broken, waits, "memory ran out")):
        monkeypatch.setattr(Programs, "_make", compiling)
        monkeypatch.setattr(jaxinfer, "load", loading, raising=False)
        code, report, err = run(*PROMPT, "--no-compile-cache")
        assert (code, report, err.count("\n")) == (1, "", 1)
        assert says in err
        assert not go.is_set()
    monkeypatch.setattr(Programs, "_make", make)
    go.set()


def test_what_is_refused_is_refused_before_a_weight_is_read(run, monkeypatch):
    monkeypatch.setattr(jaxinfer, "load", None, raising=False)
    code, _, err = run("--prompt", "x" * 200, "--max-length", "64", "--no-compile-cache")
    assert (code, err.count("\n")) == (1, 1)
    assert "the prompt has 200 tokens but the cache holds 64" in err
