"""Loading onto a mesh: the same arrays as loading and sharding, every byte read once, nothing held twice."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_models import CASES, write_checkpoint

import jaxinfer
from jaxinfer import kernels, models, weights
from jaxinfer import mesh as meshes
from jaxinfer.models.names import tensors
from jaxinfer.weights import Checkpoint, shards, write_safetensors
from jaxinfer.weights.huggingface import match, read_model
from jaxinfer.weights.safetensors import read_json

ROOT = pathlib.Path(__file__).parents[2]
MESHES = ("tensor=8", "data=2,tensor=4", "seq=2,tensor=2")
EVERY = [(family, variant, axes) for family in CASES for variant in CASES[family] for axes in MESHES]
PAIRS = [
    (family, list(variants)[i % len(variants)], axes)
    for family, variants in CASES.items()
    for i, axes in enumerate(MESHES)
]
BY_PAIRS = [*PAIRS, *(pytest.param(*case, marks=pytest.mark.full) for case in EVERY if case not in PAIRS)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family, variant) is the directory of a tiny random model, made once."""
    made: dict[tuple[str, str], pathlib.Path] = {}

    def make(family: str, variant: str) -> pathlib.Path:
        if (family, variant) not in made:
            made[family, variant] = tmp_path_factory.mktemp(f"{family}-{variant}")
            write_checkpoint(made[family, variant], family, variant)
        return made[family, variant]

    return make


def wanted(directory: pathlib.Path) -> tuple[Checkpoint, list[str]]:
    """The tensors of a directory that its params are made of."""
    recipe, raw = models.family(read_json(directory / "config.json")), read_json(directory / "config.json")
    files = Checkpoint(directory)
    return files, [stored for _, stored in match(files, recipe.config(raw), recipe.NAMES)]


def same_bits(x: Any, y: Any) -> None:
    """Two arrays alike in dtype, in where they lie and in every bit."""
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
        assert (a.device, a.index) == (b.device, b.index)
        assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()


@pytest.mark.parametrize(("family", "variant", "axes"), BY_PAIRS)
def test_loading_onto_a_mesh_is_loading_arranging_and_sharding(checkpoint, family, variant, axes, monkeypatch):
    path, mesh = checkpoint(family, variant), meshes.make_mesh(meshes.parse_axes(axes))
    dtype = {"tensor=8": None, "data=2,tensor=4": "bfloat16", "seq=2,tensor=2": "float16"}[axes]
    params, config = models.arrange(*jaxinfer.load(path, dtype), mesh)
    want = jaxinfer.mesh.shard(params, models.letters(config), mesh)
    for block in (shards.BLOCK, 300):  # all at once, and row by row
        monkeypatch.setattr(shards, "BLOCK", block)
        loaded, said = jaxinfer.load(path, dtype, mesh=mesh)
        assert said == config
        assert jax.tree.structure(loaded) == jax.tree.structure(want)
        jax.tree.map(same_bits, loaded, want)


@pytest.mark.parametrize(("family", "variant", "axes"), BY_PAIRS)
def test_every_byte_is_read_once(checkpoint, family, variant, axes, monkeypatch):
    """Also where KV heads are repeated, where several devices hold the same slice, and where tensors are fused."""
    read: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        got = preadv(descriptor, buffers, offset)
        read.append((offset, offset + got))
        return got

    path = checkpoint(family, variant)
    files, names = wanted(path)
    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(shards, "BLOCK", 300)
    *_, num_bytes = read_model(path, mesh=meshes.make_mesh(meshes.parse_axes(axes)))
    offsets = [offset for start, stop in read for offset in range(start, stop)]
    entries = [files.entries[name] for name in names]
    assert sorted(offsets) == sorted(o for e in entries for o in range(e.start, e.start + e.bytes))
    assert num_bytes == len(offsets)
    assert max(stop - start for start, stop in read) <= max(300, 4 * max(e.shape[-1] for e in entries))


def test_without_a_mesh_the_arrays_are_whole_and_on_one_device(checkpoint):
    params, config = jaxinfer.load(checkpoint("llama", "plain"))
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    assert config.canonical is None


