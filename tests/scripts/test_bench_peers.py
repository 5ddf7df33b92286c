"""scripts/bench.py peers: the same work by all sides in turns; a side that is not there, dies or hangs is left out."""

import json
import math
import pathlib
import re
import sys

import bench
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICKLY
from suites import gguf_file, peers, sides
from suites.model_files import Files
from suites.worker import Lost, Worker, installed

import jaxinfer
from jaxinfer import models, ops, roofline
from jaxinfer.config import RopeSpec
from jaxinfer.testing.tiny import tiny_params
from jaxinfer.training.export import save_huggingface

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 24,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
STAND_IN = """
import json, os, sys, time
turn = 0
for line in sys.stdin:
    asked = json.loads(line)
    answer = {}
    if asked["do"] == "load":
        answer = {"version": "1.2", "cache": asked["dtype"]}
    elif asked["do"] == "prepare":
        prompts, count = asked["ids"], asked["new_tokens"] + 1 if asked["work"] == "decode" else 1
    else:
        ids = [[sum(prompt) + i for i in range(count)] for prompt in prompts]
        seconds = 1.0
        DIFFERENCE
        answer = {"seconds": seconds, "ids": ids}
        turn += 1
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "tiny-0.1.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(name, difference): a worker in a few lines instead of a side's; what it does otherwise in a turn."""
    monkeypatch.setattr(sides, "WORKERS", tmp_path)
    monkeypatch.setattr(Files, "write_random", lambda *_: None)  # nobody reads them

    def stand_in(name, difference="pass", package="json"):
        script = tmp_path / f"{name}_worker.py"
        script.write_text(STAND_IN.replace("DIFFERENCE", difference))
        forms = sides.PEERS["llama.cpp"].forms if name == "llama.cpp" else sides.FLOATS | {"int8:dynamic": "Q8"}
        if name != "jaxinfer":
            monkeypatch.setitem(sides.PEERS, name, sides.Peer(package, script, f"what-{name}-needs", forms))

    return stand_in


@pytest.fixture
def run(shape, capsys, monkeypatch, little):
    """Runs it on little; gives the lines of stdout, the JSON and stderr."""
    monkeypatch.setattr(bench.measured, "plain_read", lambda: 10.0)
    monkeypatch.setattr(sides, "PAUSE", 0)

    def run(*words):
        small = ["--shape", str(shape), "--prompt-length", "4", "--new-tokens", "3"]
        words = ["peers", *([] if "--model" in words else small), *words, "--json"]
        monkeypatch.setattr("sys.argv", ["bench.py", *words])
        bench.main(bench.parse_args(words))
        out, err = capsys.readouterr()
        *lines, last = out.splitlines()
        return lines, json.loads(last), err

    return run


# --- for real ------------------------------------------------------------------------------------------------------


def test_transformers_gives_the_ids_that_jaxinfer_gives(run, monkeypatch):
    monkeypatch.setattr(peers.os, "cpu_count", lambda: 1)  # threads that wait for a busy core make it slow
    for name, value in QUICKLY.items():
        monkeypatch.setenv(name, value)
    words = ["--peer", "transformers", "--dtype", "float32", "--rows", "1", "3", "--prefill-rows", "2"]
    lines, told, err = run(*words, "--rounds", "1")
    assert err == "" and told["left_out"] == [] and told["model"] == "tiny-0.1"
    assert {"jaxinfer", "jax", "transformers"} <= told["versions"].keys()
    assert [(x["work"], x["rows"]) for x in told["results"]] == [("decode", 1), ("decode", 3), ("prefill", 2)]
    config = models.config_from_hf(TINY)
    for result in told["results"]:
        assert list(result["sides"]) == ["jaxinfer", "transformers"] and result["best_peer"] == "transformers"
        ours, theirs = result["sides"].values()
        new = 4 if result["work"] == "decode" else 1
        assert theirs["same_ids"] == f"{result['rows'] * new} of {result['rows'] * new}"
        product = roofline.params_count(config) - config.vocab_size * config.width  # its embedding is not its head
        assert ours["weight_bytes"] == theirs["weight_bytes"] == 4 * (product + config.width)
    rate, rows = told["results"][1]["sides"]["jaxinfer"], 3
    held = 2 * 2 * 3 * 8 * 4 * rows * 6  # k and v, layers, heads, width, bytes, rows, tokens: five seen and one written
    moved = rate["weight_bytes"] + (rows - 1) * 24 * 4 + held
    assert rate["gb_per_second"] == pytest.approx(moved * rate["tokens_per_second"]["median"] / rows / 1e9, abs=0.006)
    assert rate["share"] == pytest.approx(rate["gb_per_second"] / told["ceilings"]["read"]["rate"], abs=1e-3)
    assert rate["share_beside"] == round(rate["gb_per_second"] / max(rate["gb_per_second"], 10.0), 3)
    read = told["results"][2]["sides"]["jaxinfer"]
    products = told["ceilings"]["products"]["float32"]["rate"]
    assert read["share_of_products"] == pytest.approx(read["gflops_per_second"] / products, abs=1e-3)
    assert max(read["share_of_products"], rate["share"]) <= 1
    assert sum("transformers float32" in line for line in lines) == 6  # each case, and the summary


