"""Decode tokens/s beside transformers, with the same weights and the same prompt, one row, greedy.

Each round measures A, B, A, B, and only ratios within a round are compared: what else the machine does meanwhile hits
both. Before anything is timed, both must have said the same ids (in float32; in bfloat16 how far they agree is told).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import statistics
import sys
import time
import tomllib
from typing import Any

import measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    add("--shape", type=pathlib.Path, required=True, help="config.json keys as .toml or .json; the weights are random")
    add("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    add("--prompt-length", type=int, default=64)
    add("--new-tokens", type=int, default=24, help="tokens that each measurement makes")
    add("--rounds", type=int, default=3, help="A B A B each")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it, prints a line a dtype."""
    raw = read_shape(args.shape)
    results = [compare(raw, dtype, args) for dtype in args.dtype]
    for line in results:
        print(
            f"{line['dtype']:>9}: jaxinfer {line['jaxinfer']['median']:.2f} tokens/s, {line['gb_per_second']:.1f} GB/s;"
            f" transformers {line['transformers']['median']:.2f}; ratio {line['ratio']['median']:.2f}"
            f" ({line['ratio']['min']:.2f} to {line['ratio']['max']:.2f}); first ids the same: {line['same_ids']}"
        )
    return {
        "benchmark": "decode beside transformers, one row, greedy, the same random weights",
        "shape": args.shape.stem,
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
        "results": results,
        "versions": measured.versions("transformers", "torch"),
    }


def read_shape(path: pathlib.Path) -> dict[str, Any]:
    """The config.json keys of a shape."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give a shape such as configs/models/llama-3.2-1b.toml")
    return tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())


def compare(raw: dict[str, Any], dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both, side by side, in one dtype."""
    import jax
    import numpy as np

    from jaxinfer import models, roofline

    config = models.config_from_hf(raw).replace(dtype=dtype, stop_ids=())
    params = jax.block_until_ready(models.init_params(config, jax.random.key(args.seed), dtype))
    prompt = np.random.default_rng(args.seed).integers(0, config.vocab_size, args.prompt_length).tolist()
    ours, theirs = Ours(params, config, prompt, args.new_tokens), Theirs(params, raw, dtype, prompt, args.new_tokens)
    first = [ours(), theirs()]  # warm, and not timed
    same = next((i for i, (a, b) in enumerate(zip(*first, strict=True)) if a != b), len(first[0]))
    if dtype == "float32" and same < len(first[0]):
        print(f"float32 ids differ from token {same} on: {first}", file=sys.stderr)
    rates: dict[str, list[float]] = {"jaxinfer": [], "transformers": []}
    for _ in range(2 * args.rounds):
        for name, side in (("jaxinfer", ours), ("transformers", theirs)):
            begin = time.perf_counter()
            side()
            rates[name].append(args.new_tokens / (time.perf_counter() - begin))
    ratios = [a / b for a, b in zip(rates["jaxinfer"], rates["transformers"], strict=True)]
    length = args.prompt_length + args.new_tokens // 2
    read = roofline.decode_bytes(config, 1, length, dtype)
    del ours, theirs, params
    gc.collect()
    return {
        "dtype": dtype,
        "jaxinfer": measured.spread(rates["jaxinfer"]),
        "transformers": measured.spread(rates["transformers"]),
        "ratio": measured.spread(ratios),
        "gb_per_second": round(read * statistics.median(rates["jaxinfer"]) / 1e9, 2),
        "same_ids": f"{same} of {len(first[0])}",
    }


class Ours:
    """Greedy decoding by `jaxinfer.generate`: one dispatch a measurement, from the same prompt each time."""

    def __init__(self, params: Any, config: Any, prompt: list[int], num: int):
        import jax
        import jax.numpy as jnp

        import jaxinfer

        self.generate = lambda **more: jaxinfer.generate(params, config, max_new_tokens=num, **more)
        self.copy = lambda tree: jax.tree.map(jnp.copy, tree)
        cache = jaxinfer.init_cache(config, 1, len(prompt) + num)
        _, self.cache = jaxinfer.prefill(params, config, jnp.array([prompt[:-1]]), cache)
        self.prompt = prompt

    def __call__(self) -> list[int]:
        """The new ids."""
        result = self.generate(ids=[self.prompt[-1:]], cache=self.copy(self.cache))
        return result.ids[0, : int(result.num[0])].tolist()


class Theirs:
    """Greedy decoding by transformers: its own forward and cache, called in the plainest loop, without `generate`."""

    def __init__(self, params: Any, raw: dict[str, Any], dtype: str, prompt: list[int], num: int):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from jaxinfer.training import export

        torch.set_num_threads(os.cpu_count() or 1)
        config = AutoConfig.for_model(**raw)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        arrays = {name: as_torch(array) for name, array in export.named_tensors(params, raw).items()}
        self.model.to_empty(device="cpu")
        missing, surplus = self.model.load_state_dict(arrays, strict=False, assign=True)
        missing = [name for name in missing if "inv_freq" not in name]
        if surplus or [name for name in missing if name != "lm_head.weight"]:
            raise ValueError(f"transformers lacks {missing} and has no place for {surplus}")
        if missing:
            self.model.tie_weights()
        reset_buffers(self.model, config)
        self.model.eval()
        self.prompt, self.num = torch.tensor([prompt]), num
        with torch.inference_mode():
            self.cache = self.model(self.prompt[:, :-1], use_cache=True).past_key_values

    def __call__(self) -> list[int]:
        """The new ids."""
        import torch

        ids, new = self.prompt[:, -1:], []
        with torch.inference_mode():
            for _ in range(self.num):
                logits = self.model(ids, past_key_values=self.cache, use_cache=True).logits
                ids = logits[:, -1:].argmax(-1)
                new.append(int(ids))
        self.cache.crop(-self.num)
        return new


def reset_buffers(model: Any, config: Any) -> None:
    """Rope's frequencies, which no checkpoint holds and `to_empty` left undrawn."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)


def as_torch(array: Any) -> Any:
    """A numpy array as a tensor on the same memory."""
    import numpy as np
    import torch

    array = np.array(array)  # its own, writable
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
