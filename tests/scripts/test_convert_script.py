"""scripts/convert.py: to a sharded checkpoint and back bit for bit, and nothing half-written under the final name."""

import json
import pathlib
import shutil
import subprocess
import sys

import convert
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models

import jaxinfer
from jaxinfer import hub, models
from jaxinfer.models.names import tensors
from jaxinfer.testing import byte_tokenizer
from jaxinfer.weights import Checkpoint, write_safetensors

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "convert.py"
CASES = [(family, variant) for family, variants in tiny_models.CASES.items() for variant in variants]
SOME = [(family, next(iter(variants))) for family, variants in tiny_models.CASES.items()] + [("gpt2", "untied")]


@pytest.fixture
def run(capsys):
    """Runs the script in this process: (exit code, stdout, stderr)."""

    def run(*words):
        code = convert.main(convert.parse_args(list(map(str, words))))
        return code, *capsys.readouterr()

    return run


def write_model(directory, family="llama", variant="plain", dtype="float32", prefix=None, extra=()):
    """A Hugging Face directory of a case, with random tensors."""
    directory.mkdir()
    tiny_models.hf_config(family, variant).save_pretrained(directory)
    raw = tiny_models.raw_config(directory)
    names, config, draw = models.family(raw).NAMES, models.config_from_hf(raw), np.random.default_rng(0)
    prefix = names.prefixes[0] if prefix is None else prefix
    arrays = {
        ("" if t.name in names.bare else prefix) + t.name: draw.normal(size=t.shape).astype(dtype)
        for t in tensors(config, names)
    }
    write_safetensors(directory / "model.safetensors", arrays | dict.fromkeys(extra, np.ones(3, np.float32)))
    byte_tokenizer(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def assert_same_files(one, other, left_out=()):
    """The same small files byte for byte, and the same tensors bit for bit."""
    small = [path for path in one.iterdir() if path.is_file() and not path.name.startswith("model")]
    assert {path.name for path in other.iterdir() if not path.name.startswith("model")} == {p.name for p in small}
    for path in small:
        assert (other / path.name).read_bytes() == path.read_bytes()
    a, b = Checkpoint(one), Checkpoint(other)
    assert a.entries.keys() - set(left_out) == b.entries.keys()
    for name, entry in b.entries.items():
        assert (entry.dtype, entry.shape) == (a.entries[name].dtype, a.entries[name].shape)
        assert b.read(name).tobytes() == a.read(name).tobytes(), name


def round_trip(run, tmp_path, source, *words):
    """There and back."""
    for kind, before, after in (("orbax", source, tmp_path / "there"), ("huggingface", tmp_path / "there", "back")):
        code, out, err = run(before, tmp_path / after, "--to", kind, *(words if kind == "huggingface" else ()))
        assert (code, out) == (0, ""), err
        assert len(err.splitlines()) == 1
    return tmp_path / "back"


@pytest.mark.parametrize(("family", "variant"), SOME)
def test_there_and_back_is_bit_equal(run, tmp_path, family, variant):
    source = write_model(tmp_path / "source", family, variant)
    assert_same_files(source, round_trip(run, tmp_path, source))
    want, config = jaxinfer.load(source)
    got, same = jaxinfer.load(tmp_path / "there")
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.full
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_there_and_back_is_bit_equal_for_every_variant(run, tmp_path, family, variant):
    source = write_model(tmp_path / "source", family, variant, ml_dtypes.bfloat16)
    assert_same_files(source, round_trip(run, tmp_path, source))


def test_names_without_or_with_another_prefix_come_back(run, tmp_path):
    source = write_model(tmp_path / "source", "gpt2", prefix="")
    assert_same_files(source, round_trip(run, tmp_path, source))
    (tmp_path / "gemma").mkdir()
    vision = ("vision_tower.patch.weight", "multi_modal_projector.weight")
    source = write_model(tmp_path / "gemma" / "source", "gemma3", prefix="language_model.model.", extra=vision)
    assert_same_files(source, round_trip(run, tmp_path / "gemma", source), vision)
    told = json.loads(run(source, tmp_path / "told", "--to", "orbax", "--json")[1])
    assert told["left_out"] == 2


def test_tensors_of_several_dtypes_keep_them(run, tmp_path):
    source = write_model(tmp_path / "source", dtype=ml_dtypes.bfloat16)
    checkpoint = Checkpoint(source)
    arrays = {name: checkpoint.read(name) for name in checkpoint.entries}
    mixed = {name: x.astype(np.float32) if x.ndim == 1 else x for name, x in arrays.items()}
    write_safetensors(source / "model.safetensors", mixed)
    assert_same_files(source, round_trip(run, tmp_path, source))
    want, config = jaxinfer.load(source)
    got, same = jaxinfer.load(tmp_path / "there")
    assert same == config and {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_shards_have_an_index_and_stay_under_the_limit(run, tmp_path):
    source = write_model(tmp_path / "source")
    back = round_trip(run, tmp_path, source, "--max-shard-size", "20KB")
    names = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(names) > 3
    assert names == [f"model-{i + 1:05}-of-{len(names):05}.safetensors" for i in range(len(names))]
    checkpoint = Checkpoint(back)
    for name in names:
        sizes = [entry.bytes for entry in checkpoint.entries.values() if entry.file.name == name]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.bytes for entry in Checkpoint(back).entries.values())
    assert_same_files(source, back)


def test_transformers_reads_what_comes_back(run, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_models.write_checkpoint(tmp_path / "source", "phi3")
    again = AutoModelForCausalLM.from_pretrained(round_trip(run, tmp_path, tmp_path / "source"))
    for (name, x), y in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert (x == y).all(), name


@pytest.mark.parametrize("step", ["orbax", "huggingface"])
def test_a_converted_dtype_is_what_the_config_says(run, tmp_path, step):
    source = write_model(tmp_path / "source")
    raw = tiny_models.raw_config(source)
    assert (raw.get("dtype") or raw.get("torch_dtype")) in (None, "float32")
    (source / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}))
    for kind, before, after in (("orbax", source, tmp_path / "there"), ("huggingface", tmp_path / "there", "back")):
        assert run(before, tmp_path / after, "--to", kind, *(("--dtype", "bfloat16") if kind == step else ()))[0] == 0
    assert tiny_models.raw_config(tmp_path / "back") == raw | {"dtype": "bfloat16"}
    want, config = jaxinfer.load(source, "bfloat16")
    got, same = jaxinfer.load(tmp_path / "back")
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_command_line_from_a_mesh_and_back(tmp_path):
    def script(*words):
        done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    done = script("builtin", tmp_path / "a", "--to", "orbax", "--mesh", "tensor=8", "--cpu-devices", "8", "--json")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tensors"] == 90 and told["bytes"] == 14690816 and done.stderr == ""
    done = script(tmp_path / "a", tmp_path / "b", "--to", "huggingface")
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert_same_files(hub.BUILTIN, tmp_path / "b")