# --- turns, by stand-ins ---------------------------------------------------------------------------------------------


def test_sides_take_turns_and_ratios_are_of_one_round(run, stand_in, tmp_path):
    note = f"open({str(tmp_path / 'order')!r}, 'a').write('%s')"
    stand_in("jaxinfer", note % "A" + "; seconds = [99, 1, 2, 4, 8][turn]")
    stand_in("slow", note % "B" + "; seconds = 4")
    stand_in("quick", note % "C" + "; seconds = 2")
    lines, told, err = run("--peer", "slow", "--peer", "quick", "--work", "decode", "--rounds", "2", "--rows", "5")
    assert (tmp_path / "order").read_text() == "ABC" * 5
    (result,) = told["results"]
    assert result["sides"]["jaxinfer"]["tokens_per_second"] == {"median": 15 * 0.375, "min": 15 / 8, "max": 15}
    assert result["sides"]["slow"]["ratio"] == {"median": 1.5, "min": 0.5, "max": 4}
    assert result["sides"]["quick"]["ratio"] == {"median": 0.75, "min": 0.25, "max": 2}
    assert result["best_peer"] == "quick" and "0.75 times as fast (0.25 to 2.00)" in lines[-1]
    assert result["sides"]["slow"]["same_ids"] == "20 of 20" and told["versions"]["slow"] == "1.2"
    assert err == ""


def test_the_exact_form_is_measured_beside_the_one_that_rounds(run, stand_in):
    stand_in("jaxinfer")
    stand_in("other")
    _, told, _ = run("--peer", "other", "--dtype", "int8:dynamic", "--rounds", "1")
    for result in told["results"]:
        assert [x["form"] for x in result["sides"].values()] == ["int8:dynamic", "int8", "Q8"]
        assert result["best_peer"] == "other"


