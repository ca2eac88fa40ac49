"""A table that is drawn anew in its place on a terminal, with lines above it; elsewhere the lines alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gcml_ray.console.terminal import print_while_read

SILENCE_S = 60.0


class LiveTable:
    """What the consoles of a run, a search and a comparison share. A context: the table is there inside it.

    Args:
        console: where to write; a live table only where it is a terminal.
        refresh_per_second: how often the table is drawn.
        get_table: makes the table whenever it is drawn; without it, it is what :meth:`show` was given last.
    """

    def __init__(
        self, console: Console, *, refresh_per_second: float, get_table: Callable[[], Table] | None = None
    ) -> None:
        self.console = console
        self._told_at = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                console=console, get_renderable=get_table, refresh_per_second=refresh_per_second, transient=True
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with suppress(OSError):  # the terminal is gone
                self._live.stop()

    def show(self, make_table: Callable[[], Table]) -> None:
        """A newer table, made only where there is one to be seen."""
        if self._live is not None:
            self._live.update(make_table())

    def print_line(self, line: str) -> None:
        """One line above the table, its text as it is."""
        self._told_at = time.monotonic()
        print_while_read(self.console, line)

    def break_silence(self, describe: Callable[[], str]) -> None:
        """Where there is no table: after a minute without a line, one that says what is being done."""
        if self._live is None and time.monotonic() - self._told_at >= SILENCE_S:
            self.print_line(describe())
