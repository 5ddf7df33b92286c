"""decode.py --draft: the same text whatever guesses, a report that adds up, and what is refused."""

import io
import json
import shutil
import types

import jax
import pytest
import screen

import jaxinfer
from jaxinfer import models, speculation, weights
from jaxinfer.testing import tiny_config

PROMPTS = ("def f(x):", "a longer prompt")
WORDS = ("--prompt", *PROMPTS, "--max-new-tokens", 18, "--temperature", 0.8)
LETTERS = [f"{ord(c)}=60" for c in "abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """Without most optimizations: the laws are the same."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def head(tiny, tmp_path_factory):
    """A random head for the tiny model."""
    params, config = jaxinfer.load(tiny)
    shape, directory = models.head_config(config), tmp_path_factory.mktemp("head") / "head"
    own = models.fingerprint(params, config)
    weights.save_head(directory, models.init_head(shape, jax.random.key(0)), shape, own)
    return directory


@pytest.fixture
def run(decode, tiny, capsys):
    """Runs the script in this process: (the JSON on its last line or what it printed, stderr)."""

    def run(*words, model=tiny):
        source = [] if "--random-weights" in words else ["--model", str(model)]
        code = decode.main(decode.parse_args([*source, "--no-compile-cache", *map(str, words)]))
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out.splitlines()[-1]) if "--json" in words else out, err

    return run


@pytest.fixture(scope="module")
def plain(decode, tiny):
    """What the model says alone."""
    model = decode.load(decode.parse_args(["--model", str(tiny), "--prompt", "a"]))
    ids = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    sampling = jaxinfer.Sampling(temperature=0.8, seed=[0, 0])
    result = jaxinfer.generate(model.params, model.config, ids, sampling=sampling, max_new_tokens=18)
    return result.ids[:, :18].tolist()


@pytest.fixture
def weighed(decode, monkeypatch):
    """A pass of any draft costs a quarter of the model's: measuring it compiles two more programs."""
    import drafting

    monkeypatch.setattr(drafting, "measure", lambda *_: 0.25)


# --- what it says, and how it fared --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ("--draft layers:1 --num-draft-tokens 2", 2),
        ("--draft {tiny} --num-draft-tokens 5 --no-stream", 5),
        ("--draft {tiny} --draft-tree 2,2,1", 3),
        ("--draft head:{head}", 4),
    ],
)
def test_the_text_is_the_same_whatever_guesses_and_the_report_adds_up(run, weighed, plain, tiny, head, words, places):
    words = words.format(tiny=tiny, head=head).split()
    report, _ = run(*WORDS, *words, "--json")
    assert report["ids"] == plain
    told = report["speculation"]
    assert (told["draft"], told["rule"], len(told["accepted_per_position"])) == (words[1], "shared", places)
    assert told.get("tree", told.get("num_draft_tokens")) == ("2,2,1" if "--draft-tree" in words else places)
    assert told["rounds"] + told["accepted"] == sum(report["new_tokens"]) == 36
    assert told["tokens_per_round"] == 36 / told["rounds"]
    assert 0 <= told["accepted"] <= told["drafted"] <= told["rounds"] * places
    if str(tiny) in words:
        assert told["acceptance_rate"] == 1
        assert told["rounds"] < 36 / 2
    foretold = float(speculation.speedup(told["acceptance_rate"], 0.25, places))
    assert told["predicted_speedup"] == pytest.approx(foretold, rel=1e-4)
    assert "measured_speedup" not in told


def test_compare_measures_the_speed_up_and_says_whether_the_ids_are_the_same(run, small, plain, tmp_path):
    words = ("--draft", small, "--adaptive", "--num-draft-tokens", 2, "--compare", "--profile", tmp_path)
    report, _ = run(*WORDS, *words, "--json")
    told = report["speculation"]
    assert report["ids"] == plain
    assert (told["adaptive"], told["same_ids"], told["differs_at"]) == (True, True, None)
    assert told["measured_speedup"] > 0
    assert told["cost"] > 0
    assert list(tmp_path.rglob("*.xplane.pb"))
    line = screen.fared(told, "float32")
    assert "2 tokens a round at most, rule shared: " in line
    assert line.endswith("measured, with the same ids")
    line = screen.fared(told | {"same_ids": False, "differs_at": {"row": 1, "token": 7}}, "bfloat16")
    assert "plain decoding differs from token 7 of row 1 on, where bfloat16 rounds" in line


def test_a_stop_string_cuts_the_text_at_the_same_place(run, weighed):
    words = ("--prompt", *PROMPTS, "--max-new-tokens", 24, "--logit-bias", *LETTERS)
    free = run(*words, "--json")[0]["text"][0]
    stop = ("--stop", free[10:13])
    alone, _ = run(*words, *stop, "--json")
    report, _ = run(*words, *stop, "--draft", "ngram", "--json")
    assert alone["text"][0] == free[: free.index(free[10:13])]
    assert [report[key] for key in ("text", "ids", "finish")] == [alone[key] for key in ("text", "ids", "finish")]