def test_ids_are_counted_up_to_the_first_that_differs():
    assert sides.alike([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == (4, 6)


def test_other_ids_in_float32_are_told(run, stand_in):
    stand_in("jaxinfer")
    stand_in("other", "ids[0][2] = -1")
    _, told, err = run("--peer", "other", "--dtype", "float32", "bfloat16", "--work", "decode", "--rounds", "1")
    assert [x["sides"]["other"]["same_ids"] for x in told["results"]] == ["2 of 4", "2 of 4"]
    assert err.count("\n") == 1 and "in float32 other gives 2 of the 4 ids that jaxinfer gives" in err


def test_a_side_that_computes_while_another_is_timed_is_told(run, stand_in):
    spin = "import threading; threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()"
    stand_in("jaxinfer", "time.sleep(0.3)")
    stand_in("restless", spin)
    _, told, err = run("--peer", "restless", "--work", "decode", "--rounds", "1")
    assert told["results"][0]["cores_of_others"] > 0.05
    assert "while a side was timed the others computed on" in err


# --- those that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "why"),
    [
        ("if turn == 2: sys.exit('out of luck')", r"it ended \(1\) at 'turn'; its last words: out of luck"),
        ("if turn == 2: os.kill(os.getpid(), 9)", r"it ended \(-9\) at 'turn'; its last words: none"),
        ("if turn == 2: time.sleep(60)", r"no answer to 'turn' in 5 s; its last words: none"),
        ("1 / 0", r"it ended \(1\) at 'turn'; its last words: ZeroDivisionError: division by zero"),
    ],
)
def test_a_side_that_is_lost_is_left_out_and_the_rest_goes_on(run, stand_in, difference, why):
    stand_in("jaxinfer")
    stand_in("lost", difference)
    stand_in("other")
    patience = ("--timeout", "5") if "sleep" in difference else ()
    _, told, err = run("--peer", "lost", "--peer", "other", "--rounds", "1", *patience)
    (left,) = told["left_out"]
    assert left["side"] == "lost" and re.fullmatch(why, left["why"])
    assert err.count("\n") == 1 and f"lost in bfloat16 is left out: {left['why']}" in err
    assert [list(x["sides"]) for x in told["results"]] == [["jaxinfer", "other"]] * 2


def test_without_jaxinfer_there_is_nothing_to_compare(run, stand_in):
    stand_in("jaxinfer", "raise ValueError('no more')")
    stand_in("other")
    with pytest.raises(ValueError, match="jaxinfer in bfloat16: it ended .*ValueError: no more"):
        run("--peer", "other")


def test_a_peer_that_is_not_installed_gets_a_line(run, stand_in, capsys):
    stand_in("jaxinfer")
    stand_in("other")
    stand_in("absent", package="no_package_has_this_name")
    _, told, err = run("--peer", "absent", "--peer", "other", "--work", "prefill", "--rounds", "1")
    remedy = "pip install what-absent-needs into an environment and pass --peer absent=ENV/bin/python"
    assert err == f"bench.py: absent is not installed: {remedy}\n"
    assert list(told["results"][0]["sides"]) == ["jaxinfer", "other"]
    with pytest.raises(ValueError, match="there is no peer to measure beside"):
        run("--peer", "absent")


def test_a_command_names_no_directory_of_an_interpreter(run, stand_in):
    stand_in("jaxinfer")
    stand_in("other")
    _, told, _ = run("--peer", f"other={sys.executable}", "--work", "prefill", "--rounds", "1")
    assert f"--peer other={pathlib.Path(sys.executable).name} " in told["command"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--peer gpt.cpp", "gpt.cpp is no peer: take transformers, llama.cpp, vllm"),
        ("--peer vllm=/no/such/python", "/no/such/python is no interpreter"),
        ("--dtype int7", "invalid choice: 'int7'"),
        ("--prefill-rows 0", "--prefill-rows is 0: it must be at least 1"),
        ("--timeout 0", "--timeout is 0.0: it must be at least 1"),
        ("--model somewhere", "not allowed with argument --shape"),
    ],
)
def test_a_wrong_flag_is_refused(words, says, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_args(["peers", "--shape", "x.toml", *words.split()])
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_anything_is_written(run, stand_in, monkeypatch):
    stand_in("jaxinfer")
    stand_in("other")
    monkeypatch.setattr(Files, "write_random", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(jaxinfer.kernels, "free_memory", lambda: 10_000)
    with pytest.raises(ValueError, match="bfloat16 needs 2 times .* take fewer peers or rows"):
        run("--peer", "other")
    monkeypatch.setattr(jaxinfer.kernels, "free_memory", lambda: None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 10_000}))
    with pytest.raises(ValueError, match="the sides' files need .* set TMPDIR"):
        run("--peer", "other")


# --- the worker's process -------------------------------------------------------------------------------------------


