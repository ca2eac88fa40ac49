"""How far a command has come that works case by case: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0


def bar_of_cases(console: Console) -> Progress:
    """A bar that moves while one case takes long, and is gone when it ends; nothing where there is no terminal."""
    columns: tuple[ProgressColumn, ...] = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def counted(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many of all cases are done; yields what takes (done, total).

    Args:
        console: where a terminal has a bar; elsewhere a line is written at most every ``LINE_EVERY_S``.
        what: is done with them.
    """
    told_at = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told_at
        bar.update(task, completed=done, total=total)
        if not console.is_terminal and time.monotonic() - told_at >= LINE_EVERY_S:
            told_at = time.monotonic()
            console.print(f"{what}: {done} of {total}")

    with bar_of_cases(console) as bar:
        task = bar.add_task(what, total=None)
        yield tell
