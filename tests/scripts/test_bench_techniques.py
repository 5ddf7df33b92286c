"""scripts/bench.py techniques: the table has every row, what is exact says the same, and the figures add up."""

import json
import statistics

import bench
import jax
import jax.numpy as jnp
import memory
import numpy as np
import pytest
from suites import techniques

import jaxinfer
from jaxinfer import cache, models, roofline
from jaxinfer.testing.tiny import tiny_params

pytestmark = pytest.mark.usefixtures("quickly_compiled")
SHAPE = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
LITTLE = ["--prompt-length", "12", "--new-tokens", "4", "--uncached-tokens", "3", "--rounds", "3", "--batch-size", "2"]
EXACT = ("no-cache", "all-heads", "grouped-heads", "speculation", "batch-2")
ROWS = {  # of the table: rows, form of weights, kind of cache
    "no-cache": (1, None, "none"),
    "cache": (1, None, "dense"),
    "all-heads": (1, None, "dense"),
    "grouped-heads": (1, None, "dense"),
    "window": (1, None, "ring:window=4"),
    "int8": (1, "int8", "dense"),
    "int8:dynamic": (1, "int8:dynamic", "dense"),
    "int4": (1, "int4:group=32", "dense"),
    "int4:dynamic": (1, "int4:group=32,dynamic", "dense"),
    "int8-cache": (1, None, "int8"),
    "speculation": (1, None, "dense"),
    "batch-2": (2, None, "dense"),
}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, little):
    """Runs it: (lines of stdout, the JSON, stderr). `shape=` is of the random weights, None for the built-in model."""
    import runtime

    monkeypatch.setattr(techniques, "rounds_quickly", lambda: True)
    monkeypatch.setattr(runtime, "keep_programs", lambda wanted: None)
    path = tmp_path / "tiny.json"

    def run(*words, shape=SHAPE):
        path.write_text(json.dumps(shape))
        own = ("--shape", str(path)) if shape else ()
        words = ("techniques", *own, *LITTLE, *words, "--json")
        monkeypatch.setattr("sys.argv", ["bench.py", *words])
        bench.main(bench.parse_args(list(words)))
        out, err = capsys.readouterr()
        *lines, last = out.splitlines()
        return lines, json.loads(last), err

    return run


def test_the_table_has_every_technique_and_its_figures_add_up(run, tmp_path):
    where = tmp_path / "new" / "found.json"
    lines, told, err = run("--out", str(where))
    assert json.loads(where.read_text()) == told and not told["skipped"]
    assert where.with_suffix(".png").stat().st_size > 10_000
    found = {row["technique"]: row for row in told["results"]}
    assert list(found) == list(ROWS)
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == list(ROWS)
    assert all(f"{name}: " in err for name in ROWS if name != "cache")

    config = models.config_from_hf(SHAPE)
    plain = roofline.weight_bytes(config, "float32")
    for name, (rows, form, kind) in ROWS.items():
        row = found[name]
        made = rows * (3 if name == "no-cache" else 4)
        took = statistics.median(row["seconds"])
        assert row["tokens"] == made
        assert row["tokens_per_second"]["median"] == pytest.approx(made / took)
        assert row["ms_per_token"]["median"] == pytest.approx(took / made * rows * 1e3)
        times = [made / own / (4 / other) for own, other in zip(row["seconds"], row["baseline_seconds"], strict=True)]
        assert row["ratio"]["median"] == pytest.approx(statistics.median(times))
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert row["share"] == pytest.approx(row["gb_per_second"] / told["ceilings"]["read"]["rate"])
        if name != "all-heads":
            assert row["weight_bytes"] == roofline.weight_bytes(config, roofline.weights_of(form))
            kept = 0 if name == "no-cache" else cache.cache_bytes(config, rows, 16, kind)
            assert row["cache_bytes"] == kept
    assert len(found["cache"]["seconds"]) == 3 * (len(ROWS) - 1) and found["cache"]["ratio"]["max"] == 1
    assert found["int8"]["seconds"] != found["int8"]["baseline_seconds"]
    vectors = 2 * 2 * 16 * 32 * 4  # of keys and values, two more KV heads, positions, numbers, bytes
    assert found["all-heads"]["cache_bytes"] - found["cache"]["cache_bytes"] == vectors
    assert found["all-heads"]["weight_bytes"] - plain == 2 * 2 * 32 * 32 * 4
    step = found["cache"]["bytes_of_a_pass"]  # half way 14 tokens are held; one is written, one embedding looked up
    assert step == plain - 96 * 32 * 4 + 32 * 4 + 2 * 2 * 32 * 4 * (14 + 1)


