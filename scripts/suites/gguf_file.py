"""A Hugging Face directory of a Llama as a GGUF file that llama.cpp reads, without its tokenizer.

Matrices are F32 or BF16, norms F32 (llama.cpp has no others). llama.cpp rotates neighbours where checkpoints rotate
halves, so the rows of every head of q and k are put in that order.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(directory: pathlib.Path, path: pathlib.Path, kind: str) -> None:
    """Writes the file, a tensor at a time; kind: "F32" or "BF16", of the matrices.

    ValueError for a model that is no plain Llama, ImportError where the package gguf is missing.
    """
    from jaxinfer import models
    from jaxinfer.weights.safetensors import read_json

    gguf = library()
    raw = read_json(directory / "config.json")
    config = models.config_from_hf(raw)
    check(raw, config)
    theta = float(raw.get("rope_theta") or 10000.0)
    writer = gguf.GGUFWriter(os.fspath(path), "llama")
    writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "BF16": gguf.LlamaFileType.MOSTLY_BF16}[kind])
    describe(writer, config, theta)
    held = arrays(directory, raw, config, theta)
    types = {name: gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"] for name, (shape, _) in held.items()}
    for name, (shape, _) in held.items():
        num_bytes = math.prod(shape) * (2 if types[name].name == "BF16" else 4)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, make) in held.items():
        writer.write_tensor_data(in_dtype(make(), types[name].name))
    writer.close()


def describe(writer: Any, config: Any, theta: float) -> None:
    """The numbers of the model."""
    spec = config.layers[0]
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_length or 2048)
    writer.add_embedding_length(config.width)
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length(spec.ffn_width)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_width)
    writer.add_value_length(spec.head_width)
    writer.add_layer_norm_rms_eps(spec.norm.eps)
    writer.add_rope_dimension_count(spec.rope.width)
    writer.add_rope_freq_base(theta)


def arrays(directory: pathlib.Path, raw: dict[str, Any], config: Any, theta: float) -> Arrays:
    """Every tensor of the file by its name: its shape, and what makes it."""
    from jaxinfer import models
    from jaxinfer.weights.huggingface import match
    from jaxinfer.weights.safetensors import Checkpoint

    checkpoint, spec = Checkpoint(directory), config.layers[0]
    heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads}

    def read(name: str, stored: str) -> np.ndarray:
        array = checkpoint.read(stored)
        part = name.split(".")[-2]
        return neighbours(array, heads[part]) if part in heads else array

    held: Arrays = {}
    for tensor, stored in match(checkpoint, config, models.family(raw).NAMES):
        name = gguf_name(tensor.name)
        held[name] = (tensor.shape, functools.partial(read, name, stored))
    slower = divisors(spec.rope, theta)
    if (slower != 1).any():
        held["rope_freqs.weight"] = (slower.shape, lambda: slower)
    return held


def library() -> Any:
    """The package gguf."""
    try:
        import gguf  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError("its files are written with the package gguf: pip install gguf") from None
    return gguf


def check(raw: dict[str, Any], config: Any) -> None:
    """Refuses what the file would not say."""
    spec = config.layers[0]
    if raw.get("model_type") != "llama":
        raise ValueError(f"its files are written for model_type llama alone, and this is {raw.get('model_type')}")
    if spec.qkv_bias or spec.out_bias or spec.ffn_bias:
        raise ValueError("its files are written for models without biases alone, and this one has some")
    if spec.rope.scale != 1:
        raise ValueError("its files are written for rope that scales frequencies alone, and this one scales more")


def gguf_name(name: str) -> str:
    """ "layers.3.self_attn.q_proj.weight" -> "blk.3.attn_q.weight"."""
    layer = re.match(r"layers\.(\d+)\.", name)
    bare = name[layer.end() if layer else 0 :].removesuffix(".weight")
    return (f"blk.{layer[1]}." if layer else "") + NAMES[bare] + ".weight"


def neighbours(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows [N H, D] of q or k, in every head the first half and the second interleaved."""
    halves = array.reshape(heads, 2, -1, array.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def divisors(rope: Any, theta: float) -> np.ndarray:
    """By what the frequencies of theta are divided, [R / 2] float32: ones unless the rope is scaled."""
    plain = theta ** -(np.arange(0, rope.width, 2, dtype=np.float64) / rope.width)
    return (plain / np.array(rope.frequency)).astype(np.float32)


def in_dtype(array: np.ndarray, kind: str) -> np.ndarray:
    """As the file has it; bfloat16 as the integers that its bits are."""
    import ml_dtypes

    if kind == "BF16":
        return array.astype(ml_dtypes.bfloat16).view(np.uint16)
    return array.astype(np.float32)


def sizes(path: pathlib.Path) -> dict[str, Any]:
    """Of a file: bytes of weights that a decode step reads (of an embedding of its own a row, not counted), and how
    many tensors are of each type."""
    tensors = library().GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    read = [tensor for tensor in tensors if not (untied and tensor.name == "token_embd.weight")]
    kinds = collections.Counter(tensor.tensor_type.name for tensor in tensors)
    return {"weight_bytes": sum(int(tensor.n_bytes) for tensor in read), "tensors": dict(kinds)}
