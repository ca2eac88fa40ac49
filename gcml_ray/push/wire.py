"""A model on the wire: one flat buffer and a small header that says what it is.

The trainer builds a :class:`PushHeader` beside its flat float32 vector; ``outbox.py`` may encode and sign it. The
receiver checks all of it before it may touch anything (``inbox.py``).
Nothing here needs torch, so the check runs while the site trains.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Buffer = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Payload = npt.NDArray[Any]  # what travels: a Buffer as it is, or the bytes of an encoded one

BLOCK_BYTES = 2**16  # of the checksum
PIECE_BYTES = 2**20  # whole blocks; small enough to stay in cache between two looks at it
ROW_VALUES = 8192  # so few that BLAS starts no threads for them
WIRE_DTYPE = "float32"
PLAIN = frozenset({WIRE_DTYPE})
UNREACHABLE = "unreachable:"  # how the reason of a push begins that its receiver did not acknowledge
MAX_NUMBER, MAX_TEXT = 2**63, 1000  # of a header's fields: they go into messages and logs


@dataclass(frozen=True)
class TensorSpec:
    """One tensor inside the flat buffer; ``offset`` counts values, not bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class PushHeader:
    """What travels beside the buffer.

    ``fingerprint`` identifies the architecture, ``contract`` the meaning of inputs and outputs (label map,
    channel order, spacing), ``num_train`` the sender's training cases (for size-weighted merging), ``exported_at`` the
    sender's clock in seconds since 1970. ``dtype`` is that of the decoded vector; the first ``num_values - num_exact``
    values travel in ``encoding``, the rest (statistics such as variances, which rounding could spoil) as they are.
    ``checksum`` is that of the bytes that travel, ``base`` that of the vector which a difference starts from.

    Of signed pushes: ``receivers``, to whom it goes; ``digest``, a cryptographic hash of the bytes that travel; and
    the sender's ``signature`` over all other fields.
    """

    run_id: str
    round_number: int
    sender: str
    num_train: int
    fingerprint: str
    contract: str
    layout: tuple[TensorSpec, ...]
    num_values: int
    dtype: str
    checksum: str
    exported_at: float = 0.0
    encoding: str = WIRE_DTYPE
    num_exact: int = 0
    base: str = ""
    receivers: tuple[str, ...] = ()
    digest: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Expectation:
    """What a receiver accepts from one sender.

    ``oldest_round`` is the earliest round that is still fresh; ``num_train`` the training cases that the sender is
    registered with, None where it has not told any.
    """

    run_id: str
    senders: frozenset[str]
    fingerprint: str
    contract: str
    layout: tuple[TensorSpec, ...]
    num_values: int
    oldest_round: int
    newest_round: int
    num_exact: int = 0
    num_train: int | None = None


def checksum(buffer: Payload) -> str:
    """A fast digest of a flat buffer: BLAKE2b over the wrapping 64-bit sums of its 64 KiB blocks.

    It finds every single changed word and every swapped block at memory speed. It guards against
    accidents, not against forgery: that takes a signature.
    """
    raw = np.ascontiguousarray(buffer).view(np.uint8)
    return _digest_of([_block_sums(piece) for piece in _pieces(raw)], raw)


def scan(payload: Payload) -> tuple[str, bool | None]:
    """Checksum and finiteness in one pass, as memory is the bottleneck: each piece is read once and stays in cache.

    Returns:
        :func:`checksum` of the payload; and :func:`all_finite` of it, None where its bytes are no float32 values.
    """
    payload = np.ascontiguousarray(payload)
    if payload.dtype != np.float32:
        return checksum(payload), None
    raw = payload.view(np.uint8)
    sums, is_finite = [], True
    for piece in _pieces(raw):
        sums.append(_block_sums(piece))
        is_finite = is_finite and _is_finite(piece.view(np.float32))
    return _digest_of(sums, raw), is_finite


def all_finite(buffer: Buffer) -> bool:
    """Whether a buffer holds neither NaN nor infinity."""
    raw = np.ascontiguousarray(buffer).view(np.uint8)
    return all(_is_finite(piece.view(np.float32)) for piece in _pieces(raw))


def _pieces(raw: Bytes) -> Iterator[Bytes]:
    return (raw[start : start + PIECE_BYTES] for start in range(0, raw.size, PIECE_BYTES))


def _whole_blocks(raw: Bytes) -> int:
    """How many bytes of it are whole blocks."""
    return raw.size // BLOCK_BYTES * BLOCK_BYTES