def test_what_is_exact_says_the_same_and_loses_nothing(run):
    _, told, _ = run("--only", *EXACT, "--check-rows", "2", "--temperature", "1")
    found = {row["technique"]: row for row in told["results"]}
    assert set(found) == {"cache", *EXACT}
    for name in EXACT:
        assert found[name]["same_ids"] and found[name]["lost"] == 0 and found[name]["differs_at"] is None
        assert found[name]["rows_compared"] == found[name]["rows"]
    guessed = found["speculation"]["speculation"]
    assert guessed["tokens_per_round"] == pytest.approx(4 / guessed["rounds"])
    assert guessed["draft"] == "ngram" and found["speculation"]["draft_bytes"] == 0


def test_ids_that_differ_are_shown(run, monkeypatch):
    import contenders

    def wrong(params, config):
        return params | {"head": params["head"][::-1]}, config

    monkeypatch.setattr(contenders.variants, "ungrouped", wrong)
    lines, told, _ = run("--only", "all-heads", "grouped-heads")
    _, wrong_one, right_one = told["results"][0], *told["results"][1:]
    assert (wrong_one["technique"], wrong_one["same_ids"], wrong_one["lost"]) == ("all-heads", False, None)
    assert wrong_one["differs_at"]["row"] == 0 and right_one["same_ids"]
    assert any("`all-heads`" in line and "differ from token 0 on" in line for line in lines)


def test_what_does_not_fit_is_left_out_and_the_rest_measured(run, monkeypatch):
    import contenders

    monkeypatch.setattr(contenders.kernels, "free_memory", lambda: 100_000)
    lines, told, err = run("--only", "batch-64", "grouped-heads", "--batch-size", "64")
    assert [row["technique"] for row in told["results"]] == ["cache", "grouped-heads"]
    twice = 2 * cache.cache_bytes(models.config_from_hf(SHAPE), 64, 16, "dense")
    says = f"it needs {techniques.size(twice)} more, and 0.10 MB are free"
    assert told["skipped"] == {"batch-64": says}
    assert err.count(f"batch-64 is left out: {says}\n") == 1 and f"- `batch-64` is left out: {says}." in lines
    monkeypatch.setattr(contenders.kernels, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="tiny.json needs 98.7 kB for its weights but 1.0 kB are free"):
        run()


def test_what_means_nothing_here_is_left_out(run, monkeypatch):
    monkeypatch.setattr(techniques, "rounds_quickly", lambda: False)
    alike = SHAPE | {"num_key_value_heads": 4}
    args = bench.parse_args(["techniques", "--shape", "unread", "--only", "cache"])
    config = models.config_from_hf(alike)
    args.only = None
    wanted, skipped = techniques.chosen(args, config)
    assert set(skipped) == {"all-heads", "grouped-heads", "int8:dynamic", "int4:dynamic"}
    assert not set(wanted) & set(skipped) and "batch-32" in wanted
    args.only = ["int8:dynamic"]
    assert list(techniques.chosen(args, config)[0]) == ["cache", "int8:dynamic"]
    _, told, _ = run("--only", "cache", shape=alike)
    assert [row["technique"] for row in told["results"]] == ["cache"]


