"""Loading: every tensor in its place, in the wanted dtype, within a bounded memory; everything else refused by name."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxinfer
from jaxinfer.models import family, param_shapes
from jaxinfer.models.names import tensors
from jaxinfer.weights import Checkpoint, sampling_defaults, write_safetensors

RAW = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}


def stored(raw=RAW, dtype=np.float32):
    """The tensors of a checkpoint, each filled with its own numbers."""
    recipe = family(raw)
    config = recipe.config(raw)
    draw = np.random.default_rng(0)
    return {
        ("" if t.name in recipe.NAMES.bare else "model.") + t.name: draw.normal(size=t.shape).astype(dtype)
        for t in tensors(config, recipe.NAMES)
    }


def write(directory: pathlib.Path, raw=RAW, arrays=None) -> pathlib.Path:
    (directory / "config.json").write_text(json.dumps(raw))
    write_safetensors(directory / "model.safetensors", stored(raw) if arrays is None else arrays)
    return directory


def test_every_tensor_finds_its_place_and_keeps_its_bits(tmp_path):
    params, config = jaxinfer.load(write(tmp_path))
    want = stored()
    np.testing.assert_array_equal(params["embed"], want["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], want["lm_head.weight"])
    layer = params["layers"][1]
    np.testing.assert_array_equal(layer["q"], want["model.layers.1.self_attn.q_proj.weight"].reshape(6, 10, 36))
    np.testing.assert_array_equal(layer["o"], want["model.layers.1.self_attn.o_proj.weight"].reshape(36, 6, 10))
    np.testing.assert_array_equal(layer["down"], want["model.layers.1.mlp.down_proj.weight"])
    np.testing.assert_array_equal(layer["ffn_norm"]["scale"], want["model.layers.1.post_attention_layernorm.weight"])
    assert jax.tree.structure(params) == jax.tree.structure(param_shapes(config))
    assert config.dtype == "float32" and config.stop_ids == (7,)


def test_what_safetensors_writes_is_read_and_what_is_written_safetensors_reads(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    arrays = stored(dtype=ml_dtypes.bfloat16)
    write(tmp_path, arrays=arrays)
    for name, array in reference.load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array.view(np.uint16), arrays[name].view(np.uint16))
    reference.save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.read(name).view(np.uint16), array.view(np.uint16))
    assert checkpoint.bytes_read == sum(array.nbytes for array in arrays.values())


def test_shards_are_read_through_their_index(tmp_path):
    whole, _ = jaxinfer.load(write(tmp_path))
    arrays = stored()
    (tmp_path / "model.safetensors").unlink()
    halves = [dict(list(arrays.items())[i::2]) for i in range(2)]
    index = {"metadata": {}, "weight_map": {}}
    for number, half in enumerate(halves, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(tmp_path / file, half)
        index["weight_map"] |= dict.fromkeys(half, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, jaxinfer.load(tmp_path)[0], whole)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors, which the index names"):
        jaxinfer.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_are_converted_to_the_wanted_dtype(tmp_path, dtype, source):
    arrays = stored(dtype=source)
    params, config = jaxinfer.load(write(tmp_path, arrays=arrays), dtype=jnp.dtype(dtype))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {config.dtype} == {dtype}
    want = arrays["model.embed_tokens.weight"].astype(dtype)
    np.testing.assert_array_equal(np.asarray(params["embed"], np.float32), np.asarray(want, np.float32))


def test_a_tied_model_needs_no_head_and_ignores_one(tmp_path):
    raw = RAW | {"tie_word_embeddings": True}
    arrays = stored()
    with_head, config = jaxinfer.load(write(tmp_path, raw, arrays))
    del arrays["lm_head.weight"]
    without, _ = jaxinfer.load(write(tmp_path, raw, arrays))
    assert "head" not in without and config.tied
    jax.tree.map(np.testing.assert_array_equal, with_head, without)


def test_stop_ids_come_from_the_generation_config_where_it_has_them(tmp_path):
    write(tmp_path)
    for said, ids in [({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 5}, (5,)), ({}, (7,))]:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
        assert jaxinfer.load(tmp_path)[1].stop_ids == ids


def test_sampling_defaults_are_arguments_of_sampling(tmp_path):
    write(tmp_path)
    assert sampling_defaults(tmp_path) == {}
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9}
    jaxinfer.Sampling(**sampling_defaults(tmp_path))
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"do_sample": False}))
    assert sampling_defaults(tmp_path)["temperature"] == 0


def without(name):
    return lambda arrays: arrays.pop(name)


DAMAGE = [
    (without("model.layers.1.mlp.up_proj.weight"), r"lacks tensor layers\.1\.mlp\.up_proj\.weight"),
    (lambda a: a.update({"model.layers.2.extra": np.zeros(3, np.float32)}), r"holds tensor layers\.2\.extra that"),
    (
        lambda a: a.update({"model.norm.weight": np.zeros(35, np.float32)}),
        r"'model\.norm\.weight' has shape \[35\] but config\.json asks for \[36\]",
    ),
    (
        lambda a: a.update({"model.norm.weight": np.zeros(36, np.int8)}),
        r"norm\.weight' is stored as int8: quantized checkpoints are not handled",
    ),
]


@pytest.mark.parametrize("axes", ["", "tensor=8"])
@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_tensor_that_is_missing_surplus_or_misshapen_is_named(tmp_path, damage, message, axes, on_mesh):
    arrays = stored()
    damage(arrays)
    with pytest.raises(ValueError, match=message) as refusal, on_mesh(axes):
        jaxinfer.load(write(tmp_path, arrays=arrays))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("axes", ["", "tensor=8"])
@pytest.mark.parametrize("keep", [0, 4, 8, 50, 1000, -1, -4096])
def test_a_truncated_file_is_refused(tmp_path, keep, axes, on_mesh):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated") as refusal, on_mesh(axes):
        jaxinfer.load(tmp_path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_that_is_truncated_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    checkpoint = Checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"ended inside tensor '.*': the file is truncated, fetch it again"):
        for name in checkpoint.entries:
            checkpoint.read(name)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match="longer than its header says"):
        jaxinfer.load(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all!", "header that is not JSON"),
        (b"[1, 2, 3]       ", "header that is not an object"),
        (b'{"a":{"dtype":"F32"}}   ', "'a' .* header is damaged"),
        (b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', "dtype F99: only"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', r"shape \[2\] has 4 bytes"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}', "header is damaged"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, message):
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match=message):
        jaxinfer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "holds a JSON list"),
        ("config.json", json.dumps(RAW | {"model_type": "rwkv"}), "model_type 'rwkv'"),
        ("config.json", json.dumps(RAW | {"quantization_config": {"bits": 4}}), "quantization_config"),
        ("model.safetensors", None, "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(tmp_path, file, text, message):
    write(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        jaxinfer.load(tmp_path)


def test_a_dtype_that_nothing_is_computed_in_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype int8 cannot be computed in: take one of float32, bfloat16, float16"):
        jaxinfer.load(write(tmp_path), dtype=jnp.int8)


MEMORY = """
import json, sys, threading, time
import jax, jax.numpy as jnp, jaxinfer
from jaxinfer import weights

