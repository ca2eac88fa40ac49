"""Signals that ask a long job to end: Ctrl-C, a termination, a terminal that closes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def endings_handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """For a block of the main thread, Ctrl-C and the endings call ``handler(number, frame)``.

    Who has asked for an ending to be ignored (``nohup``) is left alone.
    """
    heard = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, *heard)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
