"""Handlers of signals that a test sets for itself alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(number: int, action: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """What a signal does for the length of a block, whatever a script that started the tests had it do."""
    before = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, before)
