"""Where two configurations would give different results, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gcml_ray.config import Config
from gcml_ray.wording import some

MAX_TOLD = 6


def differences(there: Config, here: Config) -> str:
    """Keys that differ, as they stand in a file, each with both values: ``a.b (1 there, 2 here)``.

    Args:
        there: of a run that exists.
        here: what is asked for now.
    """
    left, right = _flat(there.deciding(by_alias=True)), _flat(here.deciding(by_alias=True))
    told = [
        f"{key} ({left.get(key, 'default')!r} there, {right.get(key, 'default')!r} here)"
        for key in {**left, **right}
        if left.get(key) != right.get(key)
    ]
    return some(told, MAX_TOLD)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
