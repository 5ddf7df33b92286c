"""Tiny random checkpoints of every family, made with transformers: the oracle (DESIGN.md 7).

    model = write_checkpoint(directory, "gemma2", "bare", seed=1)  # the torch model whose files now lie there

Sizes are odd on purpose (heads, widths and vocabularies that no mesh divides), and EVERY parameter is redrawn: default
initialisation hides biases, norms and scales.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 101
WINDOW = 5
ORIGINAL = 16  # the original context of scaled ropes: shorter than the prompts of the tests
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,  # what compiles takes most of the time of a test
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.1,  # large, so that a wrong one shows
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
NO_WINDOW = {"sliding_window": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LINEAR = {"rope_type": "linear", "rope_theta": 2000.0, "factor": 2.5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 3.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0],
}
S, F = "sliding_attention", "full_attention"
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 42,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "layer_norm_epsilon": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
PHI3 = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}

CASES: dict[str, dict[str, dict[str, Any]]] = {  # model_type -> variant -> what its config has beyond BASE
    "llama": {
        "plain": {"head_dim": 10},
        "multi_head": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_act": "gelu"},
        "tied_biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "llama3": {"head_dim": 10, "rope_parameters": LLAMA3},
        "linear": {"rope_parameters": LINEAR},
        "yarn": {"head_dim": 14, "rope_parameters": YARN},
    },
    "mistral": {
        "plain": {"head_dim": 14, "sliding_window": WINDOW},
        "whole": {"head_dim": 8, "num_key_value_heads": 3, "tie_word_embeddings": True, **NO_WINDOW},
    },
    "qwen2": {
        "plain": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1},
        "windows": {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        "listed": {
            "use_sliding_window": True,
            "sliding_window": WINDOW - 1,
            "num_hidden_layers": 3,
            "layer_types": [S, F, S],
            "rope_parameters": YARN | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4},
        },
    },
    "qwen3": {
        "plain": {"head_dim": 10},
        "windows": {
            "head_dim": 14,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "gemma2": {
        "plain": {
            "head_dim": 10,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
        "bare": {
            "head_dim": 8,
            "sliding_window": WINDOW - 1,
            "num_hidden_layers": 3,
            "layer_types": [F, S, S],
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    },
    "gemma3_text": {
        "plain": {
            "head_dim": 10,
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 9,
            "rope_parameters": {S: {"rope_theta": 100.0, "rope_type": "default"}, F: LINEAR},
        },
        "capped": {
            "head_dim": 8,
            "sliding_window": WINDOW - 1,
            "num_hidden_layers": 3,
            "layer_types": [F, S, F],
            "query_pre_attn_scalar": 6,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    },
    "gemma3": {
        "plain": {
            "text_config": BASE
            | {"head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 9, "layer_types": [S, F]},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": VOCAB - 1,
        }
    },
    "phi3": {
        "plain": PHI3,
        "windows": PHI3 | {"sliding_window": WINDOW, "tie_word_embeddings": True, "num_key_value_heads": 3},
        "partial": PHI3 | {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        "short": PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        "long": PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    },
    "olmo2": {
        "plain": {},
        "tied_biased": {"num_key_value_heads": 3, "attention_bias": True, "tie_word_embeddings": True},
    },
    "smollm3": {
        "plain": {"no_rope_layer_interval": 2},
        "windows": {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    },
    "gpt2": {
        "plain": GPT2,
        "untied": GPT2
        | {
            "n_embd": 40,
            "n_head": 5,
            "n_inner": 57,
            "activation_function": "relu",
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "tie_word_embeddings": False,
        },
        "long": GPT2 | {"n_positions": 96, "n_inner": 57},
        "unscaled": GPT2 | {"scale_attn_weights": False, "n_head": 6},
    },
}
OWN_SIZES = ("gpt2", "gemma3")  # do not take BASE

torch.set_num_threads(1)  # of tiny products, threads only wait for one another
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def hf_config(family: str, variant: str = "plain") -> Any:
    """The transformers config of a case."""
    base = {} if family in OWN_SIZES else BASE
    own = json.loads(json.dumps(CASES[family][variant]))  # a copy: transformers writes into what it is given
    return AutoConfig.for_model(family, **base | own)


def hf_model(family: str, variant: str = "plain", seed: int = 0) -> Any:
    """The torch model of a case, float32 on the CPU, plain attention, everything redrawn."""
    if family == "gemma3":
        model = transformers.Gemma3ForConditionalGeneration(hf_config(family, variant))
        model.set_attn_implementation("eager")
    else:
        model = AutoModelForCausalLM.from_config(hf_config(family, variant), attn_implementation="eager")
    return redraw(model.eval().float(), seed)


def write_checkpoint(directory: str | os.PathLike[str], family: str, variant: str = "plain", seed: int = 0) -> Any:
    """Writes config.json, generation_config.json and model.safetensors; gives the torch model that they describe."""
    model = hf_model(family, variant, seed)
    model.save_pretrained(directory)
    return model


def redraw(model: torch.nn.Module, seed: int) -> Any:
    """New values for all parameters and stored buffers: norms 1 +- 0.2 (Gemma: 0 +- 0.2), the rest N(0, 0.2).

    Not more: at 0.3 attention is so sharp that torch in float32 is 1e-4 off torch in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    around_zero = model.config.model_type.startswith("gemma")
    done = set[int]()
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if value.data_ptr() in done:  # tied
                continue
            done.add(value.data_ptr())
            if "norm" in name or "ln_" in name.rsplit(".", 2)[-2]:
                spread = 0.4 * torch.rand(value.shape, generator=generator) - 0.2
                value.copy_(spread if around_zero or name.endswith("bias") else 1 + spread)
            else:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def raw_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a checkpoint."""
    return json.loads(pathlib.Path(directory, "config.json").read_text())


def as_v4(raw: dict[str, Any], legacy: bool = False) -> dict[str, Any]:
    """A v5 config.json as transformers v4 wrote it: rope_theta, rope_scaling, torch_dtype.

    legacy: with `type` for `rope_type`, as before 4.45.
    """
    raw = dict(raw)
    if "text_config" in raw:
        raw["text_config"] = as_v4(raw["text_config"], legacy)
    if "dtype" in raw:
        raw["torch_dtype"] = raw.pop("dtype")
    rope = raw.pop("rope_parameters", None)
    if rope is None:
        return raw
    if F in rope:
        raw["rope_local_base_freq"] = rope[S]["rope_theta"]
        raw["sliding_window_pattern"] = raw.pop("_sliding_window_pattern")
        rope = rope[F]
    rope = dict(rope)
    raw["rope_theta"] = rope.pop("rope_theta")
    if raw["model_type"] == "phi3":
        raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope.pop("original_max_position_embeddings", None)
    if legacy:
        rope["type"] = rope.pop("rope_type")
    raw["rope_scaling"] = None if "default" in rope.values() else rope
    return raw