@pytest.mark.parametrize(
    "words",
    [
        {"model_type": "olmo2", "num_key_value_heads": 2},  # a norm over the whole projection
        {"model_type": "qwen2", "num_key_value_heads": 1},  # biases
        {"model_type": "qwen3", "num_key_value_heads": 2},  # a norm a head
    ],
    ids=lambda words: words["model_type"],
)
def test_repeated_heads_compute_the_same_function(words):
    import variants

    config = models.config_from_hf(SHAPE | words)
    params = tiny_params(config)
    other, wide = variants.ungrouped(params, config)
    assert all(spec.num_kv_heads == spec.num_heads for spec in wide.layers)
    assert other["layers"][0]["k"].shape == (4, 32, 32) and other["layers"][0]["q"] is params["layers"][0]["q"]
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, 96)
    told = [jaxinfer.forward(p, c, ids, jaxinfer.init_cache(c, 2, 9))[0] for p, c in ((params, config), (other, wide))]
    np.testing.assert_allclose(told[1], told[0], atol=1e-4)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(lambda x: x.shape, models.param_shapes(wide))


def test_generation_without_a_cache_equals_generation():
    import variants

    config = models.config_from_hf(SHAPE)
    params = tiny_params(config)
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
    for temperature in (0.0, 1.0):
        how = {"sampling": jaxinfer.Sampling(temperature=temperature, seed=[1, 2, 3]), "max_new_tokens": [6, 3, 5]}
        plain = jaxinfer.generate(params, config, prompts, **how)
        other = jaxinfer.generate(params, config, prompts, model=variants.Uncached(config), **how)
        np.testing.assert_array_equal(other.ids, plain.ids)
        np.testing.assert_allclose(other.logprobs, plain.logprobs, atol=1e-4)
    assert len(jax.tree.leaves(other.cache.layers)) == 1  # the ids


def test_memory_that_is_taken_for_a_while_is_seen():
    held = memory.held()
    if held is None:
        pytest.skip("this system does not say")
    taken = np.ones(1 << 23)
    size = taken.nbytes
    del taken
    assert 0.9 * size < memory.above(held) < 1.5 * size
    assert memory.above(memory.held()) < 0.5 * size
    assert memory.above(None) is None


@pytest.fixture
def cut(monkeypatch):
    """The first layer of the built-in model in its place; and a head that does not mind."""
    pytest.importorskip("optax")
    whole = jaxinfer.load

    def cut(name, dtype=None):
        params, config = whole(name, dtype)
        return params | {"layers": params["layers"][:1]}, config.replace(layers=config.layers[:1])

    monkeypatch.setattr(jaxinfer, "load", cut)
    monkeypatch.setattr(models, "fingerprint", lambda params, config: "")
    return cut


def test_what_is_lost_is_what_a_pass_over_the_whole_text_says(cut):
    """Of the model widened, too."""
    import losses

    args = bench.parse_args(["techniques", *LITTLE, "--text-rows", "2", "--text-length", "40"])
    documents, _ = techniques.documented(args)
    wanted = {name: techniques.techniques(args)[name] for name in ("speculation", "cache", "window", "int8")}
    found = techniques.counted(args, wanted, documents)
    assert list(found) == ["cache", "window", "int8"]

    ids, num_bytes = losses.texts(documents, jaxinfer.Tokenizer("builtin"), 2, 20, 40)
    params, config = models.widen(*cut("builtin", jnp.float32), 800, 2, jax.random.key(0))
    near = config.replace(layers=tuple(layer.replace(window=4) for layer in config.layers))
    coded = jaxinfer.quantize(params, "int8")
    for name, own, spec in (("cache", params, config), ("window", params, near), ("int8", coded, config)):
        scores, _ = jaxinfer.forward(own, spec, ids, jaxinfer.init_cache(spec, 2, 40, "none"))
        law = jax.nn.log_softmax(scores[:, 20:-1])
        nats = -jnp.take_along_axis(law, ids[:, 21:, None], 2).sum()
        assert found[name]["bits_per_byte"] == pytest.approx(float(nats) / np.log(2) / num_bytes, rel=1e-4)
        lost = found[name]["bits_per_byte"] / found["cache"]["bits_per_byte"] - 1
        assert found[name]["lost"] == pytest.approx(lost) and (lost == 0) == (name == "cache")


