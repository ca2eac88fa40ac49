"""Waiting: for what happens elsewhere, in another thread, another process or Ray, and without letting time pass."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], *, timeout_s: float = 120.0) -> bool:
    """Whether a condition becomes true in time; a long time costs nothing where it does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Clock:
    """Put in the place of a module's ``time``: passes only for those who sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Seconds slept so far."""
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        """Takes no time."""
        self.now += seconds
