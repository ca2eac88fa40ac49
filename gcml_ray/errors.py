"""Every error a user of gcml-ray can meet, each naming what happened and what to change."""

from __future__ import annotations

import errno
import re
import sysconfig
from pathlib import Path

_FRAME = re.compile(r'File "(.+?)", line (\d+), in ')  # of a traceback
_LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"), "<frozen")


class GcmlError(Exception):
    """Root of the errors that gcml-ray raises on purpose; the CLI prints them without a traceback."""


class ConfigError(GcmlError):
    """A configuration key is unknown, has the wrong type or range, or contradicts another key."""


class DataError(GcmlError):
    """A datalist, image or label cannot be used; the message names the file or the case."""


class CheckpointError(GcmlError):
    """A checkpoint or run folder cannot be read, or belongs to another configuration."""


class NoModelError(CheckpointError):
    """A site never had the model that is asked for: nothing is lost."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is not what was written: cut short, or with other bytes in it."""


class ExportError(GcmlError):
    """A model cannot be written in the format asked for, or came out of it as another one."""


class ClusterError(GcmlError):
    """Ray cannot be reached, or the cluster cannot hold the federation that was asked for."""


def told(message: str, error_type: str, traceback: str) -> str:
    """An error's message; of one that gcml-ray does not raise on purpose, with its type and the code that raised it.

    Args:
        message: its words.
        error_type: name of its class.
        traceback: as Python prints it; empty where there is none.
    """
    frames = [found for found in _FRAME.findall(traceback) if not any(each in found[0] for each in _LIBRARIES)]
    if not frames or error_type in _names(GcmlError):
        return message
    path, line = frames[-1]
    return f"{message} ({error_type} at {Path(path).name}:{line})"


def _names(kind: type) -> set[str]:
    """A class and all below it."""
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


class SiteError(GcmlError):
    """A site failed at a known round and stage.

    Args:
        site: name of the site.
        round_number: the round it was in; 0 is the start.
        stage: what it was doing, e.g. ``"start"`` or ``"train"``.
        message: the cause, in words.
    """

    def __init__(self, site: str, round_number: int, stage: str, message: str) -> None:
        super().__init__(f"site {site}, round {round_number}, {stage}: {message}")
        self.site = site
        self.round_number = round_number
        self.stage = stage
        self.message = message

    def __reduce__(self) -> tuple[type[SiteError], tuple[str, int, str, str]]:
        return (SiteError, (self.site, self.round_number, self.stage, self.message))


def write_remedy(error: Exception) -> str:
    """What to do where a file could not be written; safetensors tells the system's error in its words alone."""
    in_words = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_words[1]) if in_words else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "let this user write there"
    if number in (errno.ENOTDIR, errno.EEXIST):
        return "move away the file that stands where a folder must be"
    return "make room on this disk"
