"""Sharded checkpoints: bit for bit onto any mesh, never half, and everything else refused by name."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import SingleDeviceSharding

import jaxinfer
from jaxinfer import mesh as meshes
from jaxinfer import models
from jaxinfer.testing import byte_tokenizer
from jaxinfer.testing.tiny import tiny_params
from jaxinfer.weights import orbax, sampling_defaults
from jaxinfer.weights.config_json import config_from_json, config_to_json

ROOT = pathlib.Path(__file__).parents[2]
RAW = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 7,
}
CONFIG = models.config_from_hf(RAW)
PLACES = ("", "tensor=8", "data=2,tensor=2")  # "": one device
AROUND = tuple(zip(PLACES, (*PLACES[1:], PLACES[0]), strict=True))
CASES = [(family, variant) for family, variants in tiny_models.CASES.items() for variant in variants]


def drawn(config, seed=0, dtype=np.float32):
    """Params of a config, in numpy, every one of them its own numbers."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(dtype), models.param_shapes(config))


def on(place):
    """The mesh of a place, None for one device."""
    return meshes.make_mesh(meshes.parse_axes(place)) if place else None


def put(params, config, place):
    """Params and config, arranged and sharded: what a load there must give."""
    if not place:
        return jax.tree.map(jnp.asarray, params), config
    params, config = models.arrange(params, config, on(place))
    return meshes.shard(params, models.letters(config), on(place)), config


def assert_same(got, want):
    """The same params, bit for bit and where they lie, and the same config."""
    assert got[1] == want[1]
    assert jax.tree.structure(got[0]) == jax.tree.structure(want[0])
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got[0]), jax.tree.leaves(want[0]), strict=True):
        assert (x.dtype, x.shape, x.sharding) == (y.dtype, y.shape, y.sharding), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


# --- what is saved is what is loaded -------------------------------------------------------------------------------


def check_places(directory, config, pairs):
    params = drawn(config)
    for before, after in pairs:
        jaxinfer.save(directory, *put(params, config, before))
        assert_same(jaxinfer.load(directory, mesh=on(after)), put(params, config, after))


@pytest.mark.parametrize("family", tiny_models.CASES)
def test_what_is_saved_on_one_mesh_restores_on_another(tmp_path, family):
    raw = tiny_models.hf_config(family).to_dict()
    check_places(tmp_path / "saved", models.config_from_hf(raw), AROUND)


@pytest.mark.full
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_what_is_saved_anywhere_restores_everywhere(tmp_path, family, variant):
    raw = tiny_models.hf_config(family, variant).to_dict()
    check_places(tmp_path / "saved", models.config_from_hf(raw), itertools.product((*PLACES, "seq=2,tensor=2"), PLACES))


@pytest.mark.parametrize("heads", [(5, 5), (5, 1), (14, 2), (8, 8)])
def test_odd_heads_restore_from_and_onto_any_mesh(tmp_path, heads):
    raw = RAW | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 6}
    check_places(tmp_path / "saved", models.config_from_hf(raw), AROUND)


def test_the_ambient_mesh_is_where_a_checkpoint_is_restored(tmp_path):
    params = drawn(CONFIG)
    jaxinfer.save(tmp_path, params, CONFIG)
    with jax.set_mesh(on("tensor=8")):
        got = jaxinfer.load(tmp_path)
    assert_same(got, put(params, CONFIG, "tensor=8"))


def test_one_mesh_may_be_ambient_while_another_is_asked_for(tmp_path):
    params = drawn(CONFIG)
    with jax.set_mesh(on("data=2,tensor=2")):
        jaxinfer.save(tmp_path, *put(params, CONFIG, "tensor=8"))
        got = jaxinfer.load(tmp_path, mesh=on("tensor=8"))
    assert_same(got, put(params, CONFIG, "tensor=8"))


def test_no_device_is_asked_to_read_more_than_its_part():
    mesh = on("tensor=8")
    assert models.arrange_config(CONFIG, mesh) != CONFIG  # two KV heads over eight devices
    words = models.letters(CONFIG)
    for (path, leaf), word in zip(orbax.flat(models.param_shapes(CONFIG)).items(), jax.tree.leaves(words), strict=True):
        home = orbax.resting(leaf.shape, word, path, mesh)
        if len(leaf.shape) > 1:
            assert np.prod(home.shard_shape(leaf.shape)) == np.prod(leaf.shape) / 8, (path, home.spec)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", None)])
