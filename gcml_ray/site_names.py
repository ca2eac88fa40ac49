"""What a site may be called: its name is that of folders, files and metrics."""

from __future__ import annotations

import re

from gcml_ray.errors import ConfigError

LONGEST_SITE_NAME = 100
_SITE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def check_site_name(name: str) -> str:
    """The name, if it can be a folder and a metric name.

    Raises:
        ConfigError: it holds other characters than letters, digits, ``_``, ``-`` and ``.``, starts with a dot, or is
            longer than files' names may be with what is added to it.
    """
    if len(name) > LONGEST_SITE_NAME:
        raise ConfigError(
            f"site name {name[:20]}... has {len(name)} characters and cannot name files: {LONGEST_SITE_NAME} at most; "
            "rename the site in the datalist"
        )
    if not _SITE_NAME.fullmatch(name):
        raise ConfigError(
            f"site name {name!r} cannot name a folder: use letters A-Z a-z, digits, '_', '-' and '.', "
            "no dot at the start; rename the site in the datalist"
        )
    return name