def _block_sums(raw: Bytes) -> npt.NDArray[np.uint64]:
    words = raw[: _whole_blocks(raw)].view(np.uint64)
    sums: npt.NDArray[np.uint64] = words.reshape(-1, BLOCK_BYTES // 8).sum(axis=1, dtype=np.uint64)
    return sums


def _digest_of(sums: list[npt.NDArray[np.uint64]], raw: Bytes) -> str:
    digest = hashlib.blake2b(b"".join(part.tobytes() for part in sums), digest_size=16)
    digest.update(raw[_whole_blocks(raw) :].tobytes())
    digest.update(str(raw.size).encode())
    return digest.hexdigest()


def _is_finite(values: Buffer) -> bool:
    """A sum of squares is not finite if any value is not; only then, or where squares overflow, each value is asked."""
    whole = values.size // ROW_VALUES * ROW_VALUES
    rows, rest = values[:whole].reshape(-1, ROW_VALUES), values[whole:]
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.vecdot(rows, rows).sum() + np.vecdot(rest, rest)
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())


def malformed(header: Any) -> str:  # noqa: PLR0911 - a list of reasons
    """Why something cannot be read as a header; after this every field has its type, whatever it says."""
    if not isinstance(header, PushHeader):
        return f"header: expected a PushHeader, got {type(header).__name__}"
    for field in fields(PushHeader):
        value = getattr(header, field.name, None)
        allowed = _FIELD_TYPES[field.name]
        if type(value) is not allowed:  # exactly: True is no round number, a subclass may do anything
            return f"header: {field.name} must be {_WORDS[allowed]}, got {type(value).__name__}"
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            return f"header: {field.name} is beyond {MAX_NUMBER}"
        if isinstance(value, str) and not (len(value) <= MAX_TEXT and value.isprintable()):
            return f"header: {field.name} must be at most {MAX_TEXT} printable characters"
    if not all(map(_is_spec, header.layout)):
        return "header: layout must hold a TensorSpec for each tensor"
    if not all(type(name) is str and len(name) <= MAX_TEXT for name in header.receivers):
        return "header: receivers must be names"
    return "" if math.isfinite(header.exported_at) else "header: exported_at must be finite"


def _is_spec(spec: Any) -> bool:
    return (
        type(spec) is TensorSpec
        and type(spec.name) is type(spec.dtype) is str
        and type(spec.offset) is int
        and type(spec.shape) is tuple
        and all(type(side) is int for side in spec.shape)
    )


_FIELD_TYPES: dict[str, type] = {
    field.name: {"int": int, "str": str, "float": float}.get(str(field.type), tuple) for field in fields(PushHeader)
}
_WORDS: dict[type, str] = {int: "a whole number", str: "a text", float: "a number", tuple: "a tuple"}


def payload_refusal(payload: Any, *, dtype: npt.DTypeLike, size: int | None) -> str:
    """Why something cannot be read as a payload.

    Args:
        payload: what arrived beside a header that fits.
        dtype: what its encoding travels as.
        size: how many values of it; None where that is not known beforehand.
    """
    wanted = np.dtype(dtype)
    if not isinstance(payload, np.ndarray) or payload.ndim != 1 or payload.dtype != wanted:
        kind, shape = getattr(payload, "dtype", type(payload).__name__), getattr(payload, "shape", None)
        return f"dtype: expected a flat {wanted} array, got {kind} {shape}"
    if size is not None and payload.size != size:
        return f"size: expected {size} values, got {payload.size}"
    return ""


def header_refusal(header: Any, expected: Expectation, *, encodings: frozenset[str] = PLAIN) -> str:
    """The part of the check that needs no buffer, cheapest first."""
    if problem := malformed(header):
        return problem
    checks = (
        (header.run_id == expected.run_id, f"run: {header.run_id} is not this run ({expected.run_id})"),
        (header.sender in expected.senders, f"sender: {header.sender} is not a site of this run"),
        (
            header.round_number >= expected.oldest_round,
            f"stale: round {header.round_number}, the oldest accepted is {expected.oldest_round}",
        ),
        (
            header.round_number <= expected.newest_round,
            f"round: {header.round_number} lies ahead of this site, at most {expected.newest_round} is accepted",
        ),
        (
            header.contract == expected.contract,
            f"data contract: {header.contract} is not {expected.contract} (labels, channels or spacing differ)",
        ),
        (
            header.fingerprint == expected.fingerprint,
            f"architecture: {header.fingerprint} is not {expected.fingerprint} (another network or other options)",
        ),
        (header.dtype == WIRE_DTYPE, f"dtype: {header.dtype} is not {WIRE_DTYPE}"),
        (header.encoding in encodings, f"encoding: {header.encoding} is not {' or '.join(sorted(encodings))}"),
        (header.num_values == expected.num_values, f"size: {header.num_values} values, not {expected.num_values}"),
        (header.num_exact == expected.num_exact, f"size: {header.num_exact} exact values, not {expected.num_exact}"),
        (header.num_train >= 0, f"header: num_train is {header.num_train}, cases cannot be fewer than 0"),
        (
            expected.num_train in (None, header.num_train),
            f"num_train: {header.num_train}, but {header.sender} has registered {expected.num_train} training cases",
        ),
        (header.layout == expected.layout, "layout: names, shapes or order of the tensors differ"),
    )
    return next((reason for passed, reason in checks if not passed), "")