def test_a_chat_goes_on_turn_by_turn_with_a_draft(run, weighed, tiny, monkeypatch, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    words = ("--chat", "--max-new-tokens", 5, "--max-length", 64, "--logit-bias", *LETTERS)
    said = []
    for more in ((), ("--draft", "layers:1", "--adaptive")):
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\nyou\n"))
        said.append(run(*words, *more, model=directory))
    (alone, _), (text, err) = said
    assert text == alone
    assert len(text.splitlines()) == 2
    assert "% of what was tried accepted" in err


def test_random_weights_may_be_guessed_for(run, weighed, shape):
    words = ("--random-weights", shape, "--prompt-length", 9, "--max-new-tokens", 12, "--temperature", 0, "--json")
    report, _ = run(*words, "--draft", "ngram", "--rule", "token")
    assert report["ids"] == run(*words)[0]["ids"]
    assert report["speculation"]["rule"] == "token"


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--rule token", "--rule says how a draft is used: give --draft"),
        ("--num-draft-tokens 4", "--num-draft-tokens says how a draft is used"),
        ("--draft-tree 2,1", "--draft-tree says how a draft is used"),
        ("--adaptive", "--adaptive says how a draft is used"),
        ("--compare", "--compare says how a draft is used"),
        ("--draft guess", "--draft guess is not understood, and no directory: give ngram, layers:N, head:builtin"),
        ("--draft layers:two", "--draft layers:two is not understood"),
        ("--draft head:", "--draft head: is not understood"),
        ("--draft ngram --num-draft-tokens 0", "--num-draft-tokens is 0: it must be at least 1"),
        ("--draft ngram --rule fast", "invalid choice: 'fast'"),
        ("--draft ngram --draft-tree 2,1", "--draft-tree and --draft ngram contradict each other"),
        ("--draft layers:1 --draft-tree 2,x", "--draft-tree is 2,x: write the guesses after each of a level"),
        ("--draft layers:1 --draft-tree 2 --rule block", "--draft-tree and --rule block contradict each other"),
        ("--draft layers:1 --draft-tree 2 --num-draft-tokens 4", "--num-draft-tokens and --draft-tree contradict"),
    ],
)
def test_flags_of_a_draft_that_make_no_sense_are_refused(refused, words, says):
    refused(["--prompt", "a", *words.split()], says, 2)


def test_a_draft_that_was_trained_is_not_for_random_weights_nor_a_comparison_for_a_chat(refused):
    refused(["--random-weights", "x", "--draft", "builtin"], "--random-weights and --draft builtin contradict", 2)
    refused(["--chat", "--draft", "ngram", "--compare"], "and --compare contradict each other", 2)


@pytest.fixture(scope="module")
def others(small, tmp_path_factory):
    """Drafts for other models: one whose tokenizer has two letters swapped, a head of another width."""
    directory = tmp_path_factory.mktemp("others")
    shutil.copytree(small, directory / "swapped")
    file = directory / "swapped" / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(raw))
    shape = models.head_config(tiny_config(width=16, num_heads=2, vocab_size=256))
    weights.save_head(directory / "head", models.init_head(shape, jax.random.key(0)), shape, "D16-V256-L3-abc")
    return directory


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--draft {others}/swapped", "vocabularies (id 97 is 'a' and 'b'; id 98 is 'b' and 'a'): take a draft with"),
        ("--draft head:{others}/head", "was trained for D16-V256-L3-abc but {tiny} is D32-V256-L2-"),
        ("--draft {others}/head", "--draft {others}/head: this is a head: write --draft head:{others}/head"),
        ("--draft head:{others}/nowhere", "--draft head:{others}/nowhere: there is no directory {others}/nowhere"),
        ("--draft head:{tiny}", "is no draft head (its model_type is 'llama')"),
        ("--draft layers:2", "--draft layers:2: the draft takes the first 2 layers but the target has 2: take 1 to 1"),
        ("--draft ngram --num-draft-tokens 64", "num_draft_tokens is 64: it must be from 1 to 63"),
        ("--draft layers:1 --draft-tree 8,8", "the draft tree has 72 nodes: it must have from 1 to 63"),
        ("--draft ngram --num-draft-tokens 8 --max-length 8", "8 needs 9 positions a round but the cache holds 8"),
        ("--draft layers:1 --draft-tree 2,2 --cache h2o", "so it holds no draft tree"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(refused, tiny, others, words, says):
    words = words.format(tiny=tiny, others=others).split()
    says = says.format(tiny=tiny, others=others)
    refused(["--model", str(tiny), "--no-compile-cache", "--prompt", "a", *words], says, 1)


def test_a_draft_larger_than_memory_is_refused_by_name(refused, tiny, small, monkeypatch):
    from jaxinfer.weights import shards

    free = iter([10**12, 1000])  # the model's, then the draft's
    monkeypatch.setattr(shards, "kernels", types.SimpleNamespace(free_memory=lambda: next(free)))
    words = ["--model", str(tiny), "--no-compile-cache", "--prompt", "a", "--draft", str(small)]
    refused(words, f"--draft {small}: the weights need 0.00 GB of this process's memory, 0.00 GB are free", 1)
