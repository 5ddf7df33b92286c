"""vLLM's side: its offline engine on the CPU, stepped here and in this process.

By default the engine runs in a process of its own, and takes a core from the one that computes: on two cores that would
leave it one. In this process both compute, and between turns nothing waits in a loop. OpenMP is set up as vLLM's own
launcher does it: Intel's, if it is installed beside vLLM, with threads bound to cores. The allocator that its manual
asks for is used where the machine has it.

decode: the prompts are added and read untimed (all but their last block come from its cache of prefixes), then
new_tokens steps of the engine, each of which gives every row a token. prefill: the cache of prefixes is emptied, the
prompts are added, and the steps are timed until each row has its first token.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import pathlib
import sys
import time
from typing import Any

import answering

BLOCK = 128  # tokens, vLLM's own choice for CPUs
LEAST = 2 << 30  # bytes of cache


class Vllm:
    """An engine with a cache for the most rows that will come."""

    def __init__(self, model: str, dtype: str, rows: int, size: int, cache_bytes: int, **_: Any):
        import vllm  # type: ignore[import-not-found]

        raw = json.loads((pathlib.Path(model) / "config.json").read_text())
        self.engine: Any = vllm.LLM(
            model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=size + 1,
            max_num_seqs=rows,
            max_num_batched_tokens=max(2048, rows * size),  # all prompts in one step: rows begin together
            kv_cache_memory_bytes=max(LEAST, cache_bytes * (size + 2 * BLOCK) // size),
            hf_overrides={"architectures": [architecture(raw)]},
        ).llm_engine
        self.version, self.cache, self.count = vllm.__version__, dtype, 0

    def prepare(self, work: str, ids: list[list[int]], new_tokens: int) -> None:
        """See `answering.Side`."""
        self.ids, self.num, self.decodes = ids, new_tokens, work == "decode"

    def turn(self) -> tuple[float, list[list[int]]]:
        """See `answering.Side`."""
        if not self.decodes:
            self.engine.reset_prefix_cache()
        made = self.add(self.num + 1 if self.decodes else 1)
        began = time.perf_counter()
        self.step(made)
        while not all(made.values()):
            self.step(made)
        if self.decodes:
            before = [len(row) for row in made.values()]
            began = time.perf_counter()
            for _ in range(self.num):
                self.step(made)
            grown = {len(row) - n for row, n in zip(made.values(), before, strict=True)}
            if grown != {self.num}:
                raise RuntimeError(f"{self.num} steps gave rows {sorted(grown)} tokens")
        seconds = time.perf_counter() - began
        return seconds, list(made.values())

    def add(self, new_tokens: int) -> dict[str, list[int]]:
        """Queues every prompt; nothing is made yet."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams  # type: ignore[import-not-found]

        greedy = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        made: dict[str, list[int]] = {}
        for row in self.ids:
            self.count += 1
            self.engine.add_request(str(self.count), {"prompt_token_ids": row}, greedy)
            made[str(self.count)] = []
        return made

    def step(self, made: dict[str, list[int]]) -> None:
        """One step of the engine, and what it made."""
        for output in self.engine.step():
            made[output.request_id] += output.outputs[0].token_ids


def architecture(raw: dict[str, Any]) -> str:
    """The name of the class that a config.json asks for; a shape says its model_type alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return (raw.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[raw["model_type"]]])[0]


def environment() -> dict[str, str]:
    """What must be set before the first library is loaded; see the top."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": str(len(cores))}
    intel = pathlib.Path(sys.prefix) / "lib" / "libiomp5.so"
    preloaded = [str(intel)] if intel.is_file() else []
    if preloaded:
        listed = ",".join(map(str, cores))
        wanted |= {"KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{listed}]"}
        wanted |= {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    if allocator := ctypes.util.find_library("tcmalloc_minimal"):
        preloaded.append(allocator)
    return wanted | ({"LD_PRELOAD": ":".join(preloaded)} if preloaded else {})


if __name__ == "__main__":
    if wanted := {name: value for name, value in environment().items() if os.environ.get(name) != value}:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    answering.serve(Vllm)
