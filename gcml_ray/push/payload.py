"""Fewer bytes for a push: float16, bfloat16, int8 by blocks, and the largest differences to what the receiver has.

Legend: S values of a push, X of them exact at the end, N = S - X encoded, K values of a difference, U8 bytes.

An encoded payload is one vector of bytes: first the exact values (4 X bytes), then the encoded ones. Decoding is the
same arithmetic on both sides, so the sender knows bit for bit what the receiver has; what an encoding loses is added
to the next push (error feedback, Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847). For differences
that comes of itself: they are taken to what has arrived (as in CHOCO-SGD, arXiv 1902.00340).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gcml_ray.config.wire import WireConfig
from gcml_ray.push.wire import WIRE_DTYPE, Buffer, Bytes, Payload, all_finite

BLOCK_VALUES = 4096  # values that share a scale in int8
BFLOAT16_NAN = 0x7FC0
TOPK = "topk"
_INT8_LARGEST = 127
_PREFIX = 2  # words before a difference: K, and whether its places are a bitmap
_LIST, _BITMAP = 0, 1


def wire_dtype(encoding: str) -> npt.DTypeLike:
    """What a payload of this encoding is an array of."""
    return np.float32 if encoding == WIRE_DTYPE else np.uint8


def payload_size(encoding: str, num_values: int, *, num_exact: int) -> int | None:
    """The size of a payload in elements of its :func:`wire_dtype`; None for differences, whose size varies."""
    num_encoded = num_values - num_exact
    num_blocks = -(-num_encoded // BLOCK_VALUES)
    sizes = {
        WIRE_DTYPE: num_values,
        "float16": 4 * num_exact + 2 * num_encoded,
        "bfloat16": 4 * num_exact + 2 * num_encoded,
        "int8": 4 * num_exact + 4 * num_blocks + num_encoded,
    }
    return sizes.get(encoding)


def push_bytes(wire: WireConfig, num_values: int, *, num_exact: int) -> int:
    """Bytes of a push of so many values, the last ``num_exact`` as they are; of ``topk`` one that is not the first."""
    size = payload_size(wire.encoding, num_values, num_exact=num_exact)
    if size is not None:
        return size * np.dtype(wire_dtype(wire.encoding)).itemsize
    assert wire.topk_share is not None
    num_encoded = num_values - num_exact
    num_places = max(1, round(wire.topk_share * num_encoded))
    return 4 * num_exact + 4 * _PREFIX + min(_bitmap_bytes(num_encoded), 4 * num_places) + 2 * num_places


# --- whole vectors -------------------------------------------------------------------------------


def encode(vector: Buffer, encoding: str, *, num_exact: int) -> Payload:
    """A vector (S,) in an encoding; float32 is the vector itself, not a copy.

    Args:
        vector: (S,) finite weights.
        encoding: ``float32``, ``float16``, ``bfloat16`` or ``int8``.
        num_exact: X, how many values at the end are not encoded.

    Raises:
        OverflowError: a value is too large for the encoding.
    """
    if encoding == WIRE_DTYPE:
        return vector
    head, exact = _parts(vector, num_exact)
    with np.errstate(over="ignore", invalid="ignore"):
        encoded = {"float16": _to_float16, "bfloat16": _to_bfloat16, "int8": _to_int8}[encoding](head)
        payload = np.concatenate([exact.view(np.uint8), encoded])
        if not all_finite(decode(payload, encoding, num_values=vector.size, num_exact=num_exact)):
            largest = float(np.abs(head).max(initial=0))
            raise OverflowError(
                f"the largest weight is {largest:g}, which {encoding} cannot hold: set wire.encoding to another one"
            )
    return payload


def decode(payload: Payload, encoding: str, *, num_values: int, num_exact: int) -> Buffer:
    """The vector (S,) of a payload of the right size; float32 is the payload itself, not a copy."""
    if encoding == WIRE_DTYPE:
        return payload
    vector = np.empty(num_values, dtype=np.float32)
    head, exact = _parts(vector, num_exact)
    exact.view(np.uint8)[:] = payload[: 4 * num_exact]
    encoded: Bytes = payload[4 * num_exact :]
    if encoding == "float16":
        head[:] = encoded.view(np.float16)
    elif encoding == "bfloat16":
        np.left_shift(encoded.view(np.uint16), 16, out=head.view(np.uint32), dtype=np.uint32)
    else:
        _from_int8(encoded, head)
    return vector


def _parts(vector: Buffer, num_exact: int) -> tuple[Buffer, Buffer]:
    """The values to encode (N,), and those that stay as they are (X,)."""
    return vector[: vector.size - num_exact], vector[vector.size - num_exact :]


def _to_float16(head: Buffer) -> Bytes:
    return head.astype(np.float16).view(np.uint8)


def _to_bfloat16(head: Buffer) -> Bytes:
    """The upper half of each float32, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = head.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(head)] = BFLOAT16_NAN  # of some, rounding makes a zero
    return rounded.view(np.uint8)