def test_the_head_guesses_for_the_widened_model(run, cut):
    words = ["--widen", "800x2", "--text-rows", "1", "--text-length", "24", "--only", "speculation"]
    lines, told, _ = run(*words, shape=None)
    base, guessed = told["results"]
    assert guessed["same_ids"] and guessed["lost"] == 0 and guessed["bits_per_byte"] == base["bits_per_byte"] > 0
    assert any(f"0 ({base['bits_per_byte']:.4f})" in line for line in lines)
    assert guessed["speculation"]["draft"] == "head:builtin" and guessed["draft_bytes"] > 1_000_000
    assert 0 <= guessed["speculation"]["acceptance_rate"] <= 1 <= guessed["speculation"]["tokens_per_round"]
    assert base["weight_bytes"] > 2 * 3 * 800 * 256 * 4


def test_a_model_of_ones_own_reads_a_text_of_ones_own(run, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog")
    _, told, _ = run("--model", str(tiny), "--text", str(text), "--only", "cache", shape=None)
    (row,) = told["results"]
    assert told["text"] == "text.txt" and (row["lost"], row["bits_per_byte"], row["tokens"]) == (0, None, 4)
    with pytest.raises(ValueError, match="the text has 3 pieces of 12 tokens for 8 rows"):
        run("--model", str(tiny), "--text", str(text), "--only", "batch-8", "--batch-size", "8", shape=None)


def test_another_python_reads_its_own_library(monkeypatch, capsys):
    def other():
        raise ValueError("another text is another model")

    def lacking():
        raise ImportError("No module named 'optax'")

    args = bench.parse_args(["techniques"])
    monkeypatch.setattr(techniques.losses, "held_out", lacking)
    assert techniques.documented(args) == ({}, "random ids")
    assert "No module named 'optax'): pip install" in capsys.readouterr().err
    pytest.importorskip("optax")
    monkeypatch.setattr(techniques.losses, "held_out", other)
    texts, said = techniques.documented(args)
    assert "json/decoder.py" in texts and "def " in texts["json/decoder.py"] and "os.py" not in texts
    assert said.startswith("modules that the built-in model never saw, as Python 3.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--shape nowhere.toml", "nowhere.toml is no file"),
        ("--only cash batch-2", "--only has cash: take some of no-cache, cache"),
        ("--window 16", "--window is 16 but rows have 16 tokens"),
        ("--check-rows 0", "--check-rows is 0"),
        ("--text-length 3", "--text-length is 3: give at least 4, or 0"),
        ("--temperature -1", "--temperature is -1.0"),
        ("--widen big", "--widen is big: write the width"),
        ("--widen 8x8", "cannot be widened to 8 of 8"),
        ("--out a.png", "name the JSON file"),
        ("--prompt-length 99999", "the text has 0 pieces of 99999 tokens"),
        ("--draft nonsense!", "--draft nonsense! is not understood"),
        ("--draft layers:8", "--draft layers:8: the draft takes the first 8 layers"),
        ("--num-draft-tokens 999", "num_draft_tokens is 999"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        bench.main(bench.parse_args(["techniques", *LITTLE, *words.split()]))


def test_a_batch_of_no_rows_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.parse_args(["techniques", *LITTLE, "--batch-size", "0"])
    assert capsys.readouterr().err.endswith("error: --batch-size is 0: it must be at least 1\n")


def test_random_weights_refuse_what_was_trained(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SHAPE))
    for words, says in (
        ("--draft head:builtin", "take ngram or layers:N"),
        ("--text a.txt", "with --shape"),
        ("--widen", "with --shape"),
    ):
        with pytest.raises(ValueError, match=says):
            bench.main(bench.parse_args(["techniques", "--shape", str(path), *words.split()]))
