"""scripts/decode.py on a tiny model: what it prints, that its laws hold, and what it refuses."""

import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import pytest

import jaxinfer
from jaxinfer import models, roofline
from jaxinfer.testing import byte_tokenizer
from jaxinfer.testing.tiny import tiny_params
from jaxinfer.training.export import save_huggingface

pytestmark = pytest.mark.usefixtures("quickly_compiled")
ROOT = pathlib.Path(__file__).parents[2]
RAW = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
PROMPTS = ["def f(x):", "import os", "a longer prompt than the others"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
LETTERS = [f"{ord(c)}=60" for c in "abcdefgh"]  # so that an answer is text that encodes back to its ids


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    save_huggingface(directory, tiny_params(models.config_from_hf(RAW)), RAW)
    byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def run(decode, model, capsys):
    """Runs the script in this process: (exit code, the JSON on its last line or what it printed, stderr)."""

    def run(*words, model=model):
        source = [] if "--random-weights" in words else ["--model", str(model)]
        code = decode.main(decode.parse_args([*source, "--no-compile-cache", *map(str, words)]))
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if "--json" in words and not code % 130 else out, err

    return run


def told(run, *words, **options):
    code, report, err = run(*words, "--json", **options)
    assert code == 0, err
    return report


# --- what it prints ------------------------------------------------------------------------------------------------


def test_the_json_line_tells_all(run):
    report = told(run, "--prompt", *PROMPTS[:2], "--max-new-tokens", 12)
    assert {"model", "platform", "devices", "dtype", "gb_per_second", "compiled_programs"} <= set(report)
    assert report["cache"]["kind"] == "auto"
    assert report["cache"]["bytes"] == 2 * 2 * 2 * 64 * 2 * 8 * 4 + 2 * 4  # kv, layers, rows, S, K, H, float32; lengths
    assert report["weight_bytes"] == roofline.weight_bytes(models.config_from_hf(RAW))
    assert report["prompt_tokens"] == [9, 9]
    assert report["new_tokens"] == [12, 12]
    assert [len(ids) for ids in report["ids"]] == [12, 12]
    assert [bytes(ids).decode(errors="replace") for ids in report["ids"]] == report["text"]
    assert report["finish"] == ["length", "length"]
    assert {"load", "compile", "prefill", "decode"} <= set(report["seconds"])
    assert all(value > 0 for value in report["tokens_per_second"].values())


def test_text_goes_to_stdout_and_the_report_to_stderr(run):
    report = told(run, "--prompt", "def f(x):", "--max-new-tokens", 8)
    code, out, err = run("--prompt", "def f(x):", "--max-new-tokens", 8)
    assert code == 0
    assert out == f"def f(x):{report['text'][0]}\n"
    assert re.search(r"tokens 9 \+ 8 \(length\).*load .*compile .*prefill .*decode .*tokens/s.*GB/s", err, re.DOTALL)


def test_several_rows_are_shown_one_after_the_other(run):
    report = told(run, "--prompt", *PROMPTS, "--max-new-tokens", 8)
    _, out, _ = run("--prompt", *PROMPTS, "--max-new-tokens", 8)
    rows = [f"--- {n} of 3 ---\n{PROMPTS[n - 1]}{report['text'][n - 1]}\n" for n in (1, 2, 3)]
    assert out == "".join(rows)


def test_a_prompt_may_come_from_a_file_or_stdin(run, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("def f(x):\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(x):\n"))
    ids = [told(run, *words, "--max-new-tokens", 6)["ids"] for words in
           (("--prompt", "def f(x):"), ("--prompt-file", file), ("--prompt-file", "-"))]  # fmt: skip
    assert ids[0] == ids[1] == ids[2]


def test_random_weights_need_no_checkpoint_and_show_ids(run, tmp_path):
    shape = tmp_path / "shape.toml"
    shape.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in RAW.items()) + "\neos_token_id = 3\n")
    report = told(run, "--random-weights", shape, "--prompt-length", 9, "--max-new-tokens", 11)
    assert (report["model"], report["dtype"]) == ("shape", "float32")
    assert (report["prompt_tokens"], report["new_tokens"]) == ([9], [11])
    assert report["text"][0].split() == [str(i) for i in report["ids"][0]]


