"""What the fuzz tests of the readers share: how many inputs, and ways to spoil bytes and nested values.

Each reader gets ``GCML_FUZZ_INPUTS`` inputs, spread over its tests; 10,000 take minutes::

    GCML_FUZZ_INPUTS=10000 pytest tests/faults -k fuzz

Without it there are a few hundred, the same ones every time; with it new ones every time, and hypothesis prints a
failing one in its smallest form.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gcml_ray.errors import GcmlError

NUM_INPUTS = int(os.environ.get("GCML_FUZZ_INPUTS") or 0)
DEFAULT_INPUTS = 150  # of each reader: seconds


def inputs(share: float) -> settings:
    """Settings of a test that gets this share of its reader's inputs."""
    return settings(
        max_examples=max(1, round(share * (NUM_INPUTS or DEFAULT_INPUTS))),
        derandomize=not NUM_INPUTS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(reader: Callable[[], Any], path: Path, kind: type[GcmlError]) -> Any:
    """What a reader makes of a file, or the error with which it refuses it; whatever else it raises fails the test.

    Args:
        reader: reads it.
        path: the file, which the error has to name.
        kind: the reader's own class of errors.
    """
    try:
        return reader()
    except kind as error:
        message = str(error)
    assert str(path) in message
    assert len(message) < 100_000
    message.encode()  # it goes to a terminal and to a log
    return kind(message)


# --- bytes ---------------------------------------------------------------------------------------


@st.composite
def spoilt_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """A file that was truncated, overwritten, had bits flipped or parts swapped, doubled or replaced."""
    raw = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        if not raw:
            break
        at = draw(st.integers(0, len(raw) - 1))
        match draw(st.sampled_from(["flip", "truncate", "zero", "overwrite", "swap", "double", "cut"])):
            case "flip":
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "truncate":
                del raw[at:]
            case "zero":
                size = draw(st.integers(1, 64))
                raw[at : at + size] = bytes(len(raw[at : at + size]))
            case "overwrite":
                raw[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "swap":
                size, other = draw(st.integers(1, 64)), draw(st.integers(0, len(raw) - 1))
                first, second = sorted((at, other))
                size = min(size, second - first, len(raw) - second)
                one, two = raw[first : first + size], raw[second : second + size]
                raw[first : first + size], raw[second : second + size] = two, one
            case "double":
                raw[at:at] = raw[at : at + draw(st.integers(1, 64))]
            case "cut":
                del raw[at : at + draw(st.integers(1, 64))]
    return bytes(raw)


# --- nested values -------------------------------------------------------------------------------

ODD_TEXT = st.one_of(
    st.sampled_from(
        ["", " ", ".", "..", "../x", "/", "a/b", "a\\b", "~", "$HOME", "${", "${nope}", "\n", "\t", "\x00", "\ud800",
         "é", "A", "B", "null", "x" * 5000, "nan", "1e3", "-", "[", "{{", "%s", ".nii.gz", "gcml", "sgd", "ring"]
    ),
    st.text(max_size=8),
)  # fmt: skip
ODD_NUMBER = st.sampled_from(
    [0, 1, -1, 2, 7, 10**6, 2**31, 2**63, -(2**63) - 1, 10**30, 0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, float("nan"),
     float("inf"), float("-inf")]
)  # fmt: skip
ODD_LEAF = st.one_of(st.none(), st.booleans(), ODD_NUMBER, ODD_TEXT)
ODD_VALUE = st.recursive(
    ODD_LEAF,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXT, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def spoilt_values(draw: st.DrawFn, original: Any) -> Any:
    """Nested dicts and lists with up to four places changed: another value, a lost, doubled or renamed key."""
    values = _copied(original)
    for _ in range(draw(st.integers(1, 4))):
        container = values
        while True:
            keys = list(container) if isinstance(container, dict) else list(range(len(container)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = container[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
                container = inner
                continue
            _spoil_place(draw, container, key)
            break
    return values


def _spoil_place(draw: st.DrawFn, container: Any, key: Any) -> None:
    """Changes what lies under one key of a dict or list."""
    match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap"])):
        case "replace":
            container[key] = draw(ODD_VALUE)
        case "remove":
            del container[key]
        case "rename" if isinstance(container, dict):
            container[draw(ODD_TEXT)] = container.pop(key)
        case "rename":
            container.append(container[key])
        case "wrap":
            container[key] = [container[key]] if draw(st.booleans()) else {"name": container[key]}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
