from __future__ import annotations

import pytest

from actors.failure_policy import Decision, History, decide, start_error
from gcml_ray.records import SiteFailure

FRESH = History()
WORN = History(failures_in_a_row=2)
RESTARTED = History(restarts=3)


LOST = ("died", "unreachable", "late")


def decision(kind: str, history: History, *, message: str = "it broke") -> Decision:
    return decide(SiteFailure("A", 5, "train", kind, message), history)  # type: ignore[arg-type]


@pytest.mark.parametrize("history", [FRESH, History(failures_in_a_row=1), RESTARTED])
def test_site_that_raised_keeps_its_process_and_is_asked_again(history: History) -> None:
    assert decision("raised", history) is Decision.SKIP


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: an illegal memory access was encountered", Decision.RESTART),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", Decision.RESTART),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", Decision.SKIP),
    ],
)
def test_site_whose_process_has_lost_its_gpu_gets_a_new_one(message: str, expected: Decision) -> None:
    assert decision("raised", FRESH, message=message) is expected


@pytest.mark.parametrize("kind", LOST)
def test_site_that_was_lost_gets_a_new_process_three_times(kind: str) -> None:
    assert [decision(kind, History(restarts=restarts)) for restarts in range(3)] == [Decision.RESTART] * 3
    assert decision(kind, RESTARTED) is Decision.DROP


@pytest.mark.parametrize("kind", ["raised", *LOST])
def test_site_is_dropped_with_its_third_failure_in_a_row(kind: str) -> None:
    assert decision(kind, WORN) is Decision.DROP


def test_sites_that_cannot_start_for_the_same_reason_share_a_line() -> None:
    words = {"A": "site A: no room", "B": "site B: bad files", "C": "site C: no room"}
    error = start_error([SiteFailure(site, 0, "start", "raised", text) for site, text in words.items()])
    assert error.message.splitlines() == ["cannot start", "site A, C: no room", "site B: bad files"]
