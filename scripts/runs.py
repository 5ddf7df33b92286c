"""A training run, whatever it trains: it goes on where it stopped, bit for bit, and says how it does on the way.

runs.add_flags(parser.add_argument); args = parser.parse_args(); allocation.begin_anew(allocation.KEPT)
params, log = runs.go(args, settings, fresh, advance, look, ...)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxinfer import training

FREE = {"out", "stdlib", "save_every", "eval_every", "stop_after", "no_progress", "json", "tiny"}  # change no result
LASTING = ("steps", "final_steps", "decay_steps")  # until these begin to count, a run does not know how long it is


def add_flags(add: Callable[..., Any]) -> None:
    """The flags of every run; `add` is a parser's add_argument."""
    add("--out", type=pathlib.Path, required=True, help="directory of the run; an interrupted run in it goes on")
    add("--stdlib", help="standard library to read (default: this Python's own)")
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, default=50, help="steps between looks at some of the held-out text")
    add("--save-every", type=float, default=180, help="seconds between checkpoints")
    add("--stop-after", type=int, default=0, help="save and leave after this step, as Ctrl-C does (0: do not)")
    add("--tiny", action="store_true", help="a toy that is done in seconds")
    add("--no-progress", action="store_true")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, lengths: list[int], *counts: str) -> None:
    """Refuses what cannot be trained: counts below one, rows that fit no pass, a schedule longer than the run."""
    for name in (*counts, "steps", "batch", "micro"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}: choose one that divides it")
    if args.head_dim % 2:
        parser.error(f"--head-dim is {args.head_dim}: rope turns pairs, so it must be even")
    for length in lengths:
        if length < 1 or args.micro % length:
            parser.error(f"--micro {args.micro} is no multiple of {length} tokens a row: choose one that is")
    if args.batch % args.micro:
        parser.error(f"--batch {args.batch} is no multiple of --micro {args.micro}: choose one that is")
    if args.warmup < 0 or args.decay_steps < 1 or args.warmup + args.decay_steps > args.steps:
        parser.error(f"--warmup {args.warmup} and --decay-steps {args.decay_steps} exceed --steps {args.steps}")


def go(
    args: argparse.Namespace,
    settings: dict[str, Any],
    fresh: Callable[[], Any],
    advance: Callable[[Any, int], tuple[Any, jax.Array]],
    look: Callable[[Any], Any],
    note: Callable[[float], float],
    shown: Callable[[dict[str, Any]], dict[str, str]],
    draw: Callable[[dict[str, Any]], None],
) -> tuple[Any, dict[str, Any]]:
    """Takes the run to its last step: (params in float32, log). KeyboardInterrupt when it is asked to leave before.

    fresh() is the state at step 0, advance(state, step) one step: (state, loss). The log has `step`, `seconds`, a
    `train` entry a step (note(loss)) with its tokens/s in `rates`, and in `held_out` [step, look(params)]. shown(log)
    stands beside the bar, draw(log) draws the curve whenever the run is saved.
    """
    file = args.out / "checkpoint.npz"
    state, log = start(args, file, settings, fresh)
    step, before = log["step"], log["seconds"]
    asked = signals()
    show = tqdm(total=args.steps, initial=step, disable=args.no_progress, unit="step", mininterval=1)
    saved = began = time.monotonic()
    while step < args.steps:
        tick = time.monotonic()
        state, loss = advance(state, step)
        loss = float(loss)
        step += 1
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} after step {step}: lower --rate and --embed-rate, in a fresh --out")
        log["train"].append(note(loss))
        log["rates"].append(round(args.batch / (time.monotonic() - tick), 1))
        if step % args.eval_every == 0 or step == args.steps:
            log["held_out"].append([step, look(state[0])])
        log |= {"step": step, "seconds": before + time.monotonic() - began}
        show.set_postfix(shown(log) | {"tokens/s": f"{log['rates'][-1]:.0f}"}, refresh=False)
        show.update()
        leaving = asked or step == args.stop_after
        if leaving or step == args.steps or time.monotonic() - saved > args.save_every:
            training.save(file, state, log | {"settings": settings})
            draw(log)
            saved = time.monotonic()
        if leaving and step < args.steps:
            raise KeyboardInterrupt(f"saved after step {step} of {args.steps}: the same command goes on from there")
    show.close()
    return state[0], log


def signals() -> list[int]:
    """A list that the first Ctrl-C or plain kill is put into: a step is seconds long. The second does what it does."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (asked.append(number), signal.signal(number, signal.SIG_DFL)))
    return asked


def start(
    args: argparse.Namespace, file: pathlib.Path, settings: dict[str, Any], fresh: Callable[[], Any]
) -> tuple[Any, dict[str, Any]]:
    """The state at step 0, or where a checkpoint of the same settings left off: (state, log)."""
    if not file.exists():
        return fresh(), {"step": 0, "seconds": 0.0, "train": [], "rates": [], "held_out": []}
    notes = training.read_notes(file)
    old = notes["settings"]
    # Until the rows grow or the rate falls, a run does not know how long it will be.
    level = min(s["steps"] - max(s.get("final_steps", 0), s["decay_steps"]) for s in (old, settings))
    free = set(LASTING) if notes["step"] <= level else set()
    wrong = [key for key in settings | old if old.get(key) != settings.get(key) and key not in free]
    if wrong:
        changes = ", ".join(f"{key} {old.get(key)!r} (now {settings.get(key)!r})" for key in wrong[:4])
        raise ValueError(f"{file} was made with {changes}: give the same settings, or a fresh --out")
    state, log = training.restore(file, jax.eval_shape(fresh))
    del log["settings"]
    say(args, f"going on after step {log['step']} of {args.steps}")
    return state, log


def rows(batches: training.Batches, first: int, args: argparse.Namespace) -> np.ndarray:
    """The batch that begins with row `first`: [passes, rows of a pass, length + 1]."""
    length = batches.length
    return batches(first, args.batch // length).reshape(-1, args.micro // length, length + 1)


def say(args: argparse.Namespace, line: str) -> None:
    """Progress goes to stderr, so that stdout ends with the JSON."""
    if not args.no_progress:
        print(line, file=sys.stderr, flush=True)


def dumps(value: dict[str, Any]) -> str:
    """JSON with one line to a key."""
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}\n"


@contextmanager
def picture(path: pathlib.Path) -> Iterator[Any]:
    """Axes to draw on; the file appears whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
    yield axes
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    figure.tight_layout()
    draft = path.with_suffix(".partial.png")
    figure.savefig(draft)
    plt.close(figure)
    os.replace(draft, path)


def tell(name: str, main: Callable[[], int]) -> None:
    """Runs a script's main and leaves with its exit status: one line, no traceback, for what it refuses."""
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:
        sys.exit(f"\n{stop}" if stop.args else "\nstopped: the same command goes on from the last checkpoint")
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
