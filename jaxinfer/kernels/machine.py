"""What machine code depends on, beside the program that it was made from."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import platform
import re

import jax

from jaxinfer.kernels import native


def machine() -> dict[str, str]:
    """What programs compiled here ask of a machine, in words: its processor, and whether the CPU kernels are there.

    On a CPU asking builds, loads and registers these, so that a program which calls them can be loaded afterwards.
    """
    there = jax.default_backend() == "cpu" and native.unavailable() is None
    return {"processor": processor(), "CPU kernels": "there" if there else "none"}


@functools.cache
def processor(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """The processor's name, with a digest of the instruction sets that it has, where Linux lists them."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name, sets = (re.search(rf"^(?:{words})\s*:\s*(.*)", text, re.M) for words in ("model name", "flags|Features"))
    digest = f" ({hashlib.sha256(sets[1].encode()).hexdigest()[:8]})" if sets else ""
    return f"{platform.machine()} {name[1] if name else platform.processor()}{digest}"
