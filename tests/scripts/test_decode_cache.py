"""decode.py --cache and --plan, as a user meets them."""

import json
import pathlib

import jax
import pytest
from covering import in_full

from jaxinfer import models
from jaxinfer.cache import cache_bytes
from jaxinfer.testing.tiny import tiny_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")
KINDS = ("dense", "paged:page=4", "paged:page=8+int8", "int4:group=4,residual=8", "streaming:sinks=2,recent=6",
         "h2o:budget=8,recent=4", "snapkv:budget=8,window=4", "ring:window=6+float8")  # fmt: skip


@pytest.fixture
def run(decode, tiny, capsys):
    """Runs the script on a tiny model: (stdout, stderr)."""

    def run(*words, code=0):
        assert decode.main(decode.parse_args(["--model", str(tiny), "--no-compile-cache", *words])) == code
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("kind", [*KINDS[:4], *map(in_full, KINDS[4:])])
def test_every_kind_of_cache_continues_a_prompt_and_is_reported(run, kind):
    told = json.loads(run("--prompt", "a long enough text", "--cache", kind, "--max-new-tokens", "12", "--temperature",
                          "0", "--json").out.splitlines()[-1])  # fmt: skip
    assert told["cache"]["kind"] == kind and told["new_tokens"] == [12]
    again = json.loads(run("--prompt", "a long enough text", "other", "--cache", kind, "--max-new-tokens", "12",
                           "--temperature", "0", "--no-stream", "--json").out.splitlines()[-1])  # fmt: skip
    assert again["ids"][0] == told["ids"][0], "beside another row, and in one dispatch"
    if kind in ("dense", "paged:page=4"):
        plain = json.loads(run("--prompt", "a long enough text", "--max-new-tokens", "12", "--temperature", "0",
                               "--json").out.splitlines()[-1])  # fmt: skip
        assert told["ids"] == plain["ids"]


@pytest.mark.parametrize("kind", ["paged:page=4+int8", in_full("h2o:budget=8,recent=4"), "snapkv:budget=8,window=4"])
def test_a_draft_says_what_the_model_says_over_the_same_cache(run, kind):
    words = ("--prompt", "abcabcabcabcabc", "--cache", kind, "--max-new-tokens", "14", "--temperature", "0", "--json")
    plain, drafted = (json.loads(run(*words, *more).out.splitlines()[-1]) for more in ((), ("--draft", "ngram")))
    assert plain["ids"] == drafted["ids"]
    assert drafted["speculation"]["drafted"] > 0


def test_the_plan_says_what_is_taken_and_what_fits_and_takes_nothing(run, tiny):
    words = ("--plan", "--cache", "int8", "--max-length", "1000", "--num-samples", "3", "--memory", "20MB", "--json")
    told = json.loads(run(*words).out)
    config = models.config_from_hf(json.loads((tiny / "config.json").read_text()))
    assert told["cache"]["bytes"] == cache_bytes(config, 3, 1000, "int8")
    assert told["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_params(config)))
    left = 20_000_000 - told["weight_bytes"]
    assert cache_bytes(config, told["fits"]["rows"], 1000, "int8") <= left
    assert cache_bytes(config, told["fits"]["rows"] + 1, 1000, "int8") > left
    shown = run(*words[:-1]).out
    assert "int8 cache of 3 x 1000 tokens" in shown and f"hold {told['fits']['rows']} rows of 1000 tokens" in shown


def test_the_plan_of_a_shape_needs_no_weights(decode, capsys):
    shape = pathlib.Path(__file__).parents[2] / "configs" / "models" / "llama-3-70b.toml"
    words = [
        "--plan",
        "--random-weights",
        str(shape),
        "--cache",
        "int4",
        "--max-length",
        "8192",
        "--dtype",
        "bfloat16",
        "--memory",
        "640GB",
    ]
    assert decode.main(decode.parse_args([*words, "--json"])) == 0
    told = json.loads(capsys.readouterr().out)
    assert 141e9 < told["weight_bytes"] < 142e9
    assert told["fits"]["rows"] > 300
    assert decode.main(decode.parse_args([*words[:-1], "80GB"])) == 0
    assert "80.00 GB do not hold the weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ("--prompt a --cache paper", "cache kind 'paper' is not known", 1),
        ("--prompt a --cache ring", "no layer of this model has a window", 1),
        ("--prompt a --cache h2o+int4", "h2o+int4 is not to be had", 1),
        ("--prompt abcdefgh --cache paged:page=4,pages=2", "the rows need", 1),
        ("--plan --memory lots", "--memory is lots: write a number", 2),
        ("--prompt a --memory 8GB", "add --plan", 2),
        ("--prompt a --cache none", "--cache none keeps nothing", 2),
    ],
)
def test_a_cache_that_cannot_be_is_refused_in_one_line(refused, tiny, words, says, code):
    refused(["--model", str(tiny), "--no-compile-cache", *words.split()], says, code)
