"""Runs over a driver in this process, of fake trainers or real ones, and what watches them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.driver import Driver, RunSummary
from actors.failure_policy import Decision
from actors.listener import NullListener
from actors.local_pool import LocalPool
from actors.run import sites_of
from actors.site_pool import SitePool
from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import EvaluationReport, RoundPlan, RoundRecord, SiteFailure, SiteInfo, TrainReport
from gcml_ray.tracking.run import NullTracker
from tests.fakes import FakeTrainers, Fault

# --- who watches -------------------------------------------------------------------------------


@dataclass
class RecordingListener(NullListener):
    """Keeps what it is told. Sets ``stop`` at the end of round ``stop_after``."""

    stop: threading.Event = field(default_factory=threading.Event)
    stop_after: int = 0
    on_end: Callable[[RoundRecord], object] | None = None
    on_trained: Callable[[TrainReport], object] | None = None
    ready: list[SiteInfo] = field(default_factory=list)
    plans: list[RoundPlan] = field(default_factory=list)
    trained: list[TrainReport] = field(default_factory=list)
    failures: list[tuple[SiteFailure, Decision]] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    evaluated: list[EvaluationReport] = field(default_factory=list)

    def on_site_ready(self, info: SiteInfo) -> None:
        """Keeps it."""
        self.ready.append(info)

    def on_round_begin(self, plan: RoundPlan) -> None:
        """Keeps it."""
        self.plans.append(plan)

    def on_site_trained(self, report: TrainReport) -> None:
        """Keeps it, and does what it was told to."""
        self.trained.append(report)
        if self.on_trained is not None:
            self.on_trained(report)

    def on_failure(self, failure: SiteFailure, decision: Decision) -> None:
        """Keeps it."""
        self.failures.append((failure, decision))

    def on_round_end(self, record: RoundRecord) -> None:
        """Keeps it, and ends the run where it was told to."""
        self.rounds.append(record)
        if self.on_end is not None:
            self.on_end(record)
        if record.plan.round_number == self.stop_after:
            self.stop.set()

    def on_evaluated(self, report: EvaluationReport) -> None:
        """Keeps it."""
        self.evaluated.append(report)


class RecordingTracker(NullTracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.infos: list[SiteInfo] = []
        self.rounds: list[RoundRecord] = []
        self.scores: list[EvaluationReport] = []

    def log_sites(self, infos: Sequence[SiteInfo]) -> None:
        """Keeps it."""
        self.infos.extend(infos)

    def log_round(self, record: RoundRecord) -> None:
        """Keeps it."""
        self.rounds.append(record)

    def log_scores(self, reports: Sequence[EvaluationReport]) -> None:
        """Keeps it."""
        self.scores.extend(reports)


# --- a run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that is over, and what watched it."""

    summary: RunSummary
    folder: RunFolder
    listener: RecordingListener
    tracker: RecordingTracker

    def failures(self) -> list[tuple[str, int, str, str]]:
        """(site, round, kind, decision) of every failure."""
        return [(f.site, f.round_number, f.kind, decision.value) for f, decision in self.listener.failures]

    def trained(self, site: str) -> list[int]:
        """The rounds that a site reported."""
        return [report.round_number for report in self.listener.trained if report.site == site]

    def restored(self, site: str) -> list[int]:
        """The round that each process of a site began from; 0 without a checkpoint."""
        return [info.restored_round for info in self.listener.ready if info.site == site]


def drive(
    config: Config,
    pool: SitePool,
    *,
    resume: bool = False,
    finish: bool = False,
    listener: RecordingListener | None = None,
) -> Run:
    """Runs a driver over a pool and ends the pool."""
    path = Path(config.output.folder)
    folder = RunFolder.open(path) if resume else RunFolder.create(path, config)
    state = folder.read_state() if resume else None
    listener = listener or RecordingListener()
    tracker = RecordingTracker()
    driver = Driver(config, pool, folder, tracker=tracker, listener=listener, stop=listener.stop)
    try:
        summary = driver.run(sites_of(config), resume=state, finish=finish)
    finally:
        pool.shutdown()
    return Run(summary, folder, listener, tracker)


def run_real(config: Config, **options: Any) -> Run:
    """A run of real sites in this process; ``options`` are those of :func:`drive`."""
    return drive(config, LocalPool(config, config.output.folder, run_id="run"), **options)


def run_locally(
    config: Config,
    *faults: Fault,
    resume: bool = False,
    finish: bool = False,
    listener: RecordingListener | None = None,
) -> Run:
    """A run of fake trainers in this process."""
    pool = LocalPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers(faults))
    return drive(config, pool, resume=resume, finish=finish, listener=listener)