def test_weights_are_converted_to_the_wanted_dtype(tmp_path, place, stored, asked):
    params, config = drawn(CONFIG, dtype=stored), CONFIG.replace(dtype=stored)
    jaxinfer.save(tmp_path, params, config)
    wanted = asked or stored
    want = put(jax.tree.map(lambda x: x.astype(wanted), params), config.replace(dtype=wanted), place)
    assert_same(jaxinfer.load(tmp_path, asked, mesh=on(place)), want)


def test_leaves_of_several_dtypes_keep_them(tmp_path):
    params = drawn(CONFIG)
    params["embed"] = params["embed"].astype(jnp.bfloat16)
    jaxinfer.save(tmp_path, params, CONFIG)
    assert_same(jaxinfer.load(tmp_path), put(params, CONFIG, ""))


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_config_is_built_again_exactly(family, variant):
    config = models.config_from_hf(tiny_models.hf_config(family, variant).to_dict())
    again = config_from_json(json.loads(json.dumps(config_to_json(config))), "test")
    assert (again, hash(again), repr(again)) == (config, hash(config), repr(config))


WORKER = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jaxinfer
source, destination = sys.argv[3:]
alone, _ = jaxinfer.load(source)  # without a mesh: whole, on a device of its own
assert {leaf.device.process_index for leaf in jax.tree.leaves(alone)} == {jax.process_index()}
with jax.set_mesh(jaxinfer.mesh.make_mesh({"tensor": 8})):
    params, config = jaxinfer.load(source)
    assert not jax.tree.leaves(params)[0].is_fully_addressable
    jaxinfer.save(destination, params, config, tokenizer=source)
    try:
        jaxinfer.save(source + "/config.json", params, config)
    except ValueError as refusal:
        print(refusal)
"""


def test_two_processes_save_and_load_together(tmp_path, free_port):
    params = drawn(CONFIG)
    jaxinfer.save(tmp_path / "one", params, CONFIG, tokenizer=model_files(tmp_path / "files"))
    words = [f"localhost:{free_port}", "0", str(tmp_path / "one"), str(tmp_path / "two")]
    runs = []
    for number in "01":
        words[1] = number
        runs.append(start(WORKER, *words))
    told = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert "is a file: a checkpoint is a directory" in told[0][0] and "process 0 says why" in told[1][0]
    assert_same(jaxinfer.load(tmp_path / "two"), put(params, CONFIG, ""))
    assert (tmp_path / "two" / "tokenizer.json").is_file()


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(code, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


# --- the files of the model ----------------------------------------------------------------------------------------


def model_files(directory, template="[{{ messages[0].content }}]"):
    """What lies beside the weights in a Hugging Face directory."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(RAW))
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    byte_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(template)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    return directory


@pytest.mark.parametrize("form", [str, pathlib.Path, jaxinfer.Tokenizer])
def test_the_tokenizer_comes_along(tmp_path, form):
    files = model_files(tmp_path / "files")
    saved = tmp_path / "saved"
    jaxinfer.save(saved, drawn(CONFIG), CONFIG, tokenizer=form(files))
    for path in files.rglob("*.*"):
        assert (saved / path.relative_to(files)).read_bytes() == path.read_bytes()
    tokenizer = jaxinfer.Tokenizer(saved)
    assert tokenizer.encode("import os") == jaxinfer.Tokenizer(files).encode("import os")
    assert tokenizer.templates.keys() == {"default", "tool_use"}
    assert sampling_defaults(saved) == {"temperature": 0.5}


def test_a_save_takes_the_place_of_all_that_was_there(tmp_path):
    files = model_files(tmp_path / "files")
    saved = tmp_path / "saved"
    jaxinfer.save(saved, drawn(CONFIG), CONFIG, tokenizer=files)
    jaxinfer.save(saved, drawn(CONFIG, 1), CONFIG, tokenizer=jaxinfer.Tokenizer(saved))  # its own files, once more
    assert jaxinfer.Tokenizer(saved).templates.keys() == {"default", "tool_use"}
    jaxinfer.save(saved, drawn(CONFIG, 2), CONFIG)
    assert sorted(path.name for path in saved.iterdir()) == ["current", "save-3"]
    assert_same(jaxinfer.load(saved), put(drawn(CONFIG, 2), CONFIG, ""))