# --- what was there, and what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "source")


def test_what_is_there_is_replaced_only_when_asked(run, source, tmp_path):
    place = tmp_path / "place"
    assert run(source, place, "--to", "orbax")[0] == 0
    before = sorted(place.rglob("*"))
    code, _, err = run(source, place, "--to", "orbax")
    assert code == 1 and err == f"convert.py: {place} is not empty: name another directory, or give --overwrite\n"
    assert sorted(place.rglob("*")) == before
    assert run(source, place, "--to", "orbax", "--overwrite")[0] == 0
    assert (place / "current").readlink() == pathlib.Path("save-2")
    shutil.move(place, tmp_path / "moved")
    assert run(tmp_path / "moved", tmp_path / "back", "--to", "huggingface")[0] == 0
    assert run(tmp_path / "moved", tmp_path / "back", "--to", "huggingface", "--overwrite")[0] == 0
    assert_same_files(source, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "moved"]  # nothing beside them


@pytest.mark.parametrize("to", ["orbax", "huggingface"])
@pytest.mark.parametrize("how", [KeyboardInterrupt, OSError(28, "No space left on device", "x")])
def test_an_interrupted_conversion_leaves_nothing(run, source, tmp_path, monkeypatch, to, how):
    assert run(source, tmp_path / "there", "--to", "orbax")[0] == 0
    if to == "huggingface":
        source = tmp_path / "there"
    place = tmp_path / "place"

    def raises(*_, **__):
        raise how

    monkeypatch.setattr("jaxinfer.weights.export.write_safetensors", raises)
    monkeypatch.setattr("jaxinfer.weights.orbax.files_in", raises)
    code, _, err = run(source, place, "--to", to)
    assert code == (130 if how is KeyboardInterrupt else 1) and len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("{there}", "new", "--to", "orbax"), "is a sharded checkpoint already: --to takes huggingface"),
        (("{source}", "new", "--to", "huggingface"), "is a Hugging Face directory already: --to takes orbax"),
        (("{source}", "{source}/in", "--to", "orbax"), "is the source or lies in it: name another directory"),
        (("{there}", "{there}", "--to", "huggingface", "--overwrite"), "is the source or lies in it"),
        (("{source}", "{source}/config.json", "--to", "orbax"), "is the source or lies in it"),
        (("{there}", "{file}", "--to", "huggingface"), "is a file: name a directory"),
        (("{there}", "{stuff}", "--to", "huggingface", "--overwrite"), "--overwrite replaces models only"),
        (("{bare}", "new", "--to", "huggingface"), "was saved without its model's files: save it with tokenizer="),
        (("{other}", "new", "--to", "huggingface"), "holds the config.json of another model (its "),
        (("{half}", "new", "--to", "huggingface"), "is half-written: a save was interrupted"),
        (("no-such", "new", "--to", "orbax"), "there is no directory no-such"),
        (("{source}", "new", "--to", "orbax", "--mesh", "tensor=99"), "needs 99 devices but there are 8"),
        (("{source}", "new", "--to", "orbax", "--mesh", "x"), "mesh 'x' cannot be read at 'x'"),
        (("{stuff}", "new", "--to", "orbax"), "holds no config.json"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(run, source, places, words, line):
    before = sorted(source.rglob("*"))
    code, out, err = run(*(word.format(source=source, **places) for word in words))
    assert code == 1 and out == ""
    assert err.startswith("convert.py: ") and line in err and len(err.splitlines()) == 1
    assert sorted(source.rglob("*")) == before
    assert not pathlib.Path("new").exists()


@pytest.fixture(scope="module")
def places(source, tmp_path_factory):
    """Checkpoints of several kinds."""
    base = tmp_path_factory.mktemp("places")
    params, config = jaxinfer.load(source)
    jaxinfer.save(base / "there", params, config, tokenizer=source)
    jaxinfer.save(base / "bare", params, config)
    jaxinfer.save(base / "other", params, config, tokenizer="builtin")
    (base / "half" / "save-1").mkdir(parents=True)
    (base / "stuff").mkdir()
    (base / "stuff" / "letter.txt").write_text("dear")
    (base / "file").write_text("")
    return {name: base / name for name in ("there", "bare", "other", "half", "stuff", "file")}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--max-shard-size", "lots"), "--max-shard-size is lots: write a number and a unit, such as 5GB"),
        (("--max-shard-size", "0GB"), "--max-shard-size is 0GB"),
        (("--cpu-devices", "0"), "--cpu-devices is 0: it must be at least 1"),
        (("--cpu-devices", "8"), "--cpu-devices needs --mesh"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(capsys, words, line):
    with pytest.raises(SystemExit, match="2"):
        convert.parse_args(["a", "b", "--to", "orbax", *words])
    err = capsys.readouterr().err
    assert line in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5kb", 1500), ("7", 7)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert convert.parse_size(text) == size
