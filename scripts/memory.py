"""What a call takes of this process's memory, at most, beyond what the process held before.

held = memory.held()
run()
more = memory.above(held)  # bytes; None where the system does not say (Linux does)
"""

from __future__ import annotations

import ctypes
import pathlib
import re

OWN = pathlib.Path("/proc/self")


def held() -> int | None:
    """Bytes that are resident now; from here on `above` looks for the most."""
    if not (OWN / "clear_refs").exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what was freed would hide what is taken again
    if trim:
        trim(0)
    try:
        (OWN / "clear_refs").write_text("5")  # proc(5): sets the peak back to what is resident now
    except OSError:
        return None
    return resident("VmRSS")


def above(held: int | None) -> int | None:
    """Bytes that were resident beyond `held` since it was asked for, at most."""
    return None if held is None else max(resident("VmHWM") - held, 0)


def resident(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", (OWN / "status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{OWN}/status does not say {name}")
    return int(found[1]) * 1024
