"""How many CPU cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use


def num_usable_cpus() -> int:
    """CPUs that this process may run on, a container's quota counted in whole CPUs."""
    affinity = getattr(os, "sched_getaffinity", None)
    num_cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = read_limit("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        num_cpus = min(num_cpus, max(1, int(quota[0]) // int(quota[1])))
    return num_cpus


def read_limit(name: str) -> str:
    """A container's limit as Linux words it; empty where there is none, as outside Linux."""
    try:
        return (CGROUP / name).read_text(encoding="utf-8")
    except OSError:
        return ""
