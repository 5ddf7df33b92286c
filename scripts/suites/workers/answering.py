"""A worker's end of the talk: one JSON object a line on stdin, and for each one a line back. Standard library alone.

    {"do": "load", "model": PATH, "dtype": "bfloat16", "rows": 8, "size": 545, ...}  -> {"version": ..., "cache": ...}
    {"do": "prepare", "work": "decode", "ids": [[...], ...], "new_tokens": 32}       -> {}
    {"do": "turn"}                                               -> {"seconds": 0.91, "ids": [[...], ...]}

load: the most rows and the most tokens that a row will have come with it. prepare: what the turns that follow do, for
prompts of one length. A turn is one measurement; its ids are, of each row, the one that the prompt's last logits say,
and for decode the new_tokens that follow. Between turns a worker waits on stdin, and does nothing.

What the library prints goes to stderr. An exception ends the worker: its last line there says why.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Side(Protocol):
    """A model, ready to be measured."""

    version: str
    cache: str  # the dtype that keys and values are kept in

    def prepare(self, work: str, ids: list[list[int]], new_tokens: int) -> None:
        """What the next turns do: "decode" or "prefill"."""

    def turn(self) -> tuple[float, list[list[int]]]:
        """Does it once: seconds, and the ids of each row."""
        ...


def serve(load: Callable[..., Side]) -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        do, answer = asked.pop("do"), {}
        if do == "load":
            side = load(**asked)
            answer = {"version": side.version, "cache": side.cache}
        elif do == "prepare":
            side.prepare(**asked)
        else:
            seconds, ids = side.turn()
            answer = {"seconds": seconds, "ids": ids}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
