"""The C++ kernels of the CPU (csrc/), as XLA FFI handlers that work on XLA's own threads: loaded the first time."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable

import jax
import numpy as np

from jaxinfer.kernels import build

# The number changes with what a handler is given: a program from a persistent cache never calls another version's.
LINEAR, CODED, GATED = "jaxinfer_linear_v1", "jaxinfer_coded_v5", "jaxinfer_gated_v1"
ATTENTION = "jaxinfer_attention_v4"
ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512bf16": 3, "amx": 4}
BEST = -1

_lock = threading.Lock()


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine has and the kernels know, best last. BuildError if there are none."""
    best = ctypes.CDLL(str(build.library())).jaxinfer_best_isa()
    return tuple(name for name, number in ISAS.items() if number <= best)


@functools.cache
def best() -> str | None:
    """The best of `isas`, or None where there are no kernels (`unavailable` says why)."""
    return None if unavailable() else isas()[-1]


def unavailable() -> str | None:
    """Why there are no kernels, or None if there are; builds, loads and registers them the first time it is asked.

    Where that fails, one line (a warning of the logger `jaxinfer`, which is stderr unless configured) says so, once.
    """
    with _lock:
        return _load()


def read(words: np.ndarray, isa: str | None = None) -> int:
    """Reads an array of uint64 by one thread and the widest loads there are; gives the sum, modulo 2**64.

    No program reads faster, so that is what others are compared with. It works beside Python's other threads. isa: one
    of ISAS, for tests. RuntimeError if there is no kernel.
    """
    demand()
    if words.dtype != np.uint64 or not words.flags.c_contiguous:
        raise ValueError(f"read got an array of {words.dtype}: give it uint64 that lie side by side")
    return _reader()(words.ctypes.data, words.size, BEST if isa is None else ISAS[isa])


@functools.cache
def _reader() -> Callable[[int, int, int], int]:
    reader = ctypes.CDLL(str(build.library())).jaxinfer_read
    reader.argtypes, reader.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32), ctypes.c_uint64
    return reader


def demand() -> None:
    """RuntimeError if there are no kernels."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"there is no CPU kernel: {reason}")


@functools.cache
def _load() -> str | None:
    try:
        handle = ctypes.CDLL(str(build.library()))
        for name in (LINEAR, CODED, GATED, ATTENTION):
            handler = getattr(handle, name.rpartition("_")[0])
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    except (build.BuildError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        logging.getLogger("jaxinfer").warning(
            "No CPU kernel: %s. Products and attention go through XLA, at about half the speed; g++ or clang++ would "
            "change that.",
            reason,
        )
        return reason
    return None
