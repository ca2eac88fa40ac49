"""One process at a time drives a run or a search: two that append to one folder's records destroy them."""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from gcml_ray.errors import ConfigError

LOCK_FILE = ".lock"


@contextmanager
def held(folder: Path, *, key: str = "output.folder") -> Iterator[Callable[[], bool]]:
    """Within the block no other process, on this machine or one that shares the disk, can hold the same folder.

    The system frees it when the process ends, however it ends. Where the file system knows no locks there is none.

    Yields:
        Whether the folder of that name is still the one that is held: another process may begin in a new one where
        this one was removed or moved.

    Args:
        folder: of the run or search; made where it does not exist.
        key: of the configuration that names it, for messages.

    Raises:
        ConfigError: another one holds it, or the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise not_writable(folder, error, key=key) from error
    except ValueError as error:  # a NUL character
        raise ConfigError(f"{key}: {str(folder)!r} cannot be the name of a folder ({error})") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise ConfigError(
                f"{key}: {folder} is in use by another process ({stream.read().strip() or 'unknown'}). "
                f"Wait for its end or stop it, or set another {key}"
            ) from error
        except OSError:
            pass
        holder = f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})\n"
        stream.truncate(0)
        stream.write(holder)
        stream.flush()
        yield lambda: _holder(folder / LOCK_FILE) in (holder, None)


def _holder(path: Path) -> str | None:
    """Who has written a lock file last; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def check_writable(folder: Path, *, key: str) -> None:
    """Makes a folder, before anything is worked for in vain that is to lie in it.

    Raises:
        ConfigError: it cannot be made or written; ``key`` says who names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise not_writable(folder, error, key=key) from error


def not_writable(folder: Path, error: OSError, *, key: str = "output.folder") -> ConfigError:
    """What a user reads where the folder of a run or search cannot be made or written."""
    return ConfigError(
        f"{key}: {folder} cannot be made or written ({error.strerror}). Give a folder on a disk where you may write"
    )
