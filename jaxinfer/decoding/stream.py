"""Text as it is made: the loop of `generate`, a few tokens a dispatch, and the same result."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from jaxinfer import mesh
from jaxinfer.aot import Programs, result
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.generate import Process, check, check_pages, per_row, run
from jaxinfer.decoding.model import Adapted, Decoder, Model, adapt
from jaxinfer.decoding.state import FINISH, LENGTH, STOP, State, bucket, idle, read
from jaxinfer.sampling import Sampling
from jaxinfer.text import Detokenizer, Tokenizer

NEVER = np.iinfo(np.int32).max
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a jitted function, its arguments, and the static ones


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def read_chunk(params: Any, state: State, ids: jax.Array, num: jax.Array, *, model: Decoder | Adapted) -> State:
    """Takes in a chunk of the prompts."""
    return read(model, params, state, ids, num)[0]


@functools.partial(jax.jit, static_argnames=("room",))
def compress(state: State, *, room: int) -> State:
    """What is left of prompts, in a cache that makes them small; `room` tokens are to follow."""
    return state.replace(cache=state.cache.compress(room))


start = jax.jit(State.init, donate_argnums=0)
cut = jax.jit(State.cut, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one row gained."""

    row: int
    text: str  # may be empty: half a character, or the beginning of a stop string, is held back
    ids: tuple[int, ...]
    finish: str | None = None  # "stop" or "length" with a row's last delta


class Stream:
    """An iterator of `Delta`s, which keeps what it gave: see `stream`."""

    def __init__(self, program: Program, state: State, detokenizers: list[Detokenizer], budget: np.ndarray):
        rows = len(budget)
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(rows)]
        self.text = [""] * rows
        self.finish = ["length" if n == 0 else "running" for n in budget]
        self.prefill_seconds = 0.0
        self.first_seconds = 0.0  # of the first step, which is among the decode_seconds
        self.decode_seconds = 0.0
        self.steps = 0  # passes through the model since the prompts were read
        self.counts: dict[str, np.ndarray] = {}  # what the program counted, one number (or more) a row
        self._program, self._state, self._budget = program, state, budget.copy()
        self._memory: Any = None  # what the program remembers beside the state
        self._ends = np.full(rows, NEVER, np.int32)  # where rows end that went on behind a stop string
        self._detokenizers = detokenizers
        self._stopping = False
        self._deltas = self._run()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    @property
    def state(self) -> State:
        """To go on with: the rows as far as they were given, without what was made behind a stop string."""
        if (self._ends < NEVER).any():
            self._state = cut(self._state, *idle(self._state.cache, self._ends))
            self._ends = np.full_like(self._ends, NEVER)
        return self._state

    @property
    def cache_bytes(self) -> int:
        """Of the cache as it is now: one that makes prompts small is large until they have been read."""
        return self._state.cache.bytes

    def stop(self) -> None:
        """Ends with the dispatch at hand; of several processes one may ask, and all end with the same dispatch."""
        self._stopping = True

    def compile(self) -> list[Any]:
        """Compiles what the stream will run, ahead of time, so that no second of it is counted as prefill or decode.

        Gives the compiled programs: last the loop that decodes, before it one that reads prompts where there are any.
        """
        return self._program.compile(self._state, self._budget)

    def _run(self) -> Iterator[Delta]:
        begin = time.perf_counter()
        for ids, num in self._program.prompts:
            self._state, self._memory = self._program.read(self._state, self._memory, ids, num)
        self._state = self._program.compressed(self._state)
        jax.block_until_ready(self._state.length)
        self.prefill_seconds = time.perf_counter() - begin
        width = 1  # the budget is traced: one program serves every width
        while self._budget.any():
            begin = time.perf_counter()
            asked = np.minimum(self._budget, width).astype(np.int32)
            result, self._memory = self._program.run(self._state, self._memory, asked)
            self._state = result.state
            told = (result.ids, result.num, result.logprobs, result.state.finish, self._program.counted(result))
            new, num, logprobs, finish, counts = mesh.fetch(told)
            seconds, made = time.perf_counter() - begin, int(num.max())
            self.decode_seconds += seconds
            self.first_seconds = self.first_seconds or seconds
            self.steps += int(counts["rounds"].max())
            self.counts = {name: self.counts.get(name, 0) + count for name, count in counts.items()}
            yield from [self._emit(int(row), new, num, logprobs, finish, asked) for row in np.flatnonzero(asked)]
            width = max(1, min(self._program.buffer, self._program.pace / seconds * made))
            heard = mesh.hear(width, self._stopping)  # clocks and keys differ between processes, dispatches must not
            if heard[:, 1].any():
                return
            width = int(heard[0, 0])

    def _emit(self, row: int, new: Any, num: Any, logprobs: Any, finish: Any, asked: np.ndarray) -> Delta:
        detokenizer, got = self._detokenizers[row], new[row, : num[row]].tolist()
        stopped = int(finish[row]) == STOP
        self._budget[row] -= len(got)
        self.logprobs[row] += logprobs[row, : len(got)].tolist()
        text = detokenizer.push(got[:-1] if stopped else got)  # the stop id ends the text and is no part of it
        done = stopped or self._budget[row] == 0 or len(got) < asked[row]  # the last: the cache is full
        if done:
            text += detokenizer.finish()
        given = len(self.ids[row])
        self.ids[row] += got
        if detokenizer.stopped:  # a stop string may have been complete some ids ago, while its text was held back
            del self.ids[row][detokenizer.num :], self.logprobs[row][detokenizer.num :]
            self._ends[row] = self._program.lengths[row] + detokenizer.num
            stopped = done = True
        if done:
            self._budget[row] = 0
            self.finish[row] = FINISH[STOP if stopped else LENGTH]
        self.text[row] += text
        return Delta(row, text, tuple(self.ids[row][given:]), self.finish[row] if done else None)


