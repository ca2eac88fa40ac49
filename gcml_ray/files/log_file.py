"""The log of a run or a search: what some loggers say, copied into a file of its folder."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_CHANGES = threading.Lock()  # runs beside each other share their loggers
_BEFORE: dict[str, tuple[int, bool]] = {}  # level and propagation of the loggers that write to a file now


class _LogFile(logging.FileHandler):
    """A log file that ignores write errors: on a full disk the run's own files report it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Ignores errors of the disk, reports all others."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Closes the file, also on a full disk."""
        with suppress(OSError):
            super().close()


@contextmanager
def logged_to(
    path: Path,
    names: Sequence[str],
    *,
    is_wanted: Callable[[logging.LogRecord], bool] = lambda record: True,  # noqa: ARG005 - every record
    only_there: bool = False,
) -> Iterator[None]:
    """Appends to a file what the loggers say from INFO upwards; afterwards they are as they were before.

    Several such blocks may overlap, also in threads: the loggers' levels come back with the end of the last one.

    Args:
        path: the file.
        names: of the loggers.
        is_wanted: which of their records to write.
        only_there: keep their records from the loggers above them, and so off the console.
    """
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.addFilter(is_wanted)
    handler.setFormatter(logging.Formatter(FORMAT))
    loggers = [logging.getLogger(name) for name in names]
    with _CHANGES:
        for logger in loggers:
            if not _has_file(logger):
                _BEFORE[logger.name] = (logger.level, logger.propagate)
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = logger.propagate and not only_there
    try:
        yield
    finally:
        with _CHANGES:
            for logger in loggers:
                logger.removeHandler(handler)
                if not _has_file(logger):
                    level, logger.propagate = _BEFORE.pop(logger.name)
                    logger.setLevel(level)
        handler.close()


def _has_file(logger: logging.Logger) -> bool:
    return any(isinstance(handler, _LogFile) for handler in logger.handlers)