def test_a_copy_without_links_is_loaded_but_not_saved_into(tmp_path):
    files = model_files(tmp_path / "files")
    jaxinfer.save(tmp_path / "saved", drawn(CONFIG), CONFIG, tokenizer=files)
    copy = shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    shutil.rmtree(copy / "save-1")
    assert_same(jaxinfer.load(copy), put(drawn(CONFIG), CONFIG, ""))
    assert jaxinfer.Tokenizer(copy).has_chat_template
    with pytest.raises(ValueError, match=r"is a copy in which current is no link: save into an empty directory"):
        jaxinfer.save(copy, drawn(CONFIG), CONFIG)
    assert_same(jaxinfer.load(tmp_path / "saved" / "current"), put(drawn(CONFIG), CONFIG, ""))


# --- interrupted ---------------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from jaxinfer import models
from jaxinfer.weights import orbax, versions
ocp = orbax.library()
jobs, files, raw = map(json.loads, sys.argv[1:])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def late(f):
    def both(*args, **kwargs):
        f(*args, **kwargs)
        die()
    return both

def prepare(point):
    match point:
        case "a version begun":
            orbax.copy_files = die
        case "its files copied":
            orbax.copy_files = late(orbax.copy_files)
        case "its files shown":
            versions.show = late(versions.show)
        case "arrays half written":
            handler = ocp.type_handlers.NumpyHandler
            handler._background_serialize = die
        case "arrays written":
            orbax.files_in = die
        case "notes written":
            versions.switch = die
        case "the next link made":
            os.replace = die
        case "switched":
            os.replace = late(os.replace)
        case "the old one half removed":
            def half(path):
                os.unlink(path / "jaxinfer.json")
                die()
            versions.shutil.rmtree = half

config = models.config_from_hf(raw)
ends = []
for point, directory in jobs:  # jax has not started yet: each child starts its own
    child = os.fork()
    if not child:
        prepare(point)
        twos = jax.tree.map(lambda leaf: np.full(leaf.shape, 2, np.float32), models.param_shapes(config))
        orbax.save(directory, twos, config, files)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""
POINTS = ("a version begun", "its files copied", "its files shown", "arrays half written", "arrays written")
POINTS += ("notes written", "the next link made", "switched", "the old one half removed")
ONES = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), models.param_shapes(CONFIG))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """At each point one save was killed over an old checkpoint, and one that was the first in its directory."""
    base = tmp_path_factory.mktemp("killed")
    old, new = model_files(base / "old", "old"), model_files(base / "new", "new")
    jobs = [(point, str(base / f"{kind} {point}")) for point in POINTS for kind in ("over", "first")]
    for _, directory in jobs[::2]:
        jaxinfer.save(directory, ONES, CONFIG, tokenizer=old)
    run = start(KILLED, json.dumps(jobs), json.dumps(str(new)), json.dumps(RAW))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    # where there is no old one, none is removed
    assert [end for end, job in zip(json.loads(out), jobs, strict=True) if end != -9] == [0]
    return base


@pytest.mark.parametrize("point", POINTS)
def test_a_save_that_is_killed_leaves_one_whole_checkpoint(killed, point):
    saved, first = killed / f"over {point}", killed / f"first {point}"
    done = POINTS.index(point) >= POINTS.index("switched")
    params, config = jaxinfer.load(saved)
    assert config == CONFIG
    assert all((leaf == 1 + done).all() for leaf in jax.tree.leaves(params))
    assert jaxinfer.Tokenizer(saved).templates["default"] == ("new" if done else "old")
    if done:
        assert_same(jaxinfer.load(first), (params, config))
    else:
        with pytest.raises(ValueError, match=r"is half-written: a save was interrupted, save it again$"):
            jaxinfer.load(first)
    for place in (saved, first):
        jaxinfer.save(place, ONES, CONFIG)
        assert_same(jaxinfer.load(place), put(ONES, CONFIG, ""))
        assert len(list(place.iterdir())) == 2  # `current` and what it leads to: nothing is left behind


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    jaxinfer.save(directory, tiny_params(CONFIG), CONFIG)
    return directory


@pytest.fixture
def saved(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "saved", symlinks=True)


def edited(change):
    def edit(directory):
        path = directory / "current" / "jaxinfer.json"
        notes = json.loads(path.read_text())
        change(notes)
        path.write_text(json.dumps(notes))

    return edit


