"""What a site may be called: its name is that of folders, files and metrics."""

from __future__ import annotations

import re

from gcml_ray.errors import ConfigError

LONGEST_SITE_NAME = 100
_SITE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
# All sites of ``gcml export``, the one of pooled training, and what stands beside the sites of some methods.
RESERVED_SITES = ("all", "pooled", "server")


def check_site_name(name: str) -> str:
    """The name, if it can be a folder and a metric name; those of the server and of pooled training can.

    Raises:
        ConfigError: see :func:`_folder_problem`.
    """
    if problem := _folder_problem(name):
        raise ConfigError(f"{problem}; rename the site in the datalist")
    return name


def site_name_problem(name: str) -> str | None:
    """Why no site of a datalist can have this name, or None: it is reserved, or see :func:`_folder_problem`."""
    if name in RESERVED_SITES:
        return f"site name {name!r} is reserved (as are {', '.join(RESERVED_SITES)})"
    return _folder_problem(name)


def _folder_problem(name: str) -> str | None:
    """Why no folder can have this name, or None.

    It holds other characters than letters, digits, ``_``, ``-`` and ``.``, starts with a dot, or is longer than files'
    names may be with what is added to it.
    """
    if len(name) > LONGEST_SITE_NAME:
        return f"site name {name[:20]}... has {len(name)} characters and cannot name files: {LONGEST_SITE_NAME} at most"
    if not _SITE_NAME.fullmatch(name):
        return (
            f"site name {name!r} cannot name a folder: use letters A-Z a-z, digits, '_', '-' and '.', "
            "no dot at the start"
        )
    return None
