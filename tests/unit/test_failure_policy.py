from __future__ import annotations

import pytest

from actors.failure_policy import Decision, History, decide, start_error
from gcml_ray.records import SiteFailure

FRESH = History()
WORN = History(failures_in_a_row=2)
RESTARTED = History(restarts=3)


@pytest.mark.parametrize(
    ("stage", "round_number", "kind", "history", "expected"),
    [
        ("train", 5, "raised", FRESH, Decision.SKIP),
        ("push", 5, "raised", FRESH, Decision.SKIP),
        ("train", 5, "raised", History(failures_in_a_row=1), Decision.SKIP),
        ("train", 5, "raised", WORN, Decision.DROP),
        ("train", 5, "died", FRESH, Decision.RESTART),
        ("train", 5, "unreachable", FRESH, Decision.RESTART),
        ("train", 5, "late", FRESH, Decision.RESTART),
        ("push", 5, "late", FRESH, Decision.RESTART),
        ("train", 5, "died", WORN, Decision.DROP),
        ("train", 5, "died", History(restarts=2), Decision.RESTART),
        ("train", 5, "died", RESTARTED, Decision.DROP),
        ("train", 5, "late", RESTARTED, Decision.DROP),
        ("train", 5, "raised", RESTARTED, Decision.SKIP),
    ],
)
def test_decision(stage: str, round_number: int, kind: str, history: History, expected: Decision) -> None:
    failure = SiteFailure("A", round_number, stage, kind, "it broke")  # type: ignore[arg-type]
    assert decide(failure, history) is expected


def test_sites_that_cannot_start_for_the_same_reason_share_a_line() -> None:
    words = {"A": "site A: no room", "B": "site B: bad files", "C": "site C: no room"}
    error = start_error([SiteFailure(site, 0, "start", "raised", text) for site, text in words.items()])
    assert error.message.splitlines() == ["cannot start", "site A, C: no room", "site B: bad files"]
