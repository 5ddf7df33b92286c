"""What a result must tell beside its numbers: the hardware, the versions, and the command that made it.

    result = figures | {"hardware": measured.hardware(), "versions": measured.versions("torch")}
    result |= {"command": measured.command("scripts/bench.py"), "date": measured.date()}

Where a result went is its reader's business, so no directory of this machine is part of it.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import platform
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable


def hardware() -> str:
    """The processor by name, and how many of its cores there are."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions(*more: str) -> dict[str, str]:
    """Of Python, jaxinfer, jax, and of `more` packages that took part."""
    packages = {name: importlib.import_module(name).__version__ for name in ("jaxinfer", "jax", *more)}
    return {"python": platform.python_version(), **packages}


def command(script: str, words: list[str] | None = None) -> str:
    """The command line (`words`: default this process's) as another machine can run it: no directories of this one."""
    words = sys.argv[1:] if words is None else words
    return f"python {script} " + shlex.join(map(without_directories, words))


def without_directories(word: str) -> str:
    """An absolute path's last part, also after `--flag=`; any other word as it is."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (pathlib.Path(value).name if os.path.isabs(value) else value)


def date() -> str:
    """Today."""
    return time.strftime("%Y-%m-%d")


def plain_read(size: int = 1 << 30, passes: int = 5) -> float:
    """GB/s of a plain read by every core at once, the best of some passes."""
    import numpy as np

    cores = os.cpu_count() or 1
    parts = [np.ones(size // 8 // cores, np.int64) for _ in range(cores)]
    best = 0.0
    for _ in range(passes):
        threads = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Of every run, turn by turn in each round; a first round, for compilers, is not counted."""
    import jax

    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                found[name].append(time.perf_counter() - began)
    return found
