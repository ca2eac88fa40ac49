"""Quantities and paths as people read and paste them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

NO_PROCESS = (  # of a site that a cluster has been asked for
    "no process yet; other jobs hold the CPUs or GPUs that are asked for (see `ray status`), or a machine is slow to "
    "start one"
)

_ADDRESS = re.compile(r"(?<!sqlite)(?<!file)://\S+")  # a path may hold @ and ? as well
_SECRETS = (
    (re.compile(r"(?<=://)\S+(?=@)"), "***"),  # user and password in an address; a password may hold @, / and quotes
    (re.compile(r"(?<=[?&])([^\s=&]+=)[^\s&]+"), r"\1***"),  # what stands behind the ? of an address: tokens, keys
)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def in_shell(path: str | Path) -> str:
    """A path as it can be pasted into a shell."""
    return shlex.quote(str(path))


def without_secrets(text: str) -> str:
    """A text with user, password and the values of a query taken out of the addresses in it."""

    def hide(found: re.Match[str]) -> str:
        address = found[0]
        for pattern, replacement in _SECRETS:
            address = pattern.sub(replacement, address)
        return address

    return _ADDRESS.sub(hide, text)


def some(names: Sequence[str], at_most: int, *, between: str = ", ") -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return between.join(names[:at_most]) + more


def number(value: float, digits: int = 3) -> str:
    """A number for a table; a dash where it is undefined."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def probability(value: float) -> str:
    """A p of a test; never 0."""
    return "<0.001" if value < 0.001 else number(value)


def count(num: int, thing: str, things: str = "") -> str:
    """``1 site``, ``2 sites``; ``things`` where that is not ``thing`` with an s."""
    return f"{num} {thing if num == 1 else things or thing + 's'}"
