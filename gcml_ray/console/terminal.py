"""The terminal that all commands write to."""

from __future__ import annotations

from rich.console import Console


def terminal(*, is_error: bool = False, width: int | None = None) -> Console:
    """Standard output, or the error stream, which shows names and paths as they are.

    In ``[lambda 0.3]`` and ``:x:`` Rich would see a style and an emoji.

    Args:
        is_error: write to the error stream.
        width: columns, where the terminal's own are not to be asked for.
    """
    return Console(stderr=is_error, soft_wrap=True, width=width, markup=False, emoji=False, highlight=False)
