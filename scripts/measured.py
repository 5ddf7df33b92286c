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
import sys
import time


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
