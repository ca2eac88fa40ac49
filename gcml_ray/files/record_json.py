"""Records as JSON and back: tuples, nested records, NaN and infinity survive.

JSON has no infinity; it is written as the text ``"Infinity"`` or ``"-Infinity"`` and comes back as a number where the
record's type is a number. NaN is written as ``null``, and ``null`` comes back as NaN where the record's type is
``float``. Where it is ``float | None`` it comes back as None: there NaN is lost. Files of older versions have ``null``
for infinity too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from functools import cache
from typing import Any, TypeVar

from gcml_ray.records import to_plain

Record = TypeVar("Record")
_INFINITIES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_NUMBERS = {text: number for number, text in _INFINITIES.items()}


def to_json(record: Any) -> str:
    """A record as one line of strict JSON."""
    return json.dumps(_finite(to_plain(record)), allow_nan=False)


def from_json(kind: type[Record], text: str) -> Record:
    """The record of type ``kind`` that :func:`to_json` wrote.

    Raises:
        ValueError: the text is not JSON, or its keys or types are not those of ``kind``.
    """
    try:
        return typing.cast(Record, _build(kind, json.loads(text, parse_constant=_refuse_constant)))
    except (TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(plain: Any) -> Any:
    """The same with ``None`` in the place of NaN, and text in that of infinity."""
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_finite(value) for value in plain]
    if not isinstance(plain, float) or math.isfinite(plain):
        return plain
    return _INFINITIES.get(plain)


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: Any, plain: Any) -> Any:
    """``plain`` as a value of the type ``kind``: a record, tuple, dict, number or text.

    Raises:
        TypeError, KeyError, OverflowError: it is not one.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is None:
        return _build_plain(kind, plain)
    if origin is tuple:
        return tuple(_build(arguments[0], value) for value in _checked(list, plain))
    if origin is dict:
        return {key: _build(arguments[1], value) for key, value in _checked(dict, plain).items()}
    if origin in (types.UnionType, typing.Union):
        return None if plain is None else _build(arguments[0], plain)
    assert origin is typing.Literal
    if plain not in arguments:
        raise TypeError(f"expected one of {', '.join(map(repr, arguments))}, got {repr(plain)[:60]}")
    return plain


def _build_plain(kind: Any, plain: Any) -> Any:
    """A record, or a value of a type without parameters."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = _field_types(kind)
        return kind(**{name: _build(hints[name], value) for name, value in _checked(dict, plain).items()})
    if kind is float:
        if isinstance(plain, str) and plain in _NUMBERS:
            return _NUMBERS[plain]
        return math.nan if plain is None else float(_checked((int, float), plain))
    return plain if kind is Any else _checked(kind, plain)


def _checked(kind: type | tuple[type, ...], plain: Any) -> Any:
    """``plain``, if it is of this type of JSON exactly: True is no number."""
    if type(plain) not in (kind if isinstance(kind, tuple) else (kind,)):
        name = kind.__name__ if isinstance(kind, type) else "number"
        raise TypeError(f"expected a {name}, got {repr(plain)[:60]}")
    return plain
