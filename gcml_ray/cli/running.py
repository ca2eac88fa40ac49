"""What the commands that run federations share: the width of their tables, and what Ctrl-C does."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from gcml_ray.console.comparison import CellsConsole
from gcml_ray.console.run import RunConsole
from gcml_ray.console.terminal import terminal
from gcml_ray.signals import ENDINGS, endings_handled_by

STOPPED = 130  # what a shell reports for a program ended by Ctrl-C
WIDTH = 120  # columns of tables in a file or a pipe


def wide_console() -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    return terminal(width=None if sys.stdout.isatty() else WIDTH)


@contextmanager
def watched(console: Console, title: str) -> Iterator[tuple[RunConsole, threading.Event]]:
    """What shows one run on a console, and the event that Ctrl-C sets."""
    with (
        RunConsole(console, title=title) as listener,
        _warnings_shown("gcml_ray.tracking", lambda words: listener.print_line(f"  ! {words}")),
        stop_on_signal(listener) as stop,
    ):
        yield listener, stop


class _Shown(logging.Handler):
    """Hands on what is said."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one message."""
        self._show(record.getMessage())


@contextmanager
def _warnings_shown(name: str, show: Callable[[str], None]) -> Iterator[None]:
    """Shows a logger's warnings, which otherwise only the log of the run would have while it lasts."""
    logger, handler = logging.getLogger(name), _Shown(show)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def stop_on_signal(listener: RunConsole | CellsConsole) -> Iterator[threading.Event]:
    """Ctrl-C once ends after the round in flight, twice ends now; so does a termination, or a terminal that closes.

    Who has asked for such a signal to be ignored (``nohup``) is left alone.
    """
    stop = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        del frame
        if stop.is_set() or number in ENDINGS:
            raise KeyboardInterrupt
        stop.set()
        listener.say(
            "stopping as soon as the round in progress, or the final test, is over; press Ctrl-C again to stop now"
        )

    with endings_handled_by(interrupt):
        yield stop
