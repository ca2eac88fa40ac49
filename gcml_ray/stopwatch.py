"""What a site's work takes: seconds by stage, and the memory of its process."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the time of a block to ``seconds[stage]``."""
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began


def peak_memory_bytes() -> int:
    """The most host memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def memory_growth() -> Iterator[list[int]]:
    """Yields a list that holds one number after the block: by how many bytes host memory grew at its peak.

    What Python or the C library kept from earlier work is used again without growing, so the first block of a process
    is the exact one.
    """
    _forget_peak()
    grown: list[int] = []
    before = resident_bytes()
    yield grown
    grown.append(_memory()[1] - before)


def resident_bytes() -> int:
    """The host memory that this process holds now; where the system does not tell, the most it has held."""
    return _memory()[0]


def _forget_peak() -> None:
    """Makes Linux count the peak of resident memory anew; where that is refused, the old peak stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _memory() -> tuple[int, int]:
    """Resident memory of this process: now and at its peak, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        peak = peak_memory_bytes()
        return peak, peak
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak
