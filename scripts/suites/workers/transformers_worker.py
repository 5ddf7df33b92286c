"""transformers' side: its own forward and cache, called in the plainest loop, without what `generate` adds.

decode: one forward a step over the cache that holds the prompts, and the best id of its logits; afterwards, and not
timed, the cache is cropped to the prompts again. prefill: one forward of the prompts, with logits of the last alone.

On a GPU a step is compiled, over a static cache, as transformers' own `generate` does it there (torch.compile, mode
"reduce-overhead", which replays one CUDA graph a step); prompts are read without.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import answering
import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Transformers:
    """A causal model, on as many threads as it is told."""

    def __init__(self, model: str, dtype: str, threads: int, **_: Any):
        torch.set_num_threads(threads)
        self.model = read(model, getattr(torch, dtype)).eval().to(DEVICE)
        self.version, self.cache = transformers.__version__, dtype

    held: Any  # the cache of the prompts

    @torch.inference_mode()
    def prepare(self, work: str, ids: list[list[int]], new_tokens: int) -> None:
        """See `answering.Side`."""
        self.ids, self.num, self.held = torch.tensor(ids, device=DEVICE), new_tokens, None
        if work == "decode":
            out = self.model(self.ids, use_cache=True, logits_to_keep=1)
            self.held, self.first = out.past_key_values, out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def turn(self) -> tuple[float, list[list[int]]]:
        """See `answering.Side`."""
        return self.prefill() if self.held is None else self.decode()

    def prefill(self) -> tuple[float, list[list[int]]]:
        """All prompts to their last logits."""
        began = time.perf_counter()
        logits = self.model(self.ids, use_cache=True, logits_to_keep=1).logits
        done()
        seconds = time.perf_counter() - began
        return seconds, logits[:, -1:].argmax(-1).tolist()

    def decode(self) -> tuple[float, list[list[int]]]:
        """The steps after the prompts."""
        made = [self.first]
        began = time.perf_counter()
        for _ in range(self.num):
            logits = self.model(made[-1], past_key_values=self.held, use_cache=True).logits
            made.append(logits[:, -1:].argmax(-1))
        seconds = time.perf_counter() - began
        self.held.crop(-self.num)
        return seconds, torch.cat(made, 1).tolist()


class Compiled(Transformers):
    """With steps that are compiled, over a cache of a fixed size."""

    def __init__(self, model: str, dtype: str, threads: int, **more: Any):
        super().__init__(model, dtype, threads, **more)
        self.step = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)

    @torch.no_grad()
    def prepare(self, work: str, ids: list[list[int]], new_tokens: int) -> None:
        """See `answering.Side`."""
        self.ids, self.num, self.held = torch.tensor(ids, device=DEVICE), new_tokens, None
        if work == "decode":
            size = self.ids.shape[1] + new_tokens
            self.held = transformers.StaticCache(config=self.model.config, max_cache_len=size)

    @torch.no_grad()
    def turn(self) -> tuple[float, list[list[int]]]:
        """See `answering.Side`."""
        return self.prefill() if self.held is None else self.decode()

    def decode(self) -> tuple[float, list[list[int]]]:
        """The steps after the prompts, which are read anew."""
        self.held.reset()
        out = self.model(self.ids, past_key_values=self.held, use_cache=True, logits_to_keep=1)
        made = [out.logits[:, -1:].argmax(-1)]
        done()
        began = time.perf_counter()
        for _ in range(self.num):
            logits = self.step(made[-1], past_key_values=self.held, use_cache=True).logits
            made.append(logits[:, -1:].argmax(-1))
        done()
        seconds = time.perf_counter() - began
        return seconds, torch.cat(made, 1).tolist()


def read(model: str, dtype: torch.dtype) -> Any:
    """A checkpoint's model; random weights where a directory has nothing but its config."""
    if any(pathlib.Path(model).glob("*.safetensors")):
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(model), dtype=dtype
        )


def done() -> None:
    """Waits for what a GPU still does."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    answering.serve(Compiled if DEVICE == "cuda" else Transformers)
