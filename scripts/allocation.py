"""How a script's memory is allocated. glibc reads that when a process begins, so the script begins anew, once.

if __name__ == "__main__":
    allocation.begin_anew(allocation.HUGE)
"""

from __future__ import annotations

import os
import sys

# Linux gives pages of 2 MB only to those who ask, as numpy does and XLA does not. With them products read weights 1.06
# times as fast, attention caches 1.05 to 1.15 times (2 cores, Xeon with AMX).
HUGE = "glibc.malloc.hugetlb=1"
# XLA allocates what a step of training needs at every step. glibc gives such large blocks back to the kernel at once,
# which then clears them again page by page: 2508 tokens/s; kept, and in huge pages, 4332 (2 cores, Zen 5).
KEPT = f"{HUGE}:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
# Threads have heaps of their own, which do not ask, and XLA's put there what is smaller than 32 MB. One heap for all
# does, and its blocks lie side by side. It is for programs alone: they compile 1.4 times as long, for threads wait for
# one another (2 cores, Xeon with AMX).
ALONE = f"{KEPT}:glibc.malloc.arena_max=1"


def begin_anew(tunables: str) -> None:
    """Starts this process again with these settings of glibc's malloc, where it reads them and nobody set others."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": tunables})
