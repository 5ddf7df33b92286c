"""The parent's end of a worker: a process of its own, with an interpreter of its own, that answers line by line.

    with Worker(python, script, timeout=600) as worker:
        worker.ask("load", model=path, dtype="BF16")

What is said is in `workers/answering.py`. A worker that dies, or does not answer in time, raises `Lost` with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")  # of a second
GRACE = 10.0  # seconds that a worker has to end by itself


class Lost(Exception):
    """A worker is gone, or as good as gone; the message is one line."""


class Worker:
    """Started at once; ends with its `with` block, or when it is lost."""

    def __init__(self, interpreter: str, script: pathlib.Path, timeout: float):
        self.timeout, self.closed = timeout, False
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(
            [interpreter, str(script)], env=environment(interpreter), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """What it answers; `Lost` where it does not."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it is gone: reading says so, below
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], self.timeout)[0]:
            self.close(grace=0)
            raise Lost(f"no answer to {do!r} in {self.timeout:g} s; its last words: {self.last_words()}")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            self.close()
            raise Lost(f"it ended ({self.process.returncode}) at {do!r}; its last words: {self.last_words()}")
        return json.loads(line)

    def last_words(self) -> str:
        """The last line of its log, or the beginning of that."""
        self.log.seek(max(self.log.seek(0, os.SEEK_END) - 10_000, 0))
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "none"

    def cpu_seconds(self) -> float:
        """What all its threads have computed so far; 0 where the system does not say."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat")
        fields = stat.read_text().rpartition(")")[2].split() if stat.is_file() else ()
        return sum(map(int, fields[11:13])) / TICKS  # proc(5): utime, stime

    def close(self, grace: float = GRACE) -> None:
        """Ends it, and what it started."""
        if self.closed:
            return
        self.closed = True
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment(interpreter: str) -> dict[str, str]:
    """All cores for OpenMP; another interpreter does not see this one's packages."""
    own = () if interpreter == sys.executable else ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in own} | {
        "OMP_NUM_THREADS": str(os.cpu_count() or 1)
    }


def installed(interpreter: str, package: str) -> bool:
    """Whether an interpreter finds a package; nothing is imported."""
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    done = subprocess.run([interpreter, "-c", find], env=environment(interpreter), capture_output=True, check=False)
    return done.returncode == 0
