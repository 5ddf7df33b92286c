"""Text as it is made: the loop of `generate`, a few tokens a dispatch, and the same result."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.decoding.generate import Process, check, per_row, run
from jaxinfer.decoding.model import Adapted, Decoder, Model, adapt
from jaxinfer.decoding.state import FINISH, LENGTH, RUNNING, STOP, State, bucket, read
from jaxinfer.sampling import Sampling
from jaxinfer.text import Detokenizer, Tokenizer

read_program = functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))(
    lambda params, state, ids, num, *, model: read(model, params, state, ids, num)
)


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one row gained."""

    row: int
    text: str  # may be empty: half a character, or the beginning of a stop string, is held back
    ids: tuple[int, ...]
    finish: str | None = None  # "stop" or "length" with a row's last delta


class Stream:
    """An iterator of `Delta`s, which keeps what it gave: see `stream`."""

    def __init__(
        self, program: Program, state: State, tokenizer: Tokenizer, budget: np.ndarray, stop: Sequence[str], chunk: int
    ):
        rows = len(budget)
        self.state = state
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(rows)]
        self.text = [""] * rows
        self.finish = ["length" if n == 0 else "running" for n in budget]
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.steps = 0  # passes through the model since the prompts were read
        self._program, self._budget, self._chunk = program, budget.copy(), chunk
        self._detokenizers = [Detokenizer(tokenizer, stop) for _ in range(rows)]
        self._deltas = self._run()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def _run(self) -> Iterator[Delta]:
        begin = time.perf_counter()
        for ids, num in self._program.prompts:
            self.state = self._program.read(self.state, ids, num)
        jax.block_until_ready(self.state.length)
        self.prefill_seconds = time.perf_counter() - begin
        width = 1  # the first token at once, then a chunk of them at a time: the budget is traced, one program serves
        while self._budget.any():
            begin = time.perf_counter()
            asked = np.minimum(self._budget, width).astype(np.int32)
            result = self._program.run(self.state, asked)
            self.state = result.state
            new, num, logprobs, finish = jax.device_get((result.ids, result.num, result.logprobs, result.finish))
            self.decode_seconds += time.perf_counter() - begin
            self.steps += int(num.max())
            yield from self._emit(new, num, logprobs, finish, asked)
            width = self._chunk

    def _emit(self, new: Any, num: Any, logprobs: Any, finish: Any, asked: np.ndarray) -> Iterator[Delta]:
        ends = np.full(len(num), np.iinfo(np.int32).max, np.int32)
        deltas = []
        for row in np.flatnonzero(asked):
            row = int(row)
            detokenizer, got = self._detokenizers[row], new[row, : num[row]].tolist()
            self._budget[row] -= len(got)
            code = int(finish[row])
            hidden = code == STOP  # the stop id ends the text and is no part of it
            text = detokenizer.push(got[:-1] if hidden else got)
            done = self._budget[row] == 0 or code == STOP or len(got) < asked[row]
            if detokenizer.stopped:
                used = detokenizer.num - len(self.ids[row])
                ends[row] = self._program.lengths[row] + detokenizer.num
                got, code, done = got[:used], STOP, True
            elif done:
                text += detokenizer.finish()
                if detokenizer.stopped:
                    code = STOP
            if done:
                self._budget[row] = 0
                self.finish[row] = FINISH[STOP if code == STOP else LENGTH]
            self.ids[row] += got
            self.logprobs[row] += logprobs[row, : len(got)].tolist()
            self.text[row] += text
            deltas.append(Delta(row, text, tuple(got), self.finish[row] if done else None))
        if (ends < np.iinfo(np.int32).max).any():
            self.state = cut_program(self.state, ends)
        yield from deltas


cut_program = functools.partial(jax.jit, donate_argnums=0)(State.cut)


@dataclasses.dataclass(frozen=True)
class Program:
    """The two programs of a stream with everything that does not change between dispatches."""

    params: Any
    model: Decoder | Adapted
    sampling: Sampling
    key: jax.Array
    process: Process | None
    buffer: int
    prompts: list[tuple[np.ndarray, np.ndarray]]  # chunks of ids [B, T] and num [B]
    lengths: np.ndarray  # [B] tokens before the output begins

    def read(self, state: State, ids: np.ndarray, num: np.ndarray) -> State:
        """One chunk of the prompts."""
        return read_program(self.params, state, ids, num, model=self.model)

    def run(self, state: State, budget: np.ndarray) -> Any:
        """A few tokens of every row."""
        return run(
            self.params, state, None, None, self.sampling, budget, self.key,
            model=self.model, process=self.process, buffer=self.buffer,
        )  # fmt: skip


def stream(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    state: State | None = None,
    size: int | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: Any = 128,
    stop: Sequence[str] = (),
    key: jax.Array | None = None,
    model: Model | None = None,
    process: Process | None = None,
    chunk: int = 8,
    prefill_chunk: int = 512,
    **cache: Any,
) -> Stream:
    """Continues prompts, and gives each row's text as it is made.

    prompts: texts, or lists of ids; an empty list for a row that only goes on with `state`.
    stop: strings that end a row; the text is cut before one, and nothing of it is ever given.
    size: of the cache that is made when no state is given; by default what prompts and max_new_tokens need.
    chunk: tokens a dispatch; the first one makes one token, so that it is seen at once. prefill_chunk: prompt tokens a
    dispatch. cache: further options of `jaxinfer.init_cache`. The rest is as in `generate`, whose ids these are.

    Raises ValueError before anything is dispatched: what `generate` refuses, and chunks smaller than 1.
    """
    for name, value in (("chunk", chunk), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    rows = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    num = np.array([len(row) for row in rows], np.int32)
    budget = np.asarray(per_row(max_new_tokens, len(rows), "max_new_tokens"))
    whole = np.zeros((len(rows), int(num.max(initial=1))), np.int32)
    for row, out in zip(rows, whole, strict=True):
        out[: len(row)] = row
    runner = adapt(model, config)
    if state is None and size is not None and (num + budget).max(initial=0) - 1 > size:
        row = int((num + budget).argmax())
        raise ValueError(
            f"prompt has {num[row]} tokens and {budget[row]} are to be made, but the cache holds {size}: "
            "shorten the prompt, lower max_new_tokens or make a larger cache"
        )
    check(config, whole, num, budget, None if state is None else state.cache, state)
    if state is None:
        need = bucket(int((num + budget).max()), least=64)
        limit = config.num_positions or need
        state = State.init(runner.init_cache(len(rows), min(need, limit) if size is None else size, **cache))
    program = Program(
        params=params,
        model=runner,
        sampling=(sampling or Sampling(temperature=0.0)).rows(len(rows), config.vocab_size, config.stop_ids),
        key=jax.random.key(0) if key is None else key,
        process=process,
        buffer=chunk,
        prompts=list(chunks(whole, num, prefill_chunk)),
        lengths=np.asarray(state.length) + num,
    )
    return Stream(program, state, tokenizer, budget, stop, chunk)


def chunks(ids: np.ndarray, num: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompts [B, T] in pieces of `size` tokens; a prompt shorter than that is one piece, a rung of the ladder wide."""
    width = min(size, bucket(ids.shape[1]))
    for start in range(0, int(num.max(initial=0)), width):
        piece = ids[:, start : start + width]
        yield np.pad(piece, ((0, 0), (0, width - piece.shape[1]))), np.clip(num - start, 0, width).astype(np.int32)