def cut(directory):
    path = max((directory / "current" / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


def scrambled(directory):
    for path in (directory / "current" / "arrays").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda d: (d / "current" / "jaxinfer.json").unlink(), "is half-written: a save was interrupted"),
        (lambda d: (d / "current").unlink(), "is half-written: a save was interrupted, save it again"),
        (lambda d: shutil.rmtree(d / "current" / "arrays"), "is half-written .* more missing or cut short"),
        (cut, r"is half-written \(arrays/\S+ missing or cut short\): copy or save it again"),
        (scrambled, "cannot be read .*: copy or save it again"),
        (edited(lambda n: n.update(version=2)), "version 2, not 1: a newer jaxinfer may read it"),
        (edited(lambda n: n.update(format="other")), "is of format 'other', version 1"),
        (edited(lambda n: n.update(extra=1)), "has the unknown key 'extra'"),
        (edited(lambda n: n["config"].update(extra=1)), "has the unknown key 'extra'"),
        (edited(lambda n: n["config"]["kinds"][0].update(twist=1)), "kinds has the unknown key 'twist'"),
        (edited(lambda n: n["config"]["kinds"][0].pop("num_heads")), "kinds is not whole .*num_heads"),
        (edited(lambda n: n["config"].update(width="16")), "width is '16', where int fits"),
        (edited(lambda n: n["config"].update(tied=1)), "tied is '1', where bool fits"),
        (edited(lambda n: n["config"].update(width=17)), "does not hold embed as its config asks for"),
        (edited(lambda n: n["config"].update(layers=[0, 1])), "has layers .0, 1., and 1 kinds of them"),
        (edited(lambda n: n.pop("config")), "has no layers and kinds of layers"),
        (edited(lambda n: n.pop("files")), "is half-written .it lists no files."),
        (lambda d: (d / "current" / "jaxinfer.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(saved, damage, line):
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=line) as refusal:
        jaxinfer.load(saved)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_dtype_that_cannot_be_computed_in_is_refused(saved):
    with pytest.raises(ValueError, match="dtype int8 cannot be computed in"):
        jaxinfer.load(saved, jnp.int8)


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path):
    files = model_files(tmp_path / "files")
    before = sorted(files.rglob("*"))
    with pytest.raises(
        ValueError, match=r"holds additional_chat_templates and no sharded checkpoint: save into an emp"
    ):
        jaxinfer.save(files, drawn(CONFIG), CONFIG)
    with pytest.raises(ValueError, match="is a file: a checkpoint is a directory"):
        jaxinfer.save(files / "config.json", drawn(CONFIG), CONFIG)
    assert sorted(files.rglob("*")) == before


def test_a_file_in_the_way_is_not_taken_for_the_checkpoints_own(saved, tmp_path):
    (saved / "tokenizer.json").write_text("mine")
    with pytest.raises(ValueError, match=r"tokenizer\.json is in the way of a file of the checkpoint"):
        jaxinfer.save(saved, drawn(CONFIG), CONFIG, tokenizer=model_files(tmp_path / "files"))
    assert jaxinfer.load(saved)[1] == CONFIG


def test_params_that_do_not_fit_their_config_are_refused(tmp_path):
    params = drawn(CONFIG)
    with pytest.raises(ValueError, match="the params lack head, and their config does not"):
        jaxinfer.save(tmp_path / "a", {name: value for name, value in params.items() if name != "head"}, CONFIG)
    with pytest.raises(ValueError, match=r"embed has shape \[256, 16\], but the config says \[255, 16\]"):
        jaxinfer.save(tmp_path / "a", params, CONFIG.replace(vocab_size=255))
    assert not (tmp_path / "a").exists()


def test_without_orbax_one_line_says_how_to_get_it(tmp_path, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    for call in (lambda: jaxinfer.save(tmp_path / "x", drawn(CONFIG), CONFIG), lambda: jaxinfer.load(saved)):
        with pytest.raises(ValueError, match=r"pip install 'jaxinfer\[checkpoint\]'"):
            call()


def test_a_load_without_a_mesh_is_on_the_default_device(saved):
    device = jax.devices()[3]
    with jax.default_device(device):
        params, _ = jaxinfer.load(saved)
    assert all(leaf.sharding == SingleDeviceSharding(device) for leaf in jax.tree.leaves(params))