def _to_int8(head: Buffer) -> Bytes:
    """A scale (float32) for each block of 4096 values, its largest magnitude / 127; then one byte a value."""
    starts = np.arange(0, head.size, BLOCK_VALUES)
    largest = np.maximum.reduceat(np.abs(head), starts) if head.size else np.empty(0, np.float32)
    scales = (largest / np.float32(_INT8_LARGEST)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint(head / _by_value(safe, head.size))
    codes = np.clip(codes, -_INT8_LARGEST, _INT8_LARGEST).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), codes.view(np.uint8)])


def _from_int8(encoded: Bytes, head: Buffer) -> None:
    num_blocks = -(-head.size // BLOCK_VALUES)
    scales, codes = encoded[: 4 * num_blocks].view(np.float32), encoded[4 * num_blocks :].view(np.int8)
    np.multiply(codes, _by_value(scales, head.size), out=head)


def _by_value(scales: Buffer, num_values: int) -> Buffer:
    """The scale of each value's block, (N,)."""
    return np.repeat(scales, BLOCK_VALUES)[:num_values]


# --- differences -----------------------------------------------------------------------------------


def encode_difference(vector: Buffer, base: Buffer, *, share: float, num_exact: int) -> Bytes:
    """The largest differences between a vector (S,) and what the receiver has of it, in float16.

    Args:
        vector: (S,) finite weights.
        base: (S,) what the receiver has.
        share: of the N values, how many are sent: K = share x N, rounded, at least one.
        num_exact: X, how many values at the end are sent as they are.

    Raises:
        OverflowError: a difference is too large for float16.
    """
    head, exact = _parts(vector, num_exact)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = head - _parts(base, num_exact)[0]
        places = _largest(np.abs(difference), max(1, round(share * head.size)))
        values = difference[places].astype(np.float16)
        if not np.isfinite(values).all():
            raise OverflowError("a weight has changed by more than float16 can hold")
    bitmap_is_smaller = _bitmap_bytes(head.size) < 4 * places.size
    parts = [
        exact.view(np.uint8),
        np.array([places.size, _BITMAP if bitmap_is_smaller else _LIST], dtype=np.uint32).view(np.uint8),
        _to_bitmap(places, head.size) if bitmap_is_smaller else places.astype(np.uint32).view(np.uint8),
        values.view(np.uint8),
    ]
    return np.concatenate(parts)


def decode_difference(payload: Bytes, base: Buffer, *, num_exact: int) -> Buffer:
    """The vector (S,) that a difference leads to from ``base`` (S,), which stays as it is.

    Raises:
        ValueError: the payload is no such difference; the message can follow "topk: ".
    """
    vector = base.copy()
    head, exact = _parts(vector, num_exact)
    prefix_end = 4 * num_exact + 4 * _PREFIX
    if payload.size < prefix_end:
        raise ValueError(f"{payload.size} bytes are too few")
    exact.view(np.uint8)[:] = payload[: 4 * num_exact]
    num_places, form = (int(word) for word in payload[4 * num_exact : prefix_end].view(np.uint32))
    if num_places > head.size or form not in (_LIST, _BITMAP):
        raise ValueError(f"{num_places} places of {head.size} values in form {form}")
    places_end = prefix_end + (_bitmap_bytes(head.size) if form == _BITMAP else 4 * num_places)
    if payload.size != places_end + 2 * num_places:
        raise ValueError(f"{payload.size} bytes instead of {places_end + 2 * num_places}")
    places = _read_places(payload[prefix_end:places_end], form, num_places=num_places, num_values=head.size)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused with the whole vector
        head[places] += payload[places_end:].view(np.float16).astype(np.float32)
    return vector


def _largest(magnitudes: Buffer, count: int) -> npt.NDArray[np.int64]:
    """Places of the ``count`` largest values in rising order; of equals at the limit the first."""
    if not 0 < count < magnitudes.size:
        return np.arange(min(count, magnitudes.size))
    limit = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    above, equal = np.flatnonzero(magnitudes > limit), np.flatnonzero(magnitudes == limit)
    return np.sort(np.concatenate([above, equal[: count - above.size]]))


def _bitmap_bytes(num_values: int) -> int:
    """A bit a value, filled up to whole words so that what follows is aligned."""
    return 4 * -(-num_values // 32)


def _to_bitmap(places: npt.NDArray[np.int64], num_values: int) -> Bytes:
    bits = np.zeros(8 * _bitmap_bytes(num_values), dtype=np.uint8)
    bits[places] = 1
    return np.packbits(bits)


def _read_places(payload: Bytes, form: int, *, num_places: int, num_values: int) -> npt.NDArray[np.int64]:
    """Places in strictly rising order, all of them within the vector."""
    is_bitmap = form == _BITMAP
    places = np.flatnonzero(np.unpackbits(payload)) if is_bitmap else payload.view(np.uint32).astype(np.int64)
    if places.size != num_places or (num_places and (places[-1] >= num_values or (np.diff(places) <= 0).any())):
        raise ValueError("the places are not distinct, not in order, or beyond the vector")
    return places
