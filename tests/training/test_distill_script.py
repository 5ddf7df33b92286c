"""scripts/distill.py on toys: what it leaves, that an interruption changes nothing, and what it refuses."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import distill
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

import jaxinfer
from jaxinfer import models, weights
from jaxinfer.testing import byte_tokenizer
from jaxinfer.testing.tiny import tiny_params
from jaxinfer.training.export import save_huggingface

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "distill.py"
TINY = {
    "model_type": "qwen3", "vocab_size": 260, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "hidden_act": "silu",
    "bos_token_id": None, "eos_token_id": [7, 9],
}  # fmt: skip
CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
KINDS = ("model", "head")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model whose ids are bytes."""
    directory = tmp_path_factory.mktemp("target") / "tiny"
    save_huggingface(directory, tiny_params(models.config_from_hf(TINY)), TINY)
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of sentences, one a line."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"The {i}th sentence is {'longer ' * (i % 7)}than that.\n" for i in range(120)))
    return file


@pytest.fixture(scope="module")
def words(target, text):
    """The command line, without --kind and --out."""
    return ["--tiny", "--no-progress", "--target", str(target), "--text", str(text)]


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """The same programs are compiled by every run of this file."""
    old = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))}).items():
        jax.config.update(name, value)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def own_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*words):
    return distill.main(distill.parse_args(list(map(str, words))))


