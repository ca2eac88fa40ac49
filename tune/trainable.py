"""One trial: a whole federation inside the trial's placement group, its validation reported round by round.

A thin adapter: the protocol is the driver's. The run folder lies at a path that follows from the trial's id, so a
trial that is started again goes on from its sites' checkpoints; Ray Tune itself holds no checkpoint.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune as ray_tune

from actors.listener import NullListener
from actors.run import run_federation, sites_of
from actors.site import TrainerFactory
from gcml_ray.errors import GcmlError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import RoundRecord, to_plain
from gcml_ray.search.records import Objective, TrialPoint
from tune.node_cache import cache_folder
from tune.objective import TrialProgress
from tune.trial_config import Search, trial_config

OBJECTIVES: tuple[Objective, ...] = ("mean_dice", "worst_dice", "dice_per_megabyte")


class TrialError(GcmlError):
    """A trial's federation ended without a result."""


def trial_folder(search: Search, trial_id: str) -> Path:
    """The run folder of a trial."""
    return search.folder / "trials" / trial_id


def make_trainable(search: Search, *, make_trainer: TrainerFactory | None) -> Callable[[dict[str, Any]], None]:
    """The function that Ray Tune runs for every trial, in a process of its own."""
    cache = cache_folder(search)  # the same on every node, whatever its own temporary folder

    def federation_trial(params: dict[str, Any]) -> None:
        trial_id = ray_tune.get_context().get_trial_id()
        run_trial(search, params, trial_id=trial_id, make_trainer=make_trainer, cache=cache)

    return federation_trial


def run_trial(
    search: Search, params: dict[str, Any], *, trial_id: str, make_trainer: TrainerFactory | None, cache: str | None
) -> None:
    """Runs a trial's federation to its end; Ray Tune may end it at any report.

    Raises:
        GcmlError: the drawn values contradict each other, a site cannot start, or every site was lost.
    """
    config = trial_config(search, params, folder=trial_folder(search, trial_id), cache=cache)
    folder = RunFolder(Path(config.output.folder))
    reporter = RoundReporter(sites_of(config), last_round=config.federation.rounds)
    is_resumed, is_over = _can_resume(folder), False
    if is_resumed:
        state = folder.read_state()
        is_over, done = state.status == "finished", state.last_complete_round
        reporter.replay(record for record in folder.rounds() if record.plan.round_number <= done)
    if not is_over:
        stop = threading.Event()  # never set: Ray Tune ends a trial inside its report
        summary = run_federation(
            config, listener=reporter, stop=stop, resume=is_resumed, make_trainer=make_trainer, test=False
        )
        if summary.status != "finished":
            reasons = "; ".join(f"{site}: {reason}" for site, reason in summary.dropped.items())
            raise TrialError(f"every site was lost ({reasons})")
    reporter.report_last()


def _can_resume(folder: RunFolder) -> bool:
    """Whether the trial began earlier; what is left of one that lost its sites is removed."""
    if not folder.state_file.exists():
        return False
    if folder.read_state().status == "failed":
        shutil.rmtree(folder.path)
        return False
    return True


class RoundReporter(NullListener):
    """Reports every evaluated round to Ray Tune, from the driver's own thread.

    The last round is reported when the federation has ended in good order: a scheduler ends a trial inside the report.
    Without a barrier there may be more records than rounds, until the slowest site has done all of its own: the newest
    one then stands for the last round.

    Args:
        sites: all sites of the federation.
        last_round: number of its rounds.
        report: takes the numbers of a round.
    """

    def __init__(
        self, sites: tuple[str, ...], *, last_round: int, report: Callable[[dict[str, Any]], None] = ray_tune.report
    ) -> None:
        self._progress = TrialProgress(sites)
        self._last_round = last_round
        self._report = report
        self._final: TrialPoint | None = None
        self._replayed: list[TrialPoint] = []

    def replay(self, rounds: Iterable[RoundRecord]) -> None:
        """Takes rounds of an earlier process; they go with the next report, as its last ones may have been lost."""
        points = [self._take(record) for record in rounds]
        self._replayed = [point for point in points if point is not None]

    def on_round_end(self, record: RoundRecord) -> None:
        """Reports a round; raises SystemExit where the scheduler cuts the trial."""
        point = self._take(record)
        if point is not None and point.round_number < self._last_round:
            self._send(point)

    def report_last(self) -> None:
        """Reports the last round."""
        if self._final is None:
            raise TrialError(f"no site was evaluated in the last round, {self._last_round}")
        self._send(self._final)

    def _send(self, point: TrialPoint) -> None:
        earlier, self._replayed = self._replayed, []
        self._report(result_of(point, earlier=earlier))

    def _take(self, record: RoundRecord) -> TrialPoint | None:
        point = self._progress.add(record)
        if point is not None and point.round_number >= self._last_round:
            self._final = replace(point, round_number=self._last_round)
        return point


def result_of(point: TrialPoint, *, earlier: Sequence[TrialPoint] = ()) -> dict[str, Any]:
    """A point as Ray Tune's result: all objectives by name, the round, and the points that it stands for."""
    values: dict[str, Any] = {name: point.value(name) for name in OBJECTIVES}
    values |= {"round": point.round_number, "megabytes": point.megabytes}
    return values | {"points": [to_plain(each) for each in (*earlier, point)]}


def points_in(result: dict[str, Any]) -> tuple[TrialPoint, ...]:
    """The points back from Ray Tune's result."""
    return tuple(TrialPoint(**plain) for plain in result["points"])
