"""Sites that answer late, are lost with two calls open, or join when nearly all is over."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest

from actors.driver import Driver
from actors.site_pool import Outcome
from gcml_ray.config import Config
from gcml_ray.records import SiteFailure
from tests.fakes import Fault, fake_config
from tests.runs import run_locally
from tests.timed_pools import LatePool, TimedPool

GOSSIP: dict[str, Any] = {"name": "gossip_avg", "topology": {"name": "ring"}}


def test_training_that_a_later_order_has_overtaken_counts_for_no_checkpoint(tmp_path: Path) -> None:
    """B ends round 3 while A trains in round 4, adopts in round 4, and has no checkpoint of round 3."""
    config = fake_config(tmp_path, method={"name": "fedavg"}, federation={"round_deadline_s": 1.0})
    pool = LatePool(config)
    pool.late, pool.until = ("B", "train", 3), ("A", "train", 4)
    run = pool.drive()
    files = {path.stem for path in run.folder.checkpoints("B").glob("round_*.npy")}
    assert f"round_{run.folder.read_state().site_rounds['B']:05d}" in files
    assert run_locally(config, resume=True).summary.status == "finished"


def test_late_site_is_waited_for_and_tested_where_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, "is_time_up", lambda self: self.last_record >= 3)
    config = fake_config(tmp_path, method=GOSSIP, federation={"rounds": 10, "round_deadline_s": 1.0})
    pool = LatePool(config)
    pool.late = ("B", "train", 2)
    run = pool.drive()
    assert run.summary.untested == ()
    assert {score.site for score in run.folder.cases()} == {"A", "B", "C"}
    last = run.folder.rounds()[-1]
    assert last.plan.round_number == 3
    assert [report.round_number for report in last.trained if report.site == "B"] == [2]
    assert run.tracker.rounds[-1] == last


def test_what_a_late_site_reports_before_a_stop_is_on_record(tmp_path: Path) -> None:
    """B's round 2 ends while A trains in round 3, after which the run is told to stop."""
    config = fake_config(tmp_path, method=GOSSIP, federation={"rounds": 10, "round_deadline_s": 1.0})
    pool = LatePool(config)
    pool.late, pool.until = ("B", "train", 2), ("A", "train", 3)
    run = pool.drive(stop_after=3)
    assert run.summary.status == "stopped"
    reported = [(report.site, report.round_number) for one in run.folder.rounds() for report in one.trained]
    assert ("B", 2) in reported
    assert len(reported) == len(set(reported))


class TwiceLostPool(TimedPool):
    """B's process ends in rounds 2 and 4 while its push and its training are both open: Ray fails both calls."""

    is_parallel = True

    def __init__(self, config: Config, *faults: Fault) -> None:
        super().__init__(config, *faults)
        self.deaths = [2, 4]

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Both failures in one batch."""
        calls = [(method, number) for site, method, _, number in self._queue if site == "B"]
        methods = {method for method, _ in calls}
        if self.deaths and ("train", self.deaths[0]) in calls and "push" in methods:
            self.deaths.pop(0)
            self._queue = deque(call for call in self._queue if call[0] != "B")
            return [
                Outcome("B", method, failure=SiteFailure("B", number, method, "died", "its process ended"))
                for method, number in calls
            ]
        return super().wait(timeout_s)


def test_a_process_that_takes_two_calls_along_has_died_once(tmp_path: Path) -> None:
    pool = TwiceLostPool(fake_config(tmp_path, method=GOSSIP, federation={"mode": "async", "rounds": 6}))
    run = pool.drive()
    assert pool.deaths == []
    assert run.summary.dropped == {}
    assert [decision for *_, decision in run.failures()] == ["restart", "restart"]
    assert run.trained("B")[-1] == 6


# --- sites that join late ----------------------------------------------------------------------


def late_joiner(folder: Path, *, mode: str, joins: int) -> LatePool:
    """C loads its data for 30 s; a round takes 3 s."""
    schedule = {"C": {"joins": joins}}
    pool = LatePool(fake_config(folder, method=GOSSIP, federation={"mode": mode, "schedule": schedule}))
    pool.late, pool.after_s, pool.train_s = ("C", "start", 0), 30.0, 1.0
    return pool


def test_a_site_that_joined_too_late_to_train_is_no_result(tmp_path: Path) -> None:
    run = late_joiner(tmp_path, mode="sync", joins=4).drive()
    assert run.summary.status == "finished"
    assert run.trained("C") == []
    assert {score.site for score in run.folder.cases()} == {"A", "B"}
    assert run.summary.untested == ()
    assert run.summary.dropped["C"].startswith("it has trained in no round")


def test_without_a_barrier_a_site_that_is_still_joining_does_all_its_rounds(tmp_path: Path) -> None:
    run = late_joiner(tmp_path, mode="async", joins=2).drive()
    assert run.trained("C") == [1, 2, 3, 4]
    assert {score.site for score in run.folder.cases()} == {"A", "B", "C"}
    assert run.summary.dropped == {}