@dataclasses.dataclass(frozen=True)
class Program:
    """The two programs of a stream with everything that does not change between dispatches."""

    params: Any
    model: Decoder | Adapted
    sampling: Sampling
    key: jax.Array
    process: Process | None
    buffer: int  # tokens a dispatch, at most
    pace: float  # seconds that a dispatch is to take, at most
    prompts: list[tuple[np.ndarray, np.ndarray]]  # chunks of ids [B, T] and num [B]
    lengths: np.ndarray  # [B] tokens before the output begins
    room: int  # tokens that are to follow prompts which are made small
    programs: Programs  # where compiled ones are found

    def compile(self, state: State, budget: np.ndarray) -> list[Compiled]:
        """All programs; later calls find them."""

        def take(call: Call) -> Compiled:
            f, arguments, static = call
            return self.programs.take(f, *arguments, **static)

        found, memory = [], None
        for chunk in self.prompts[:2]:  # the first may make the memory that later ones go on with
            before = memory
            found.append(take(self.reader(state, memory, *chunk)))
            state, memory = self.told(result(found[-1]))
            if memory is before:
                break
        if state.cache.compresses:
            state = result(take(self.compressor(state)))
        return [*found, take(self.runner(state, memory, budget))]

    def read(self, state: State, memory: Any, ids: np.ndarray, num: np.ndarray) -> tuple[State, Any]:
        """One chunk of the prompts."""
        read, arguments, static = self.reader(state, memory, ids, num)
        return self.told(self.programs.run(read, *arguments, **static))

    def run(self, state: State, memory: Any, budget: np.ndarray) -> tuple[Any, Any]:
        """A few tokens of every row."""
        run, arguments, static = self.runner(state, memory, budget)
        made = self.programs.run(run, *arguments, **static)
        return made, self.kept(made)

    def compressed(self, state: State) -> State:
        """What is left of the prompts, where the cache is of a kind that makes them small."""
        if not state.cache.compresses:
            return state
        small, arguments, static = self.compressor(state)
        return self.programs.run(small, *arguments, **static)

    def compressor(self, state: State) -> Call:
        """What makes prompts small."""
        return compress, (state,), {"room": self.room}

    def reader(self, state: State, memory: Any, ids: np.ndarray, num: np.ndarray) -> Call:
        """What reads a chunk."""
        return read_chunk, (self.params, state, *idle(state.cache, ids, num)), {"model": self.model}

    def runner(self, state: State, memory: Any, budget: np.ndarray) -> Call:
        """What makes tokens."""
        arguments = (self.params, state, None, None, self.sampling, *idle(state.cache, budget), self.key)
        return run, arguments, {"model": self.model, "process": self.process, "buffer": self.buffer}

    def told(self, read: Any) -> tuple[State, Any]:
        """State and memory of what a reader gives."""
        return read, None

    def kept(self, result: Any) -> Any:
        """The memory of what a runner gives."""
        return None

    def counted(self, result: Any) -> dict[str, jax.Array]:
        """What is worth counting of a result: at least the passes through the model, `rounds` [B]."""
        return {"rounds": result.num}


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
    pace: float = 0.2,
    prefill_chunk: int = 512,
    program: Callable[..., Program] = Program,
    programs: Programs | None = None,
    **cache: Any,
) -> Stream:
    """Continues prompts, and gives each row's text as it is made.

    prompts: texts, or lists of ids; an empty list for a row that only goes on with `state`.
    stop: strings that end a row; the text is cut before one, and nothing of it is ever given.
    size: of the cache that is made when no state is given; by default what prompts and max_new_tokens need.
    chunk: tokens a dispatch, at most: the first dispatch makes one token, so that it is seen at once, the later ones as
    many as take `pace` seconds. prefill_chunk: prompt tokens a dispatch.
    program: how tokens are made; `speculation.stream` gives one that drafts.
    programs: where compiled programs are found, and kept; this stream's own by default.
    cache: further options of `jaxinfer.init_cache`. The rest is as in `generate`, whose ids these are.

    Raises ValueError before anything is dispatched: what `generate` refuses, chunks smaller than 1, and a size or cache
    options beside a state, which brings its own cache along.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}: give a list of prompts, one per row")
    for name, value in (("chunk", chunk), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if state is not None and (size is not None or cache):
        given = ", ".join(cache) or "size"
        raise ValueError(f"stream got both state= and {given}=: a state brings its cache along, give one of them")
    rows = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    num = np.array([len(row) for row in rows], np.int32)
    budget = np.asarray(per_row(max_new_tokens, len(rows), "max_new_tokens"))
    whole = np.zeros((len(rows), int(num.max(initial=1))), np.int64)  # wide enough to be refused, not wrapped
    for row, out in zip(rows, whole, strict=True):
        out[: len(row)] = row
    if state is None and size is not None and (num + budget).max() - 1 > size:
        row = int((num + budget).argmax())
        raise ValueError(
            f"prompt has {num[row]} tokens and {budget[row]} are to be made, but the cache holds {size}: "
            "shorten the prompt, lower max_new_tokens or make a larger cache"
        )
    check(config, whole, num, budget, None if state is None else state.cache, state)
    detokenizers = [Detokenizer(tokenizer, stop, prompt=row) for row in before(rows, state)]
    laid_out = (sampling or Sampling(temperature=0.0)).rows(len(rows), config.vocab_size, config.stop_ids)
    runner = adapt(model, config)
    if size is None:
        need = bucket(int((num + budget).max()), least=64)
        size = min(need, config.num_positions or need)
    if stop and model is None:
        cache = {"max_rewind": chunk - 1} | cache  # a row may go on behind a stop string to the end of a chunk
    begun: State = start(runner.init_cache(len(rows), size, **cache)) if state is None else state
    check_pages(begun.cache, mesh.fetch(begun.length)[: len(num)] + num + budget - 1)
    made = program(
        params=params,
        model=runner,
        sampling=jax.device_put(jax.tree.map(lambda x: idle(begun.cache, x)[0], laid_out)),
        key=first_key() if key is None else key,
        process=process,
        buffer=chunk,
        pace=pace,
        prompts=list(chunks(whole, num, prefill_chunk)),
        lengths=mesh.fetch(begun.length)[: len(num)] + num,
        room=int(max((begun.cache.size - num).max(), budget.max())),
        programs=Programs() if programs is None else programs,
    )
    return Stream(made, begun, detokenizers, budget)


def first_key() -> jax.Array:
    """jax.random.key(0), without the two programs that making it so compiles."""
    return jax.random.wrap_key_data(jax.device_put(np.zeros(2, np.uint32)), impl="threefry2x32")


def before(rows: list[list[int]], state: State | None) -> list[list[int]]:
    """The ids that each row's text goes on from: its prompt, or what the state holds of a row that got none."""
    if all(rows) or state is None:
        return rows
    tokens, length = mesh.fetch((state.tokens, state.length))
    return [row or [i for i in held[:n].tolist() if i >= 0] for row, held, n in zip(rows, tokens, length, strict=False)]


def chunks(ids: np.ndarray, num: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompts [B, T] in pieces of `size` tokens; a prompt shorter than that is one piece, a rung of the ladder wide."""
    width = min(size, bucket(ids.shape[1]))
    for first in range(0, int(num.max(initial=0)), width):
        piece = ids[:, first : first + width].astype(np.int32)
        yield np.pad(piece, ((0, 0), (0, width - piece.shape[1]))), np.clip(num - first, 0, width).astype(np.int32)