def test_profile_leaves_a_trace(run, tmp_path):
    told(run, "--prompt", "def f(x):", "--max-new-tokens", 24, "--profile", tmp_path)
    assert list(tmp_path.rglob("*.xplane.pb"))


# --- laws ----------------------------------------------------------------------------------------------------------


def test_greedy_gives_the_same_ids_every_time_streamed_or_not(run):
    words = ("--prompt", "def f(x):", "--max-new-tokens", 32, "--temperature", 0)
    first = told(run, *words)
    assert told(run, *words)["ids"] == first["ids"]
    assert told(run, *words, "--no-stream")["ids"] == first["ids"]
    assert told(run, *words, "--prefill-chunk", 4)["ids"] == first["ids"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_three_prompts_in_one_call_give_each_what_it_gets_alone(run, temperature):
    words = ("--max-new-tokens", 20, "--dtype", "float32", "--temperature", temperature)
    together = told(run, "--prompt", *PROMPTS, *words)["ids"]
    assert together == [told(run, "--prompt", prompt, *words)["ids"][0] for prompt in PROMPTS]


def test_samples_differ_and_are_those_of_their_seeds(run):
    words = ("--prompt", "def f(x):", "--max-new-tokens", 16, "--temperature", 1)
    four = told(run, *words, "--num-samples", 4, "--seed", 5)["ids"]
    assert len({tuple(row) for row in four}) == 4
    assert told(run, *words, "--num-samples", 4, "--seed", 5)["ids"] == four
    assert told(run, *words, "--seed", 7)["ids"][0] == four[2]


def test_a_stop_string_cuts_the_text_before_it(run):
    words = ("--prompt", "def f(x):", "--max-new-tokens", 40, "--logit-bias", *LETTERS)
    free = told(run, *words)["text"][0]
    stop = free[10:13]
    report = told(run, *words, "--stop", "nowhere", stop)
    assert report["text"][0] == free[: free.index(stop)]
    assert report["finish"] == ["stop"]
    assert report["new_tokens"] == [free.index(stop) + 3]


def test_a_budget_without_room_ends_at_the_cache(run):
    report = told(run, "--prompt", "x" * 16, "--max-length", 64)
    assert report["new_tokens"] == [64 - 16 + 1]  # the newest token is in no cache
    assert report["finish"] == ["length"]


def answers(run, decode, monkeypatch, model, lines, *words):
    """What an interactive chat printed, and the (read, made) tokens of each turn."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code, out, err = run("--chat", *words, model=model)
    assert code == 0, err
    return out, [(int(a), int(b)) for a, b in re.findall(r"(\d+) \+ (\d+) \(", err)], err


def test_a_chat_reads_only_what_is_new(run, decode, chat_model, monkeypatch):
    words = ("--max-new-tokens", 5, "--logit-bias", *LETTERS)
    out, tokens, _ = answers(run, decode, monkeypatch, chat_model, ["hi", "", "you"], *words)
    first, second = out.splitlines()
    assert tokens == [(len("[u]hi\n[a]"), 5), (len("\n[u]you\n[a]"), 5)]
    whole = told(run, "--prompt", f"[u]hi\n[a]{first}\n[u]you\n[a]", *words)
    assert whole["text"] == [second]


def test_a_chat_goes_back_where_the_template_writes_an_answer_otherwise(run, decode, chat_model, monkeypatch):
    template = chat_model / "chat_template.jinja"
    template.write_text(TEMPLATE.replace("m.content", "m.content|upper"))
    words = ("--max-new-tokens", 5, "--logit-bias", *LETTERS)
    try:
        out, tokens, _ = answers(run, decode, monkeypatch, chat_model, ["hi", "you"], *words)
    finally:
        template.write_text(TEMPLATE)
    first, second = out.splitlines()
    assert tokens == [(9, 5), (5 + len("\n[u]you\n[a]"), 5)]
    whole = told(run, "--prompt", f"[u]HI\n[a]{first.upper()}\n[u]YOU\n[a]", *words)
    assert whole["text"] == [second]


def test_a_chat_says_when_the_cache_is_full(run, decode, chat_model, monkeypatch):
    words = ("--max-new-tokens", 5, "--logit-bias", *LETTERS)
    out, tokens, err = answers(run, decode, monkeypatch, chat_model, ["hi", "y" * 110, "there"], *words)
    assert len(out.splitlines()) == len(tokens) == 1
    assert "the cache of 128 tokens is full" in err.splitlines()[0]


def test_one_turn_of_chat_comes_from_the_prompt(run, chat_model):
    words = ("--max-new-tokens", 5)
    chat = told(run, "--chat", "--prompt", "hi", *words, model=chat_model)
    assert chat["ids"] == told(run, "--prompt", "[u]hi\n[a]", *words)["ids"]


def test_ctrl_c_ends_the_text_and_the_report_comes(run, decode, monkeypatch):
    show = decode.Screen.show

    def pressed(self, everything=False):
        if not everything:
            os.kill(os.getpid(), signal.SIGINT)
        show(self, everything)

    monkeypatch.setattr(decode.Screen, "show", pressed)
    code, report, _ = run("--prompt", "def f(x):", "--max-new-tokens", 40, "--json")
    assert code == 130
    assert report["finish"] == ["interrupted"]
    assert report["new_tokens"] == [1]


# --- presets -------------------------------------------------------------------------------------------------------


def test_flags_override_a_preset(decode, tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text('temperature = 1\nstop = ["a", "b"]\nstream = false\nprompt_length = 9\n')
    args = decode.parse_args(["--config", str(preset), "--top-k", "3", "--stream", "--stop", "c"])
    assert (args.temperature, args.top_k, args.stop, args.stream, args.prompt_length) == (1.0, 3, ("c",), True, 9)
    args = decode.parse_args(["--config", str(preset), "--prompt", "a"])
    assert (args.prompt, args.prompt_length) == (("a",), None)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "decode").glob("*.toml")), ids=lambda path: path.stem)
def test_the_presets_that_ship_are_read(decode, path):
    decode.parse_args(["--config", str(path), "--prompt", "a"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temprature = 1", "has the unknown key 'temprature'"),
        ('temperature = "hot"', "temperature = 'hot': it must be of type float"),
        ("top_k = true", "top_k = True: it must be of type int"),
        ('stop = "a"', "it must be of type list of strings"),
        ('dtype = "int3"', "must be one of auto, float32"),
        ("temperature =", "is not TOML"),
    ],
)
def test_a_preset_that_is_not_understood_is_refused(refused, tmp_path, text, says):
    preset = tmp_path / "preset.toml"
    preset.write_text(text)
    refused(["--config", str(preset), "--prompt", "a"], says, 2)


@pytest.mark.parametrize("form", ["int8", "int4:group=8"])
def test_weights_in_codes_are_reported_and_say_what_the_library_says(run, model, form):
    got = told(run, "--prompt", "import os", "--quantize", form, "--temperature", 0, "--max-new-tokens", 12)
    params, config = jaxinfer.load(model, quantize=form)
    prompt = jaxinfer.Tokenizer(model).encode("import os")
    assert got["ids"] == jaxinfer.generate(params, config, [prompt], max_new_tokens=12).ids[:, :12].tolist()
    assert got["weights"] == form
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert got["weight_bytes"] == held == roofline.weight_bytes(config, roofline.weights_of(form))
    _, plan, _ = run("--plan", "--quantize", form)
    assert f"in {form}: weights" in plan


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "nothing to continue"),
        ("--prompt a --prompt-length 4", "--prompt and --prompt-length contradict"),
        ("--prompt a --prompt-file b", "--prompt and --prompt-file contradict"),
        ("--random-weights x --prompt a", "--random-weights and --prompt contradict"),
        ("--random-weights x --model y", "--random-weights and --model contradict"),
        ("--random-weights x --chat", "--random-weights and --chat contradict"),
        ("--chat --prompt-length 3", "--chat and --prompt-length contradict"),
        ("--chat --no-stream", "and --no-stream contradict"),
        ("--chat --json", "and --json contradict"),
        ("--chat --num-samples 2", "and --num-samples contradict"),
        ("--prompt=", "prompt 1 is empty"),
        ("--prompt a --max-new-tokens 0", "--max-new-tokens is 0: it must be at least 1"),
        ("--prompt a --num-samples -1", "--num-samples is -1"),
        ("--prompt a --min-new-tokens 200", "more than --max-new-tokens 128"),
        ("--prompt a --logit-bias 3", "write ID=VALUE"),
        ("--prompt a --profile d --max-new-tokens 4", "--profile needs"),
        ("--prompt a --top-k x", "invalid int value"),
        ("--prompt a --config nowhere.toml", "nowhere.toml: No such file"),
        ("--nonsense", "unrecognized arguments"),
    ],
)
def test_flags_that_make_no_sense_are_refused(refused, words, says):
    refused(words.split(), says, 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--prompt a --quantize int7", "cannot be quantized to 'int7': take int8, int4 or int4:group=G"),
        ("--prompt a --quantize int4:group=5", "a group of 5 codes is not to be had"),
        ("--prompt abcdefgh --max-length 4", "the prompt has 8 tokens but the cache holds 4: raise --max-length"),
        (f"--prompt {'a' * 200}", "has 200 tokens but the cache holds 128: that is all the model was made for"),
        ("--prompt a --max-length 9 --max-new-tokens 10", "need 10 positions but --max-length is 9"),
        ("--prompt a --max-length 1000000000000", "GB are free"),
        ("--prompt a --cache paper", "cache kind 'paper' is not known"),
        ("--prompt a --top-p 1.5", "top_p of row 0 is 1.5"),
        ("--prompt a --logit-bias 256=1", "id 256 but ids go from 0 to 255"),
        ("--prompt a --chat", "has no chat template"),
        ("--prompt a --sampling-defaults", "recommends no sampling"),
        ("--prompt-file nowhere.txt", "nowhere.txt: No such file"),
        ("--prompt-file /dev/null", "is empty"),
    ],
)
def test_what_the_model_cannot_do_is_refused(refused, model, words, says):
    refused(["--model", str(model), "--no-compile-cache", *words.split()], says, 1)


def edit(name, change):
    def damage(directory):
        (directory / name).write_bytes(change((directory / name).read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "there is no directory"),
        (lambda directory: (directory / "model.safetensors").unlink(), "holds neither model.safetensors"),
        (edit("model.safetensors", lambda data: data[:-100]), "is truncated"),
        (edit("config.json", lambda data: data.replace(b'"llama"', b'"lama"')), "model_type 'lama'"),
        (edit("config.json", lambda data: data.replace(b"{", b'{"twist": 3,', 1)), "not handled: twist"),
        (edit("config.json", lambda data: data[:20]), "JSON"),
        (edit("tokenizer.json", lambda data: data[:20]), "tokenizer.json is truncated"),
    ],
)
def test_a_damaged_checkpoint_is_refused(refused, model, tmp_path, damage, says):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    damage(directory)
    refused(["--model", str(directory), "--no-compile-cache", "--prompt", "a"], says, 1)


def test_a_bug_still_shows_where(run, decode, monkeypatch):
    def broken(self, everything=False):
        raise ValueError("a bug")

    monkeypatch.setattr(decode.Screen, "show", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("--prompt", "def f(x):", "--max-new-tokens", 4)


# --- as a program of its own ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(start, model, tmp_path_factory):
    """Starts the script with a compilation cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    return functools.partial(start, "--model", model, "--prompt", "def f(x):", XDG_CACHE_HOME=str(cache))


def test_a_second_run_compiles_nothing(program):
    reports = []
    for _ in range(2):
        out, err = program("--max-new-tokens", "12", "--json").communicate()
        assert err == ""
        reports.append(json.loads(out.splitlines()[-1]))
    assert [report["compiled_programs"] for report in reports] == [4, 0]
    assert reports[0]["ids"] == reports[1]["ids"]


def test_a_reader_who_leaves_is_no_error(program):
    process = program("--max-new-tokens", "100")
    assert process.stdout.read(4) == "def "
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