def test_the_ambient_mesh_is_taken_unless_one_is_given(checkpoint, on_mesh):
    path, other = checkpoint("qwen2", "plain"), meshes.make_mesh({"tensor": 2})
    with on_mesh("data=2,tensor=4") as mesh:
        here, there = jaxinfer.load(path), jaxinfer.load(path, mesh=other)
    for (params, config), given in ((here, mesh), (there, other)):
        assert config == jaxinfer.load(path, mesh=given)[1]
        jax.tree.map(same_bits, params, jaxinfer.load(path, mesh=given)[0])


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("axes", ["", "data=2,tensor=4"])
@pytest.mark.parametrize("form", [None, "int8", "int4:group=2"])
def test_shapes_are_those_of_the_arrays_that_load_gives(axes, form, checkpoint, on_mesh, monkeypatch):
    directory = checkpoint("qwen3", next(iter(CASES["qwen3"])))
    with on_mesh(axes):
        params, config = jaxinfer.load(directory, quantize=form)
        monkeypatch.setattr(Checkpoint, "open", None)
        found = weights.shapes(directory, quantize=form)
    assert found is not None and found[1] == config
    assert jax.tree.structure(found[0]) == jax.tree.structure(params)
    for shape, array in zip(jax.tree.leaves(found[0]), jax.tree.leaves(params), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding is None if not axes else shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_a_mesh_that_splits_no_weight_gives_each_device_all_of_them(checkpoint):
    path = checkpoint("gpt2", "plain")
    plain, config = jaxinfer.load(path)
    params, said = jaxinfer.load(path, mesh=meshes.make_mesh({"data": 8}))
    assert said == config
    assert all(leaf.is_fully_replicated and len(leaf.addressable_shards) == 8 for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, plain)


@pytest.mark.parametrize("axes", ["", "tensor=2", "tensor=8", "data=2,tensor=4"])
def test_weights_that_the_free_memory_cannot_hold_are_refused_before_any_is_read(checkpoint, axes, monkeypatch):
    path, mesh = checkpoint("llama", "plain"), meshes.make_mesh(meshes.parse_axes(axes)) if axes else None
    params, config = jaxinfer.load(path, mesh=mesh)
    needed = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    monkeypatch.setattr(os, "preadv", None)
    monkeypatch.setattr(kernels, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"the weights need .* GB of this process's memory, .* GB are free: ask") as no:
        jaxinfer.load(path, mesh=mesh)
    assert "\n" not in str(no.value)
    monkeypatch.undo()
    for enough in (needed, None):
        monkeypatch.setattr(kernels, "free_memory", lambda enough=enough: enough)
        jaxinfer.load(path, mesh=mesh)


RAW = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
PROCESS = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
path, port, process = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
import pathlib
import numpy as np
import jaxinfer
from jaxinfer import models
from jaxinfer.mesh import make_mesh
from jaxinfer.weights.huggingface import read_model

mesh = make_mesh({"tensor": 8})
params, config, num_bytes = read_model(pathlib.Path(path), mesh=mesh)
whole, _ = models.arrange(*jaxinfer.load(path), mesh)

def check(x, y):
    assert len(x.addressable_shards) == 4 and x.shape == y.shape
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(y)[shard.index])

jax.tree.map(check, params, whole)
print(json.dumps({"read": num_bytes}))
"""


def test_a_process_that_owns_half_of_the_devices_reads_half_of_the_rows(tmp_path):
    recipe = models.family(RAW)
    config = recipe.config(RAW)
    draw = np.random.default_rng(0)
    arrays = {
        ("" if t.name in recipe.NAMES.bare else "model.") + t.name: draw.normal(size=t.shape).astype(np.float32)
        for t in tensors(config, recipe.NAMES)
    }
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    write_safetensors(tmp_path / "model.safetensors", arrays)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path, str(port), str(index)], stdout=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    whole = {name for name in arrays if "norm" in name or "o_proj" in name or "down_proj" in name}
    want = sum(array.nbytes if name in whole else array.nbytes // 2 for name, array in arrays.items())
    assert [json.loads(text.splitlines()[-1])["read"] for text in said] == [want, want]


def measured(shape: pathlib.Path, *more: str) -> list[dict[str, Any]]:
    """What benchmarks/loading/tensor8.py finds."""
    command = [sys.executable, ROOT / "benchmarks" / "loading" / "tensor8.py", "--shape", shape, "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(done.stdout.splitlines()[-1])
    for row in result["results"]:
        assert row["bytes_read"] == result["stored"]["tensor_bytes"]
        headers = result["stored"]["file_bytes"] - result["stored"]["tensor_bytes"]
        assert 0 < row["kernel_bytes_read"] - row["bytes_read"] - headers < 200_000  # config.json, the index
    return result["results"]


LINUX = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="counts RssAnon, which Linux has")


@LINUX
def test_peak_host_memory_on_a_mesh_is_the_arrays_and_a_tenth(tmp_path):
    """bfloat16 on disk, float32 in memory, and heads and widths that are padded: every block is cut and converted."""
    sizes = {"vocab_size": 8187, "hidden_size": 1024, "intermediate_size": 3070, "num_hidden_layers": 3, "head_dim": 64}
    raw = RAW | sizes | {"num_attention_heads": 14, "num_key_value_heads": 2}
    shape = tmp_path / "shape.toml"
    shape.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in raw.items()))
    (row,) = measured(shape, "--dtype", "float32")
    assert row["array_bytes"] > 180e6
    assert row["peak_above_arrays"] < row["array_bytes"] / 10


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("axes", ["tensor=8", "data=2,tensor=4"])
def test_a_gigabyte_is_loaded_within_a_tenth_above_the_arrays(axes):
    for row in measured(ROOT / "configs" / "models" / "qwen3-0.6b.toml", "--mesh", axes):
        assert row["array_bytes"] > 1e9
        assert row["peak_above_arrays"] < row["array_bytes"] / 10


@pytest.mark.parametrize("source", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_a_run_of_rows_is_read_as_it_is_stored(tmp_path, source):
    data = np.random.default_rng(0).normal(size=(7, 5)).astype(source)
    write_safetensors(tmp_path / "model.safetensors", {"a": data, "b": data[:, 0]})
    files = Checkpoint(tmp_path)
    part, column = np.empty((3, 5), source), np.empty(2, source)
    with files.open("a") as read:
        read(2, part)
    with files.open("b") as read:
        read(4, column)
    assert part.tobytes() == data[2:5].tobytes() and column.tobytes() == data[4:6, 0].tobytes()
    assert files.bytes_read == part.nbytes + column.nbytes


def test_loaded_weights_may_be_donated(checkpoint):
    """Emulated devices share the memory of what they all hold: an addition in place would be seen by every other."""
    params, _ = jaxinfer.load(checkpoint("llama", "plain"), mesh=meshes.make_mesh({"data": 8}))
    want = jax.tree.map(lambda x: np.asarray(x) + 1, params)
    more = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    for leaf, whole in zip(jax.tree.leaves(more), jax.tree.leaves(want), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole)