@pytest.fixture(scope="module")
def toys(words, tmp_path_factory):
    """A run of each kind without interruption."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind)
        assert run(*words, "--kind", kind, "--out", found[kind]) == 0
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_draft_a_curve_and_its_figures(toys, kind):
    result = json.loads((toys[kind] / "result.json").read_text())
    assert (toys[kind] / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(toys[kind].rglob("*partial*"))
    depths = {"model": 1, "head": 2}[kind]
    assert len(result["acceptance"]) == len(result["greedy_agreement"]) == depths
    assert all(0 < kept < 1 for kept in result["acceptance"]) and result["predictions"] > 50
    assert len(result["train_loss"]) == 4 and [step for step, _ in result["held_out_sample"]] == [2, 4]
    assert result["kind"] == kind and result["target"] == "tiny" and result["fingerprint"].startswith("D24-V260-L2-")
    assert {"hardware", "versions", "command", "seconds", "tokens_per_second", "settings"} <= set(result)
    assert str(toys[kind]) not in json.dumps(result)


def test_the_model_is_one_that_loads_with_the_targets_vocabulary(toys, target):
    place = toys["model"] / "model"
    params, config = jaxinfer.load(place)
    assert (config.vocab_size, config.width, len(config.layers)) == (260, 16, 1)
    assert config.dtype == "bfloat16" and config.stop_ids == (7, 9) and config.bos_id is None
    assert (place / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    assert jaxinfer.Tokenizer(place).encode("that") == jaxinfer.Tokenizer(target).encode("that")


def test_the_head_names_the_model_that_it_was_trained_for(toys, target):
    params, config, name = weights.load_head(toys["head"] / "head")
    assert name == models.fingerprint(*jaxinfer.load(target))
    assert config.layers[0].num_heads == 4 and config.width == 24


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_gives_the_same_bits(toys, words, tmp_path, kind):
    args = [*words, "--kind", kind, "--out", tmp_path]
    with pytest.raises(KeyboardInterrupt, match="saved after step 1 of 4"):
        run(*args, "--stop-after", 1)
    (tmp_path / "checkpoint.npz.partial").write_bytes(b"what a kill in the middle of a save leaves")
    assert run(*args) == 0
    assert (tmp_path / kind / "model.safetensors").read_bytes() == (
        toys[kind] / kind / "model.safetensors"
    ).read_bytes()
    with np.load(toys[kind] / "checkpoint.npz") as one, np.load(tmp_path / "checkpoint.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in one.files if name != "notes")
    one, two = (json.loads((place / "result.json").read_text()) for place in (toys[kind], tmp_path))
    assert one["acceptance"] == two["acceptance"]


def test_the_last_line_under_json_is_the_result(words, toys, capsys):
    assert run(*words, "--kind", "model", "--out", toys["model"], "--json") == 0  # finished: judged again
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["acceptance"] == json.loads((toys["model"] / "result.json").read_text())["acceptance"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_goes_on_from_where_another_run_left_it(toys, words, tmp_path, kind):
    """With a rate of nothing it stays what it was."""
    still = ["--rate", "1e-30", "--embed-rate", "1e-30", "--weight-decay", "0", "--kind", kind]
    assert run(*words, *still, "--start", toys[kind] / kind, "--out", tmp_path) == 0
    assert (tmp_path / kind / "model.safetensors").read_bytes() == (
        toys[kind] / kind / "model.safetensors"
    ).read_bytes()


def test_a_start_of_another_shape_is_refused(toys, words, target, tmp_path):
    with pytest.raises(ValueError, match="has another shape .its width differs.: give the flags it was made with"):
        run(*words, "--width", "24", "--start", toys["model"] / "model", "--out", tmp_path / "out")


def test_a_head_trained_for_another_model_is_named(toys, words, target, tmp_path):
    shutil.copytree(target, tmp_path / "other")
    save_huggingface(tmp_path / "other", tiny_params(models.config_from_hf(TINY), seed=9), TINY)
    words = [*words, "--kind", "head", "--target", tmp_path / "other", "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="was trained for D24-V260-L2-.*, not for D24-V260-L2-.*: start from a head"):
        run(*words, "--start", toys["head"] / "head")
    with pytest.raises(ValueError, match="is no draft head"):
        run(*words, "--start", toys["model"] / "model")


def refused(words, message, code=1):
    """One line on stderr that says it, nothing on stdout, no traceback."""
    where = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, env=where)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("distill.py: ") and message in done.stderr


def test_an_unknown_target_is_refused_in_one_line(tmp_path):
    refused(["--target", tmp_path / "nowhere", "--out", tmp_path / "out"], "there is no directory")
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_same_directory_is_refused_by_its_settings(words, toys):
    with pytest.raises(ValueError, match=r"was made with kind 'model' \(now 'head'\).*or a fresh --out"):
        run(*words, "--kind", "head", "--out", toys["model"])
    with pytest.raises(ValueError, match=r"was made with rate 0\.02 \(now 0\.5\)"):
        run(*words, "--kind", "model", "--rate", "0.5", "--out", toys["model"])


def test_a_text_that_is_too_short_is_refused(words, tmp_path):
    for words_in_it, message in ((4, "30 tokens make no epoch of windows of 32"), (1, "held-out text has 0 tokens")):
        (tmp_path / "short.txt").write_text("Not much.\n" * words_in_it)
        with pytest.raises(ValueError, match=message):
            run(*words[:-1], tmp_path / "short.txt", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="there is no text in"):
        run(*words[:-1], tmp_path / "out", "--out", tmp_path / "out")


def test_a_tokenizer_with_more_words_than_the_model_is_refused(target, words, tmp_path):
    shutil.copytree(target, tmp_path / "grown")
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save(str(tmp_path / "grown" / "tokenizer.json"))
    with pytest.raises(ValueError, match="a tokenizer of 2[0-9]* tokens and a model of 260"):
        run(*words, "--target", tmp_path / "grown", "--out", tmp_path / "out")


def test_a_loss_that_is_not_finite_ends_the_run(words, tmp_path):
    with pytest.raises(ValueError, match="the loss is nan after step [234]: lower --rate"):
        run(*words, "--kind", "model", "--rate", "1e38", "--embed-rate", "1e38", "--out", tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--micro", "1000"], "--micro 1000 is no multiple of 512 tokens a row"),
        (["--depths", "0"], "--depths is 0: it must be at least 1"),
        (["--length", "2", "--depths", "3"], "--length 2 leaves nothing to predict at --depths 3"),
        (["--text", "stdlib", "more"], "--text stdlib stands alone"),
        (["--kind", "tree"], "invalid choice: 'tree'"),
    ],
)
def test_flags_that_cannot_be_trained_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        distill.parse_args([*flags, "--out", "nowhere"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_rows_longer_than_the_targets_positions_are_refused(words, tmp_path):
    with pytest.raises(ValueError, match="--length is 128 but .* has 64 positions: shorten the rows"):
        run(*words, "--length", "128", "--micro", "128", "--out", tmp_path)
