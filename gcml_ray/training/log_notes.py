"""Warnings of gcml-ray's own log, collected so that a site can pass them on to the driver."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

MAX_NOTES = 10


class _Collector(logging.Handler):
    """Keeps the first warnings' texts and counts the rest."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes
        self.num_left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one record's message."""
        if len(self.notes) < MAX_NOTES:
            self.notes.append(record.getMessage())
        else:
            self.num_left_out += 1


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Gives a list that holds, after the block, what gcml-ray warned of inside it: ten texts, then a count.

    The warnings go to the log too.
    """
    notes: list[str] = []
    collector = _Collector(notes)
    logger = logging.getLogger("gcml_ray")
    logger.addHandler(collector)
    try:
        yield notes
    finally:
        logger.removeHandler(collector)
        if collector.num_left_out:
            notes.append(f"and {collector.num_left_out} more warnings, see the site's log")
