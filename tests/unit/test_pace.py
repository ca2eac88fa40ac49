from __future__ import annotations

import pytest

from actors.pace import GRACE_S, LEAST_ASYNC_PUSH_S, LEAST_TIMEOUT_S, CallKind, Pace
from actors.site_pool import Outcome
from gcml_ray.config import FederationConfig
from gcml_ray.records import PushReceipt, PushReport

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


@pytest.mark.parametrize(("mode", "least_s"), [("sync", LEAST_TIMEOUT_S), ("async", LEAST_ASYNC_PUSH_S)])
def test_without_a_barrier_a_push_is_given_up_soon_as_its_sender_sends_nothing_meanwhile(
    mode: str, least_s: float
) -> None:
    seen = Pace.of(FederationConfig.model_validate({"rounds": 4, "local_steps": 1, "mode": mode}))
    push = CallKind("push")
    assert seen.timeout_s("A", push, limit_s=120) == 120, "before the first one nobody knows"
    seen.note("A", push, 0.05)
    seen.note("A", TRAIN, 0.05)
    assert seen.timeout_s("A", push, limit_s=120) == least_s
    assert seen.timeout_s("A", TRAIN, limit_s=120) == LEAST_TIMEOUT_S
    seen.note("A", push, 4.0)
    assert seen.timeout_s("A", push, limit_s=120) == max(least_s, 40.0)


@pytest.mark.parametrize(("reason", "is_usual"), [("", True), ("stale", True), ("unreachable: no answer", False)])
def test_the_time_of_a_push_that_waited_in_vain_is_not_usual(reason: str, is_usual: bool) -> None:
    """Else one receiver that hangs would lengthen the wait for the next one tenfold."""
    receipts = (PushReceipt(1, "A", "B", True, "", 8), PushReceipt(1, "A", "C", not reason, reason, 8))
    assert Outcome("A", "push", result=PushReport("A", 1, receipts)).is_usual == is_usual
