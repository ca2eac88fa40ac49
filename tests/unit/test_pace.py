from __future__ import annotations

import pytest

from actors.pace import GRACE_S, LEAST_TIMEOUT_S, CallKind, Pace

TRAIN = CallKind("train")
VALIDATE = CallKind("train", evaluates=True)


def pace(*seconds: float, late_factor: float | None = 2.0) -> Pace:
    seen = Pace(timeout_factor=10.0, late_factor=late_factor)
    for value in seconds:
        seen.note("A", TRAIN, value)
    return seen


def test_before_the_first_call_of_a_kind_only_the_limit_counts() -> None:
    seen = pace(5.0)
    assert seen.timeout_s("A", VALIDATE, limit_s=3600) == 3600
    assert seen.timeout_s("B", TRAIN, limit_s=3600) == 3600


def test_timeout_is_a_multiple_of_the_slowest_of_the_last_five_calls() -> None:
    assert pace(99.0, 20.0, 30.0, 10.0, 12.0, 11.0).timeout_s("A", TRAIN, limit_s=3600) == 10 * 30.0


@pytest.mark.parametrize(("seconds", "limit", "expected"), [(0.1, 3600, LEAST_TIMEOUT_S), (500, 3600, 3600), (1, 5, 5)])
def test_timeout_stays_between_a_minute_and_the_limit(seconds: float, limit: float, expected: float) -> None:
    assert pace(seconds).timeout_s("A", TRAIN, limit_s=limit) == expected


def test_nobody_is_late_before_every_call_was_seen_once() -> None:
    assert pace(5.0).patience_s({"A": TRAIN, "B": TRAIN}) is None
    assert pace().patience_s({}) is None


def test_patience_is_twice_the_slowest_site_and_never_less_than_the_grace_more() -> None:
    assert pace(60.0).patience_s({"A": TRAIN}) == 120.0
    assert pace(1.0).patience_s({"A": TRAIN}) == 1.0 + GRACE_S


def test_without_a_late_factor_everybody_waits() -> None:
    assert pace(5.0, late_factor=None).patience_s({"A": TRAIN}) is None


def test_new_process_is_judged_anew() -> None:
    seen = pace(5.0)
    seen.forget("A")
    assert seen.typical_s("A", TRAIN) is None