def test_a_worker_ends_with_its_block_and_its_chatter_goes_to_the_log(tmp_path):
    script = tmp_path / "talks.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
        f"sys.path.insert(0, {str(sides.WORKERS)!r})\n"
        "import answering\n"
        "class Talker:\n"
        "    version, cache = '1', 'none'\n"
        "    def __init__(self, **_): print('loading')\n"
        "    def prepare(self, work, ids, new_tokens): self.ids = ids; print('ready')\n"
        "    def turn(self): return 0.5, self.ids\n"
        "answering.serve(Talker)\n"
    )
    with Worker(sys.executable, script, timeout=30) as worker:
        assert worker.ask("load", model="nothing") == {"version": "1", "cache": "none"}
        assert worker.ask("prepare", work="decode", ids=[[1, 2]], new_tokens=3) == {}
        assert worker.ask("turn") == {"seconds": 0.5, "ids": [[1, 2]]}
        assert worker.last_words() == "ready" and worker.cpu_seconds() > 0
    assert worker.process.returncode == 0


def test_a_worker_that_cannot_start_is_lost(tmp_path):
    with Worker(sys.executable, tmp_path / "none.py", timeout=30) as worker, pytest.raises(Lost, match="No such file"):
        worker.ask("load")


def test_packages_are_found_without_importing_them():
    assert installed(sys.executable, "transformers") and not installed(sys.executable, "no_package_has_this_name")


# --- GGUF ------------------------------------------------------------------------------------------------------------


def saved(directory, **changes):
    """(params, config) of a checkpoint in bfloat16, all of it drawn at random."""
    raw = TINY | changes
    config = models.config_from_hf(raw).replace(dtype="bfloat16")
    params = tiny_params(config)
    save_huggingface(directory, params, raw)
    return params, config


