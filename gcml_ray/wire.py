"""A model on the wire: one flat float32 buffer and a small header that says what it is.

The sender builds a :class:`PushHeader` beside its buffer; the receiver calls :func:`refusal` before the
buffer may touch anything. Nothing here needs torch, so the check runs while the site trains.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Buffer = npt.NDArray[np.float32]

BLOCK_WORDS = 8192  # 64 KiB of 8-byte words: small enough to stay in cache, large enough to be fast
WIRE_DTYPE = "float32"


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
    channel order, spacing), ``num_train`` the sender's training cases (for size-weighted merging).
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


@dataclass(frozen=True)
class Expectation:
    """What a receiver accepts from one sender; ``oldest_round`` is the earliest round that is still fresh."""

    run_id: str
    senders: frozenset[str]
    fingerprint: str
    contract: str
    layout: tuple[TensorSpec, ...]
    num_values: int
    oldest_round: int
    newest_round: int


def checksum(buffer: Buffer) -> str:
    """A fast digest of a flat buffer: BLAKE2b over the wrapping 64-bit sums of its 64 KiB blocks.

    It finds every single changed word and every swapped block at memory speed. It guards against
    accidents, not against forgery: that takes a signature.
    """
    raw = np.ascontiguousarray(buffer).view(np.uint8)
    whole = raw.size // (8 * BLOCK_WORDS) * (8 * BLOCK_WORDS)
    sums = raw[:whole].view(np.uint64).reshape(-1, BLOCK_WORDS).sum(axis=1, dtype=np.uint64)
    digest = hashlib.blake2b(sums.tobytes(), digest_size=16)
    digest.update(raw[whole:].tobytes())
    digest.update(str(raw.size).encode())
    return digest.hexdigest()


def all_finite(buffer: Buffer) -> bool:
    """Whether a buffer holds neither NaN nor infinity.

    The plain sum is not finite if any value is not; only then (or where finite values overflow the sum)
    the slower exact check runs.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = buffer.sum()
    return bool(np.isfinite(total)) or bool(np.isfinite(buffer).all())


def refusal(header: PushHeader, buffer: Any, expected: Expectation) -> str:
    """Why a push must not be taken; empty where it may.

    Args:
        header: the sender's header.
        buffer: what arrived beside it; anything but a 1-D float32 array is refused.
        expected: the receiver's side of the contract.
    """
    reason = _header_refusal(header, expected)
    if reason:
        return reason
    if not isinstance(buffer, np.ndarray) or buffer.ndim != 1 or buffer.dtype != np.float32:
        shape = getattr(buffer, "shape", None)
        return (
            f"dtype: expected a flat {WIRE_DTYPE} array, got {getattr(buffer, 'dtype', type(buffer).__name__)} {shape}"
        )
    if buffer.size != expected.num_values:
        return f"size: expected {expected.num_values} values, got {buffer.size}"
    if checksum(buffer) != header.checksum:
        return "checksum: the buffer is not the one the sender described"
    if not all_finite(buffer):
        return "not finite: the weights hold NaN or infinity"
    return ""


def _header_refusal(header: PushHeader, expected: Expectation) -> str:
    """The part of the check that needs no buffer, cheapest first."""
    if not all(isinstance(number, int) for number in (header.round_number, header.num_train, header.num_values)):
        return "header: round_number, num_train and num_values must be integers"
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
        (header.num_values == expected.num_values, f"size: {header.num_values} values, not {expected.num_values}"),
        (header.layout == expected.layout, "layout: names, shapes or order of the tensors differ"),
    )
    return next((reason for passed, reason in checks if not passed), "")
