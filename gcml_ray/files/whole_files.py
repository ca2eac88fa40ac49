"""Files that are there whole or not at all: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced(path: Path, *, draft: Path | None = None) -> Iterator[Path]:
    """Context that yields a draft path and renames it to ``path`` on success; after an error the draft is deleted.

    A reader, or whoever looks after a crash, finds either the old file or the new one.

    Args:
        path: the file; its folder is made where it does not exist.
        draft: the other name, in the same folder, for writers that need an ending; by default ``path`` with ``.tmp``.
    """
    draft = draft or path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it was
        raise


def replace_file(path: Path, text: str) -> None:
    """Writes a text file as a whole."""
    with replaced(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="")


def clear_drafts(folder: Path, *, older_than_s: float = 0.0) -> None:
    """Deletes what writes that broke off with their process have left: ours (``*.tmp``), safetensors' own (``.tmp*``).

    Args:
        folder: where they lie; it need not exist.
        older_than_s: in a folder where others may be writing, leaves what may be theirs.
    """
    for draft in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):
        if older_than_s == 0 or time.time() - draft.stat().st_mtime > older_than_s:
            draft.unlink(missing_ok=True)
