"""What a thread that trains on a CPU asks of the C library and of Linux. It never changes what is computed.

A training step frees and asks for the same activations again and again, and lives on what lies in its core's cache.

- By default the C library hands large blocks back to the system at once, and each step pays for having them zeroed
  anew: up to a sixth of its time (docs/performance.md has the measurement).
- By default threads that share a core take turns of about 3 ms, and each turn begins with an alien cache: with two
  sites per core 5 to 10 % of a step.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

from gcml_ray.cores import num_usable_cpus

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's numbers in glibc's malloc.h
KEPT_BYTES = 1 << 30  # blocks up to this size, and so much of free memory, stay with the process
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

SLICE_NS = 100_000_000  # the longest turn that Linux grants
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # number of the system call
SCHED_ATTR = "=IIQiIQQQ"  # sched_setattr(2): size, policy, flags, niceness, priority, runtime, deadline, period
KEEP_POLICY = 0x08  # SCHED_FLAG_KEEP_POLICY


def num_threads(cpus_per_site: float) -> int:
    """How many threads a site's operators use: as many as it asked for, but no more than there are cores for it.

    More only get into each other's way; without Ray, which would refuse, nothing else keeps a site from asking.
    """
    return max(1, min(int(cpus_per_site), num_usable_cpus()))


def prepare_thread() -> None:
    """All that helps a thread that trains on a CPU, as far as it can be had here."""
    keep_freed_memory()
    ask_for_long_turns()


def keep_freed_memory() -> bool:
    """Tells glibc to keep up to 1 GiB of freed memory in this process; what is set by environment goes first.

    Returns:
        Whether it was told so: False with another C library, or where the environment has its own settings.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(name, KEPT_BYTES) == 1 for name in (MMAP_THRESHOLD, TRIM_THRESHOLD))


def ask_for_long_turns() -> bool:
    """Asks Linux for turns of 100 ms on a core for the calling thread; its niceness and policy stay.

    A thread that wakes up with little to do, such as one that takes a push, still goes first. Before Linux 6.12 it
    has no effect.

    Returns:
        Whether the system took it: False on another system, or where a sandbox forbids the call.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack(SCHED_ATTR, struct.calcsize(SCHED_ATTR), 0, KEEP_POLICY, niceness, 0, SLICE_NS, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, ctypes.c_char_p(attributes), 0) == 0)
