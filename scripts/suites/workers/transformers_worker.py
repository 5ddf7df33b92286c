"""transformers' side: its own forward and cache, called in the plainest loop, without what `generate` adds.

decode: one forward a step over the cache that holds the prompts, and the best id of its logits; afterwards, and not
timed, the cache is cropped to the prompts again. prefill: one forward of the prompts, with logits of the last alone.
"""

from __future__ import annotations

import time
from typing import Any

import answering
import torch
import transformers


class Transformers:
    """A causal model, on as many threads as it is told."""

    def __init__(self, model: str, dtype: str, threads: int, **_: Any):
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.version, self.cache = transformers.__version__, dtype

    held: Any  # the cache of the prompts

    @torch.inference_mode()
    def prepare(self, work: str, ids: list[list[int]], new_tokens: int) -> None:
        """See `answering.Side`."""
        self.ids, self.num, self.held = torch.tensor(ids), new_tokens, None
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


if __name__ == "__main__":
    answering.serve(Transformers)
