"""Ray Tune's events as records: kept on disk, shown and tracked as they come."""

from __future__ import annotations

import logging
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ray import tune as ray_tune

from gcml_ray.files.record_json import to_json
from gcml_ray.files.whole_files import replace_file
from gcml_ray.search.folder import TRIALS_FOLDER, read_trials
from gcml_ray.search.records import TrialRecord, TrialStatus
from tune.trainable import points_in

log = logging.getLogger(__name__)


class SearchView(Protocol):
    """Who is told of trials; see ``gcml_ray/console/search.py`` and ``gcml_ray/tracking/search.py``."""

    def on_trial(self, trial: TrialRecord) -> None:
        """A trial is new, has reached a new round, or has ended."""


class Watch:
    """The trials of a search by id, each with a file of its own, so that a resumed search knows them all.

    Args:
        folder: the search's folder.
        rounds: of a whole trial.
        views: told of every change.
        is_ending: whether the search itself is being ended; its trials then are not the scheduler's cuts.
        keep_checkpoints: of trials that have ended; the winner is trained anew in any case.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rounds: int,
        views: Sequence[SearchView],
        is_ending: Callable[[], bool],
        keep_checkpoints: bool,
    ) -> None:
        self._folder = folder
        self._rounds = rounds
        self._views = tuple(views)
        self._is_ending = is_ending
        self._keep_checkpoints = keep_checkpoints
        self._trials: dict[str, TrialRecord] = {}
        self._seen: set[str] = set()
        self._trials |= {record.trial_id: record for record in read_trials(folder)}

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials so far, in the order of their making."""
        return tuple(sorted(self._trials.values(), key=lambda trial: trial.number))

    def knows(self, trial_id: str) -> bool:
        """Whether Ray Tune has told of the trial in this process."""
        return trial_id in self._seen

    def begin(self, trial_id: str, params: dict[str, Any], *, is_running: bool) -> None:
        """A trial was made, or its process has started."""
        self._seen.add(trial_id)
        known = self._trials.get(trial_id) or TrialRecord(self._next_number(), trial_id, "waiting", dict(params))
        self._keep(replace(known, status="running", reason="") if is_running else known)

    def _next_number(self) -> int:
        return 1 + max((trial.number for trial in self._trials.values()), default=0)

    def progress(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial has reported a round; a round that is reported again replaces the old one."""
        known = self._trials[trial_id]
        points = {point.round_number: point for point in (*known.points, *points_in(result))}
        up_to_now = [points[number] for number in sorted(points) if number <= result["round"]]
        self._keep(replace(known, points=tuple(up_to_now)))

    def end(self, trial_id: str, *, reason: str | None = None) -> None:
        """A trial is over; with a reason where it failed."""
        known = self._trials[trial_id]
        status: TrialStatus = "stopped" if self._is_ending() else "cut"
        if reason is not None:
            status = "failed"
        elif known.last_round == self._rounds:
            status = "finished"
        self._keep(replace(known, status=status, reason=reason or ""))
        if not self._keep_checkpoints and status not in ("stopped", "failed"):  # those may be gone on with
            shutil.rmtree(self._folder / "trials" / trial_id / "checkpoints", ignore_errors=True)

    def settle(self) -> None:
        """The search has ended: Ray Tune is silent about the trials that it ended with it.

        A trial that was made just before a crash may be unknown to Ray Tune after it; one that never ran is forgotten.
        """
        for trial in self.trials:
            if trial.status == "running":
                self._keep(replace(trial, status="stopped"))
            elif trial.status == "waiting" and trial.trial_id not in self._seen:
                del self._trials[trial.trial_id]
                (self._folder / TRIALS_FOLDER / f"{trial.trial_id}.json").unlink()

    def _keep(self, record: TrialRecord) -> None:
        if self._trials.get(record.trial_id) == record:
            return
        self._trials[record.trial_id] = record
        replace_file(self._folder / TRIALS_FOLDER / f"{record.trial_id}.json", to_json(record) + "\n")
        for view in self._views:
            view.on_trial(record)


class TuneEvents(ray_tune.Callback):
    """Hands Ray Tune's events to the watch of this process.

    Ray Tune pickles its callbacks and, on a restore, uses the pickled ones: so this one holds nothing.
    """

    watch: ClassVar[Watch | None] = None

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Trials are first seen here."""
        del iteration, info
        if self.watch is not None:
            for trial in trials:
                if not self.watch.knows(trial.trial_id):
                    self.watch.begin(trial.trial_id, trial.config, is_running=False)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's placement group is there."""
        del iteration, trials, info
        if self.watch is not None:
            self.watch.begin(trial.trial_id, trial.config, is_running=True)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A round was evaluated."""
        del iteration, trials, info
        if self.watch is not None and "round" in result:
            self.watch.progress(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has ended, by itself or by the scheduler."""
        del iteration, trials, info
        if self.watch is not None:
            self.watch.end(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has failed."""
        del iteration, trials, info
        if self.watch is not None:
            reason = reason_of(_error_of(trial))
            log.warning("trial %s failed: %s", trial.trial_id, reason)
            self.watch.end(trial.trial_id, reason=reason)


def _error_of(trial: Any) -> object:
    """What a trial raised. Ray Tune's own getters read a copy that is not there yet when its callbacks run."""
    try:
        return pickle.loads(Path(trial.pickled_error_file).read_bytes())  # noqa: S301 - written by this process
    except Exception as error:  # an error that cannot be pickled, or unpickled, is there as text
        log.debug("the error of trial %s is read as text: %r", trial.trial_id, error)
    path = trial.error_file
    return Path(path).read_text(encoding="utf-8") if path and Path(path).exists() else "its process ended"


def reason_of(error: object) -> str:
    """What happened, in the words of the innermost error, without Ray's wrapping."""
    seen = error
    while isinstance(seen, BaseException):
        cause = getattr(seen, "cause", None) or seen.__cause__
        if not isinstance(cause, BaseException) or cause is seen:
            break
        seen = cause
    text = str(seen).strip() or type(seen).__name__
    return text if isinstance(seen, BaseException) and "Traceback" not in text else text.splitlines()[-1].strip()


class Deadline:
    """When the time budget is over.

    Args:
        hours: from now; None for never.
    """

    def __init__(self, hours: float | None) -> None:
        self._end = None if hours is None else time.monotonic() + 3600 * hours

    @property
    def is_over(self) -> bool:
        """Whether it is past."""
        return self._end is not None and time.monotonic() >= self._end
