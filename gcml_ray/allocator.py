"""Memory that a process keeps for its next step instead of giving it back to the system after each.

A training step frees and asks for the same activations again and again. By default the C library hands large blocks
back at once, and each step pays for having them zeroed anew: on a CPU a tenth of its time and more
(docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's numbers in glibc's malloc.h
KEPT_BYTES = 1 << 30  # blocks up to this size, and so much of free memory, stay with the process
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tells glibc to keep up to 1 GiB of freed memory in this process; what is set by environment goes first.

    It decides where memory comes from, never what is computed.

    Returns:
        Whether it was told so: False with another C library, or where the environment has its own settings.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(name, KEPT_BYTES) == 1 for name in (MMAP_THRESHOLD, TRIM_THRESHOLD))
