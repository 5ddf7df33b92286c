"""jaxinfer's side.

decode: `generate` goes on from a state that holds the prompts and their first new token, in one dispatch of new_tokens
steps. A call spends its state, so each turn gets a copy, made before the clock starts. prefill: `prefill` into an empty
cache, which is made before the clock starts, until the logits are there.
"""

from __future__ import annotations

import time
from typing import Any

import answering
import jax
import jax.numpy as jnp
import numpy as np

import jaxinfer


class Jaxinfer:
    """Weights in `dtype`, or in codes: then what is not a product is in bfloat16."""

    def __init__(self, model: str, dtype: str, **_: Any):
        form = None if dtype in ("float32", "bfloat16") else dtype
        self.params, config = jaxinfer.load(model, "bfloat16" if form else dtype, quantize=form)
        self.config = config.replace(stop_ids=())
        self.version = jaxinfer.__version__
        self.cache = jaxinfer.kernels.cache_dtype(config.dtype).name

    def prepare(self, work: str, ids: list[list[int]], new_tokens: int) -> None:
        """See `answering.Side`."""
        self.ids, self.num = jnp.array(ids), new_tokens
        self.state: Any = None
        self.first: Any = None
        if work == "decode":
            cache = jaxinfer.init_cache(self.config, len(ids), len(ids[0]) + new_tokens)
            begun = jaxinfer.generate(self.params, self.config, self.ids, cache=cache, max_new_tokens=1)
            self.state, self.first = begun.state, begun.ids[:, :1]

    def turn(self) -> tuple[float, list[list[int]]]:
        """See `answering.Side`."""
        return self.prefill() if self.state is None else self.decode()

    def prefill(self) -> tuple[float, list[list[int]]]:
        """All prompts to their last logits."""
        rows, length = self.ids.shape
        cache = jax.block_until_ready(jaxinfer.init_cache(self.config, rows, length))
        began = time.perf_counter()
        logits, _ = jax.block_until_ready(jaxinfer.prefill(self.params, self.config, self.ids, cache))
        seconds = time.perf_counter() - began
        return seconds, logits.argmax(-1)[:, None].tolist()

    def decode(self) -> tuple[float, list[list[int]]]:
        """The steps after the prompts."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, self.state))
        began = time.perf_counter()
        made = jaxinfer.generate(self.params, self.config, state=state, max_new_tokens=self.num)
        jax.block_until_ready(made.ids)
        seconds = time.perf_counter() - began
        return seconds, np.concatenate([self.first, made.ids[:, : self.num]], 1).tolist()


if __name__ == "__main__":
    answering.serve(Jaxinfer)
