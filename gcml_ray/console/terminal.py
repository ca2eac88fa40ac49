"""The terminal that all commands write to."""

from __future__ import annotations

import logging
from contextlib import suppress

from rich.console import Console

log = logging.getLogger(__name__)


def terminal(*, is_error: bool = False, width: int | None = None) -> Console:
    """Standard output, or the error stream, which shows names and paths as they are.

    In ``[lambda 0.3]`` and ``:x:`` Rich would see a style and an emoji.

    Args:
        is_error: write to the error stream.
        width: columns, where the terminal's own are not to be asked for.
    """
    return Console(stderr=is_error, soft_wrap=True, width=width, markup=False, emoji=False, highlight=False)


def print_while_read(console: Console, line: str) -> None:
    """Prints a line of a long job, which goes on where nobody can read it any more.

    That is a pipe without a reader, a terminal that is gone, a full disk. From then on the console prints nothing.
    """
    try:
        console.print(line)
    except (SystemExit, OSError) as error:  # Rich exits where a pipe is broken
        with suppress(SystemExit, OSError):
            console.on_broken_pipe()
        reason = error if isinstance(error, OSError) else "broken pipe"
        log.warning("nobody reads the output any more (%s): the work goes on, see its log", reason)