def anon():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

jax.block_until_ready(jnp.zeros(3) + 1)
jaxinfer.load(sys.argv[2])  # what the interpreter and the libraries need for themselves
peak, before, done = [0], anon(), threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anon())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
params, config = jaxinfer.load(sys.argv[1], dtype=jnp.float32)
done.set(); thread.join()
leaves = jax.tree.leaves(params)
print(json.dumps({"peak": peak[0] - before, "after": anon() - before, "loaded": sum(a.nbytes for a in leaves),
                  "largest": max(a.nbytes for a in leaves)}))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="counts RssAnon, which Linux has")
def test_peak_host_memory_is_the_loaded_arrays_plus_two_of_the_largest(tmp_path, capsys):
    """bfloat16 on disk, float32 in memory: the case in which a careless loader holds the model more than twice."""
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir(), small.mkdir()
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "head_dim": 64}
    raw = RAW | sizes | {"num_attention_heads": 16, "num_key_value_heads": 4}
    recipe = family(raw)
    zeros = {
        ("" if t.name in recipe.NAMES.bare else "model.") + t.name: np.ones(t.shape, ml_dtypes.bfloat16)
        for t in tensors(recipe.config(raw), recipe.NAMES)
    }
    write(big, raw, zeros), write(small)
    done = subprocess.run([sys.executable, "-c", MEMORY, big, small], capture_output=True, text=True, check=True)
    figure = json.loads(done.stdout)
    with capsys.disabled():
        shown = {name: f"{value / 1e6:.1f} MB" for name, value in figure.items()}
        print(f"\n  RssAnon while loading bfloat16 as float32: {shown}")
    assert figure["loaded"] > 150e6
    assert figure["peak"] < figure["loaded"] + 2 * figure["largest"]
