import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcml_ray.push.wire import (
    BLOCK_BYTES,
    PIECE_BYTES,
    Buffer,
    Expectation,
    PushHeader,
    TensorSpec,
    all_finite,
    checksum,
    scan,
)
from tests.pushes import refusal

LAYOUT = (TensorSpec("weight", (2, 3), "float32", 0), TensorSpec("bias", (2,), "float32", 6))
BLOCK, PIECE = BLOCK_BYTES // 4, PIECE_BYTES // 4  # float32 values
LARGEST = np.finfo(np.float32).max

EXPECTED = Expectation(
    run_id="run",
    senders=frozenset({"A", "B"}),
    fingerprint="f00d",
    contract="c0de",
    layout=LAYOUT,
    num_values=8,
    oldest_round=4,
    newest_round=6,
)


def values(size: int = 8, *, seed: int = 0) -> Buffer:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def header(buffer: Buffer, **changes: Any) -> PushHeader:
    fitting = PushHeader("run", 4, "A", 3, "f00d", "c0de", LAYOUT, 8, "float32", checksum(buffer))
    return replace(fitting, **changes)


# --- refusal -----------------------------------------------------------------------------------


def test_another_number_of_training_cases_than_registered_is_refused() -> None:
    """It is the weight in a mean over sites: who makes it up makes itself heard."""
    registered = replace(EXPECTED, num_train=3)
    assert refusal(header(values()), values(), registered) == ""
    for claimed in (2, 300):
        reason = refusal(header(values(), num_train=claimed), values(), registered)
        assert reason == f"num_train: {claimed}, but A has registered 3 training cases"


@pytest.mark.parametrize("round_number", [4, 5, 6])
def test_a_fitting_push_is_taken(round_number: int) -> None:
    assert refusal(header(values(), round_number=round_number), values(), EXPECTED) == ""


def test_a_read_only_buffer_is_taken() -> None:
    buffer = values()
    buffer.flags.writeable = False
    assert refusal(header(buffer), buffer, EXPECTED) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run_id": "other"}, "run: other is not this run (run)"),
        ({"sender": "Z"}, "sender: Z is not a site of this run"),
        ({"round_number": 3}, "stale: round 3, the oldest accepted is 4"),
        ({"round_number": 7}, "round: 7 lies ahead of this site, at most 6"),
        ({"contract": "beef"}, "data contract: beef is not c0de"),
        ({"fingerprint": "beef"}, "architecture: beef is not f00d"),
        ({"dtype": "float16"}, "dtype: float16 is not float32"),
        ({"num_values": 7}, "size: 7 values, not 8"),
        ({"layout": LAYOUT[:1]}, "layout: names, shapes or order"),
        ({"layout": LAYOUT[::-1]}, "layout: names, shapes or order"),
        ({"checksum": "0" * 32}, "checksum: the buffer is not the one"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_with_its_reason(change: dict[str, Any], reason: str) -> None:
    assert refusal(header(values(), **change), values(), EXPECTED).startswith(reason)


@pytest.mark.parametrize(
    ("buffer", "reason"),
    [
        (values().astype(np.float64), "dtype: expected a flat float32 array, got float64 (8,)"),
        (values().astype(">f4"), "dtype: expected a flat float32 array, got >f4"),
        (values().reshape(2, 4), "dtype: expected a flat float32 array, got float32 (2, 4)"),
        (values().tobytes(), "dtype: expected a flat float32 array, got bytes None"),
        (None, "dtype: expected a flat float32 array, got NoneType"),
        (values(7), "size: expected 8 values, got 7"),
        (values(seed=1), "checksum: the buffer is not the one"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused_with_its_reason(buffer: Any, reason: str) -> None:
    assert refusal(header(values()), buffer, EXPECTED).startswith(reason)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7])
def test_weights_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    buffer = values()
    buffer[place] = bad
    assert refusal(header(buffer), buffer, EXPECTED).startswith("not finite: the weights hold NaN or infinity")


def test_opposite_infinities_do_not_cancel() -> None:
    assert not all_finite(np.array([np.inf, -np.inf, 1], dtype=np.float32))


def test_finite_values_whose_squares_overflow_are_finite() -> None:
    buffer = np.array([LARGEST, LARGEST, -LARGEST], dtype=np.float32)
    assert all_finite(buffer)
    assert scan(buffer)[1]


def test_a_header_survives_pickling() -> None:
    before = header(values())
    assert pickle.loads(pickle.dumps(before)) == before  # noqa: S301 - our own bytes


# --- checksum ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]))
def test_checksum_sees_any_single_flipped_bit(data: st.DataObject, size: int) -> None:
    buffer = values(size)
    flipped = buffer.copy()
    bit = data.draw(st.integers(0, 32 * size - 1))
    flipped.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
    assert checksum(flipped) != checksum(buffer)


def test_checksum_sees_two_swapped_blocks() -> None:
    buffer = values(3 * BLOCK)
    swapped = np.concatenate([buffer[BLOCK : 2 * BLOCK], buffer[:BLOCK], buffer[2 * BLOCK :]])
    assert checksum(swapped) != checksum(buffer)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_checksum_sees_zeros_put_at_the_end(size: int) -> None:
    buffer = np.zeros(size, dtype=np.float32)
    assert checksum(np.append(buffer, np.float32(0))) != checksum(buffer)


def test_checksum_tells_a_block_of_zeros_from_its_sum() -> None:
    """The sum of a zero block is one zero word, the same bytes as two zero values that fill no block."""
    assert checksum(np.zeros(BLOCK, dtype=np.float32)) != checksum(np.zeros(2, dtype=np.float32))


def test_checksum_sees_a_change_in_the_bytes_that_fill_no_block() -> None:
    buffer = values(BLOCK + 3)
    swapped = buffer.copy()
    swapped[[-1, -2]] = swapped[[-2, -1]]
    assert checksum(swapped) != checksum(buffer)


@pytest.mark.parametrize("size", [0, 1, BLOCK + 1, PIECE, 2 * PIECE + BLOCK + 3])
def test_a_scan_is_checksum_and_finiteness(size: int) -> None:
    buffer = values(size)
    assert scan(buffer) == (checksum(buffer), True)
    assert scan(buffer.view(np.uint8)) == (checksum(buffer), None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 8191, 8192, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE + BLOCK, -1])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(bad: float, place: int) -> None:
    buffer = values(2 * PIECE + BLOCK + 3)
    buffer[place] = bad
    assert scan(buffer) == (checksum(buffer), False)
    assert not all_finite(buffer)


def test_checksum_depends_on_values_alone_not_on_memory() -> None:
    buffer = values(BLOCK + 4)
    spread = np.zeros(2 * buffer.size, dtype=np.float32)
    spread[::2] = buffer
    behind_one_value = np.concatenate([values(1), buffer])[1:]  # starts off an 8-byte boundary
    assert checksum(spread[::2]) == checksum(behind_one_value) == checksum(buffer)


@pytest.mark.parametrize("change", [{"round_number": "3"}, {"num_train": None}, {"num_values": 1.5}])
def test_header_with_fields_of_another_type_is_refused(change: dict[str, Any]) -> None:
    assert refusal(header(values(), **change), values(), EXPECTED).startswith("header: ")
