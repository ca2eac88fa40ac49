"""A slow site: what it costs the others, without a barrier and with a deadline. Sites only sleep."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gcml_ray.config import Config
from tests.cluster.ray_runs import run_on_ray
from tests.fake_runs import RecordingListener, Run
from tests.fakes import Fault, fake_config

pytestmark = pytest.mark.usefixtures("ray_local")

ROUNDS, STEP_S, SLOWER = 10, 0.8, 5
FAST = "ABC"


def config_of(folder: Path, **federation: Any) -> Config:
    return fake_config(folder, sites="ABCD", federation={"rounds": ROUNDS, "late_factor": None} | federation)


def run_with(folder: Path, slow_s: float, **federation: Any) -> Run:
    """A run in which D takes ``slow_s`` a round and the others ``STEP_S``."""
    pace = dict.fromkeys(FAST, STEP_S) | {"D": slow_s}
    faults = [
        Fault(site, number, "train", "slow", seconds=seconds)
        for site, seconds in pace.items()
        for number in range(1, ROUNDS + 1)
    ]
    return run_on_ray(config_of(folder, **federation), *faults, listener=TimedListener())


class TimedListener(RecordingListener):
    """Notes when each site's reports came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[float]] = {}

    def on_site_trained(self, report: Any) -> None:
        super().on_site_trained(report)
        self.times.setdefault(report.site, []).append(time.monotonic())


def rounds_per_second(run: Run) -> float:
    """Of the fast sites, from their first report to their last."""
    listener = run.listener
    assert isinstance(listener, TimedListener)
    spans = [(len(listener.times[site]) - 1) / (listener.times[site][-1] - listener.times[site][0]) for site in FAST]
    return sum(spans) / len(spans)


def test_without_a_barrier_a_five_times_slower_site_costs_the_others_nothing(tmp_path: Path) -> None:
    alone = run_with(tmp_path / "even", STEP_S, mode="async")
    beside = run_with(tmp_path / "slow", SLOWER * STEP_S, mode="async", time_limit_s=1.3 * ROUNDS * STEP_S)
    assert [alone.summary.status, beside.summary.status] == ["finished"] * 2
    assert rounds_per_second(beside) >= 0.95 * rounds_per_second(alone)
    assert beside.trained("A") == list(range(1, ROUNDS + 1))
    assert 2 <= len(beside.trained("D")) < ROUNDS, "the time limit ended the run with what D had"
    assert {report.site for report in beside.summary.evaluations} == set("ABCD")


def test_with_a_deadline_a_five_times_slower_site_costs_the_others_less_than_a_tenth(tmp_path: Path) -> None:
    even = run_with(tmp_path / "even", STEP_S, round_deadline_s=1.2 * STEP_S)
    slow = run_with(tmp_path / "slow", SLOWER * STEP_S, round_deadline_s=1.2 * STEP_S)
    records = slow.folder.rounds()
    assert rounds_per_second(slow) >= 0.9 * rounds_per_second(even)
    assert [name for record in records for name in record.late] != []
    assert slow.trained("A") == list(range(1, ROUNDS + 1))
    late = [report.round_number for record in records for report in record.trained if report.site == "D"]
    assert late == slow.trained("D") == sorted(set(late)), "what a late site reports is in the records, once"
    assert slow.failures() == []


def test_staleness_of_a_push_is_in_the_records_of_its_receiver(tmp_path: Path) -> None:
    """The fake trainer knows nothing of staleness; that the slow site's pushes are old shows in their rounds."""
    run = run_with(tmp_path, SLOWER * STEP_S, mode="async", time_limit_s=1.3 * ROUNDS * STEP_S, max_staleness=2)
    refused = [push.reason for record in run.folder.rounds() for push in record.pushes if not push.accepted]
    assert any(reason.startswith("stale: round 1, the oldest accepted is") for reason in refused)