def read(path):
    """The tensors of a file, and its fields."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    arrays = {}
    for tensor in reader.tensors:
        array = tensor.data.view(jnp.bfloat16) if tensor.tensor_type.name == "BF16" else tensor.data
        arrays[tensor.name] = np.asarray(array.astype(np.float32)).reshape([int(n) for n in tensor.shape[::-1]])
    return arrays, {name: field.contents() for name, field in reader.fields.items()}, reader


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_holds_the_params(tmp_path, kind, tied):
    pytest.importorskip("gguf")
    params, config = saved(tmp_path / "model", tie_word_embeddings=tied)
    gguf_file.write_gguf(tmp_path / "model", tmp_path / "file.gguf", kind)
    arrays, fields, reader = read(tmp_path / "file.gguf")
    N, K, H, D = 6, 3, 8, 24
    for i, layer in enumerate(params["layers"]):
        for name, ours, heads in (("attn_q", "q", N), ("attn_k", "k", K)):
            halves = arrays.pop(f"blk.{i}.{name}.weight").reshape(heads, H // 2, 2, D)
            undone = np.concatenate([halves[:, :, 0], halves[:, :, 1]], 1)  # even rows, then odd rows
            np.testing.assert_array_equal(undone, np.asarray(layer[ours], np.float32))
        same = {"attn_v": "v", "attn_output": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
        for name, ours in same.items():
            found = arrays.pop(f"blk.{i}.{name}.weight")
            np.testing.assert_array_equal(found, np.asarray(layer[ours], np.float32).reshape(found.shape))
        for name, ours in {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}.items():
            found = arrays.pop(f"blk.{i}.{name}.weight")
            np.testing.assert_array_equal(found, np.asarray(layer[ours]["scale"], np.float32))
    np.testing.assert_array_equal(arrays.pop("token_embd.weight"), np.asarray(params["embed"], np.float32))
    np.testing.assert_array_equal(arrays.pop("output_norm.weight"), np.asarray(params["norm"]["scale"], np.float32))
    if not tied:
        np.testing.assert_array_equal(arrays.pop("output.weight"), np.asarray(params["head"], np.float32))
    assert not arrays
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2} == {kind}
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 1} == {"F32"}
    told = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    assert told.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert told == {
        "vocab_size": 256, "context_length": 512, "embedding_length": D, "block_count": 2,
        "feed_forward_length": 50, "attention.head_count": N, "attention.head_count_kv": K,
        "attention.key_length": H, "attention.value_length": H, "rope.dimension_count": H, "rope.freq_base": 10000.0,
    }  # fmt: skip
    assert fields["tokenizer.ggml.model"] == "no_vocab"


def test_the_bytes_of_a_gguf_file_are_those_that_a_step_reads(tmp_path):
    pytest.importorskip("gguf")
    for tied in (False, True):  # its head, or its embedding, is read whole
        _, config = saved(tmp_path / f"{tied}", tie_word_embeddings=tied)
        gguf_file.write_gguf(tmp_path / f"{tied}", tmp_path / "file.gguf", "BF16")
        layers = sum(math.prod(matrix) for spec in config.layers for matrix in roofline.products(config, spec))
        told = gguf_file.sizes(tmp_path / "file.gguf")
        assert told["weight_bytes"] == 2 * (256 * 24 + layers) + 4 * 24 * 5
        assert told["tensors"] == {"BF16": 2 * 7 + 2 - tied, "F32": 5}


def test_neighbours_rotated_give_the_scores_of_halves_rotated(tmp_path):
    pytest.importorskip("gguf")
    params, config = saved(tmp_path / "model")
    gguf_file.write_gguf(tmp_path / "model", tmp_path / "file.gguf", "F32")
    arrays, fields, _ = read(tmp_path / "file.gguf")
    x = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)  # [T, D]
    rope = config.layers[0].rope
    cos, sin = ops.angles(jnp.arange(5)[None], rope, 5)
    wanted = {}
    for name in ("q", "k"):
        halves = jnp.einsum("TD,NHD->TNH", x, params["layers"][1][name].astype(jnp.float32))
        wanted[name] = np.asarray(ops.rotate(halves[None], cos, sin)[0])
    angle = np.arange(5)[:, None] * fields["llama.rope.freq_base"] ** -(np.arange(0, 8, 2) / 8)  # [T, H / 2]
    found = {}
    for name in ("q", "k"):
        pairs = (x @ arrays[f"blk.1.attn_{name}.weight"].T).reshape(5, -1, 4, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
        found[name] = np.stack([turned.real, turned.imag], -1).reshape(5, -1, 8)
    for head in range(6):
        scores = wanted["q"][:, head] @ wanted["k"][:, head // 2].T
        np.testing.assert_allclose(found["q"][:, head] @ found["k"][:, head // 2].T, scores, rtol=1e-3, atol=1e-3)


def test_scaled_rope_is_written_as_what_divides_its_frequencies(tmp_path):
    pytest.importorskip("gguf")
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    _, config = saved(tmp_path / "model", rope_scaling=scaling)
    gguf_file.write_gguf(tmp_path / "model", tmp_path / "file.gguf", "BF16")
    arrays, fields, _ = read(tmp_path / "file.gguf")
    plain = fields["llama.rope.freq_base"] ** -(np.arange(0, 8, 2) / 8)
    found = plain / arrays["rope_freqs.weight"]
    np.testing.assert_allclose(found, config.layers[0].rope.frequency, rtol=1e-6)
    assert found[-1] < 0.2 * plain[-1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen3"}, "model_type llama alone, and this is qwen3"),
        ({"attention_bias": True}, "without biases alone"),
    ],
)
def test_what_a_gguf_file_would_not_say_is_refused(tmp_path, changes, says):
    pytest.importorskip("gguf")
    saved(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=says):
        gguf_file.write_gguf(tmp_path / "model", tmp_path / "file.gguf", "BF16")
    assert not (tmp_path / "file.gguf").exists()


def test_rope_that_scales_more_than_frequencies_is_refused():
    config = models.config_from_hf(TINY)
    spec = config.layers[0].replace(rope=RopeSpec(frequency=(1.0, 0.1), scale=1.2))
    with pytest.raises(ValueError, match="scales frequencies alone"):
        gguf_file.check(TINY, config.replace(layers=(spec,)))


def test_without_the_package_gguf_llama_cpp_is_left_out(run, stand_in, monkeypatch):
    stand_in("jaxinfer")
    stand_in("other")
    stand_in("llama.cpp")
    monkeypatch.setitem(sys.modules, "gguf", None)
    _, told, _ = run("--peer", "llama.cpp", "--peer", "other", "--work", "prefill", "--rounds", "1")
    assert [x["why"] for x in told["left_out"]] == ["its files are written with the package gguf: pip install gguf"]
    assert list(told["results"][0]["sides"]) == ["jaxinfer", "other"]
