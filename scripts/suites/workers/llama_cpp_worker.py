"""llama.cpp's side, through the C functions that llama-cpp-python binds; its defaults but for the threads.

decode: one `llama_decode` a step with a token of every row, and the best id of its logits; afterwards, and not timed,
what was added is removed from its memory. prefill: `llama_decode` of the prompts, one after the other, each with logits
of its last token alone, into a memory that was cleared before the clock started.

Keys and values are kept in float16, its default; beside weights in float32 they are kept in float32, and attended to
without flash attention, which would round them. Q8_0 and Q4_0 are made from the BF16 file by llama.cpp's own quantizer,
as users have them (in Q4_0 files the output matrix is Q6_K).
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import answering
import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np

FILE_TYPES = {"Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0}


class LlamaCpp:
    """A GGUF file, loaded; it is not mapped, so that all of it is in memory before anything is timed."""

    def __init__(self, model: str, dtype: str, threads: int, quantized: str, **_: Any):
        llama.llama_backend_init()
        if dtype in FILE_TYPES:
            quantize(model, quantized, dtype, threads)
        path = quantized if dtype in FILE_TYPES else model
        how = llama.llama_model_default_params()
        how.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.model = llama.llama_model_load_from_file(path.encode(), how)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load a {dtype} file")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.version, self.threads = llama.__version__, threads
        self.cache = "float32" if dtype == "F32" else "float16"
        self.context = None

    def prepare(self, work: str, ids: list[list[int]], new_tokens: int) -> None:
        """See `answering.Side`."""
        self.work, self.ids, self.num = work, np.array(ids, np.int32), new_tokens
        rows, length = self.ids.shape
        if self.context:
            llama.llama_free(self.context)
        how = llama.llama_context_default_params()
        room = -(-(length + new_tokens) // 256) * 256  # of a row; it would be rounded up to this anyway
        how.n_ctx, how.n_seq_max = rows * room, rows
        how.n_batch = max(how.n_batch, length, rows)
        how.n_threads = how.n_threads_batch = self.threads
        if self.cache == "float32":
            how.type_k = how.type_v = llama.GGML_TYPE_F32
            how.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16: logits are 0.01 off
        self.context = llama.llama_init_from_model(self.model, how)
        if not self.context:
            raise MemoryError(f"llama.cpp has no room for {rows} rows of {room} tokens")
        self.memory = llama.llama_get_memory(self.context)
        self.prompts = [Batch(np.full(length, row), last=1) for row in range(rows)]
        self.step = Batch(np.arange(rows), last=rows)
        if work == "decode":
            self.first = self.read()

    def turn(self) -> tuple[float, list[list[int]]]:
        """See `answering.Side`."""
        return self.prefill() if self.work == "prefill" else self.decode()

    def prefill(self) -> tuple[float, list[list[int]]]:
        """All prompts to their last logits."""
        llama.llama_memory_clear(self.memory, False)
        began = time.perf_counter()
        ids = self.read()
        return time.perf_counter() - began, ids[:, None].tolist()

    def decode(self) -> tuple[float, list[list[int]]]:
        """The steps after the prompts."""
        rows, length = self.ids.shape
        made = [self.first]
        began = time.perf_counter()
        for position in range(length, length + self.num):
            made.append(self.best(self.step.of(made[-1], position), rows))
        seconds = time.perf_counter() - began
        for row in range(rows):
            llama.llama_memory_seq_rm(self.memory, row, length, -1)
        return seconds, np.stack(made, 1).tolist()

    def read(self) -> np.ndarray:
        """Feeds every prompt; the best id after each."""
        position = np.arange(self.ids.shape[1])
        pairs = zip(self.prompts, self.ids, strict=True)
        return np.concatenate([self.best(batch.of(row, position), 1) for batch, row in pairs])

    def best(self, batch: Any, scored: int) -> np.ndarray:
        """Runs a batch; the best id of each of its `scored` logits."""
        if code := llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {code}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self.context), (scored, self.vocab))
        return logits.argmax(1).astype(np.int32)


class Batch:
    """A llama_batch with a token for each of `rows`, of which the `last` ones are scored."""

    def __init__(self, rows: np.ndarray, last: int):
        num = len(rows)
        self.batch = llama.llama_batch_init(num, 0, 1)
        self.batch.n_tokens = num
        self.token, self.position = (
            np.ctypeslib.as_array(pointer, (num,)) for pointer in (self.batch.token, self.batch.pos)
        )
        np.ctypeslib.as_array(self.batch.n_seq_id, (num,))[:] = 1
        np.ctypeslib.as_array(self.batch.logits, (num,))[:] = np.arange(num) >= num - last
        for i, row in enumerate(rows):
            self.batch.seq_id[i][0] = int(row)

    def of(self, ids: np.ndarray, position: Any) -> Any:
        """Itself with these ids at these positions."""
        self.token[:], self.position[:] = ids, position
        return self.batch

    def __del__(self) -> None:
        llama.llama_batch_free(self.batch)


def quantize(model: str, path: str, dtype: str, threads: int) -> None:
    """Writes a file with its matrices in fewer bits."""
    how = llama.llama_model_quantize_default_params()
    how.ftype, how.nthread = FILE_TYPES[dtype], threads
    if code := llama.llama_model_quantize(model.encode(), path.encode(), ctypes.byref(how)):
        raise RuntimeError(f"llama_model_quantize gave {code} for {dtype}")


if __name__ == "__main__":
    answering.serve(LlamaCpp)
