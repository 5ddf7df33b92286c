"""Checkpoints as they are found: under other prefixes, with buffers, with parts of other models beside them."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_checkpoint

import jaxinfer


def rename(pattern, replacement):
    return lambda arrays: {re.sub(pattern, replacement, name): array for name, array in arrays.items()}


def beside(name, shape=(1,), layers=0):
    """With one more tensor, or one more in each layer."""
    names = [name.format(index) for index in range(layers)] or [name]
    return lambda arrays: arrays | {name: np.full(shape, 7, np.float32) for name in names}


FOUND = {
    "gpt2 without a prefix": ("gpt2", rename(r"^transformer\.", "")),
    "gpt2 with its masks": ("gpt2", beside("transformer.h.{}.attn.bias", (1, 1, 64, 64), 3)),
    "gpt2 with its masked values": ("gpt2", beside("h.{}.attn.masked_bias", (), 3)),
    "gpt2 with its tied head": ("gpt2", lambda a: a | {"lm_head.weight": a["transformer.wte.weight"]}),
    "llama without a prefix": ("llama", rename(r"^model\.", "")),
    "llama with rope's frequencies": ("llama", beside("model.layers.{}.self_attn.rotary_emb.inv_freq", (5,), 3)),
    "gemma3 under the names of v5": ("gemma3", rename(r"^(language_model)\.model|^", r"model.\1")),
    "gemma3 with its tied head": (
        "gemma3",
        lambda a: a | {"language_model.lm_head.weight": a["language_model.model.embed_tokens.weight"]},
    ),
    "gemma3_text cut out of gemma3": ("gemma3_text", rename(r"^model\.", "language_model.model.")),
}


@pytest.mark.parametrize(("family", "change"), FOUND.values(), ids=FOUND)
def test_checkpoints_are_read_as_they_are_found(family, change, tmp_path):
    write_checkpoint(tmp_path, family)
    params, config = jaxinfer.load(tmp_path)
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    after = change(before)
    assert set(after) != set(before)
    save_file({name: np.ascontiguousarray(array) for name, array in after.items()}, file)
    again, config_again = jaxinfer.load(tmp_path)
    assert config == config_again
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_fused_tensors_are_split_in_the_order_of_the_file(family, tmp_path):
    write_checkpoint(tmp_path, family)
    params, config = jaxinfer.load(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    name = {"phi3": "model.layers.1.self_attn.qkv_proj.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}[family]
    fused = arrays[name] if family == "phi3" else arrays[name].T
    parts = [np.asarray(params["layers"][1][key]).reshape(-1, config.width) for key in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), fused)


def test_a_weight_that_the_config_has_no_place_for_is_refused(tmp_path):
    write_checkpoint(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    save_file(beside("model.layers.0.self_attn.q_proj.bias", (60,))(load_file(file)), file)
    with pytest.raises(ValueError, match=re.escape("layers.0.self_attn.q_proj.bias")):
        jaxinfer.load(tmp_path)
