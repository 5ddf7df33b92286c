"""What a result must tell beside its numbers: the hardware, the versions, and the command that made it.

    result = figures | {"hardware": measured.hardware(), "versions": measured.versions("torch")}
    result |= {"command": measured.command("scripts/bench.py"), "date": measured.date()}

Where a result went is its reader's business, so no directory of this machine is part of it.
"""

from __future__ import annotations

import dataclasses
import functools
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
from typing import Any


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
    """An absolute path's last part, also after `--flag=` or `name=`; any other word as it is."""
    flag, equals, value = word.rpartition("=")
    return flag + equals + (pathlib.Path(value).name if os.path.isabs(value) else value)


def date() -> str:
    """Today."""
    return time.strftime("%Y-%m-%d")


READ = 1 << 30  # bytes, past what a processor keeps
COPIES = 16  # of a dispatch, which is then next to nothing of their time


def plain_read(size: int = READ, passes: int = 5) -> float:
    """GB/s of a plain read of memory: the best of some passes in every way there is, see `reads`."""
    way = reads(size)
    return way.rate(seconds(way.ways, passes))


@dataclasses.dataclass(frozen=True)
class Reads:
    """Memory to read, and by name every way to read all of it once."""

    moved: int  # bytes, of one pass
    ways: dict[str, Callable[[], object]]

    def rate(self, took: dict[Any, list[float]]) -> float:
        """GB/s of the fastest pass, given the seconds of all."""
        return self.moved / min(min(took[name]) for name in self.ways) / 1e9

    def beside(self, lines: list[dict[str, Any]], took: dict[Any, list[float]]) -> list[dict[str, Any]]:
        """Lines of results with their share of a read in the same rounds, or of the fastest line where that is more."""
        rate = self.rate(took)
        most = max([rate, *(line["gb_per_second"] for line in lines)])
        return [
            line | {"plain_read": round(rate, 2), "share_beside": round(line["gb_per_second"] / most, 3)}
            for line in lines
        ]


def reads(size: int) -> Reads:
    """So many bytes to read: by every core at once, with the kernels' widest loads (where they can be built) and with
    numpy. On other devices than a CPU they are copied, which moves them twice, many times in one dispatch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxinfer.kernels import native

    if jax.default_backend() != "cpu":
        held = [jnp.zeros(size // 4, jnp.float32)]
        again = jax.jit(lambda x: jax.lax.fori_loop(0, COPIES, lambda _, x: x + 1, x), donate_argnums=0)

        def copy() -> object:
            held.append(again(held.pop()))
            return held[0]

        return Reads(COPIES * 2 * held[0].nbytes, {"copy": copy})
    cores = os.cpu_count() or 1
    parts = [np.ones(-(-size // 8 // cores), np.uint64) for _ in range(cores)]
    ways: dict[str, Callable[[], object]] = {"numpy": functools.partial(at_once, np.max, parts)}
    if native.unavailable() is None:
        ways["kernel"] = functools.partial(at_once, native.read, parts)
    return Reads(sum(part.nbytes for part in parts), ways)


def at_once(function: Callable[[Any], object], parts: list[Any]) -> None:
    """Each part by a thread of its own, which lets go of Python's lock."""
    threads = [threading.Thread(target=function, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(a: list[float], b: list[float] | None) -> dict[str, float] | None:
    """The ratio of two medians, and its spread round by round; None where there is nothing to compare with."""
    if b is None:
        return None
    rounds = [x / y for x, y in zip(a, b, strict=True)]
    return {"ratio": statistics.median(a) / statistics.median(b), **spread(rounds)}


def seconds(runs: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Of every run, turn by turn in each round; a first round, for compilers, is not counted."""
    import jax

    found: dict[Any, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                found[name].append(time.perf_counter() - began)
    return found


# --- memory --------------------------------------------------------------------------------------------------------


def forget_peak() -> bool:
    """Makes `peak_memory` begin anew; False where it never forgets."""
    import jax

    path = pathlib.Path("/proc/self/clear_refs")
    if jax.default_backend() != "cpu" or not os.access(path, os.W_OK):
        return False
    path.write_text("5")  # of all it can forget, the peak: proc(5)
    return True


def peak_memory() -> int | None:
    """The most bytes that were held: on a device with memory of its own there, else by this process; None: unknown."""
    import jax

    stats, status = jax.local_devices()[0].memory_stats(), pathlib.Path("/proc/self/status")
    if stats:
        return stats["peak_bytes_in_use"]
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


# --- pictures ------------------------------------------------------------------------------------------------------


def draw(path: pathlib.Path, plot: Callable[[pathlib.Path, Any], None], found: Any) -> None:
    """A picture of what was found; a line that says what to install, where nothing can draw it."""
    try:
        import matplotlib
    except ImportError:
        print(
            f"{path.name} was not drawn: there is no matplotlib, which `pip install matplotlib` brings", file=sys.stderr
        )
        return
    matplotlib.use("Agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(path, found)
