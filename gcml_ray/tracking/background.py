"""A tracker that works in a thread of its own, so that no round waits for a database."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.records import EvaluationReport, RoundRecord, RunOutcome, SiteInfo
from gcml_ray.tracking.client import reason
from gcml_ray.tracking.run import Tracker

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 120.0
SILENT_TIMEOUT_S = 15.0  # where nothing has ever arrived
QUIET_S = 3.0  # from then on it is said what is waited for


class BackgroundTracker:
    """Hands every call to another tracker, in order, in one thread; ``finish`` waits for all of them.

    Args:
        tracker: does the work.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_given_up = False
        # a daemon: what was given up must not keep the process from ending, as long as a server may take
        name = f"{threading.current_thread().name}-tracking"  # of whose run it is, for the run's log
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def is_unreachable(self) -> bool:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        return self._tracker.is_unreachable

    def start(self, config: Config) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._calls.put(lambda: self._tracker.start(config))

    def log_sites(self, infos: Sequence[SiteInfo]) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._calls.put(lambda: self._tracker.log_sites(infos))

    def log_round(self, record: RoundRecord) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._calls.put(lambda: self._tracker.log_round(record))

    def log_scores(self, reports: Sequence[EvaluationReport]) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._calls.put(lambda: self._tracker.log_scores(reports))

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._calls.put(lambda: self._tracker.log_artifacts(paths))

    def log_model(self, site: str, path: Path) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._calls.put(lambda: self._tracker.log_model(site, path))

    def finish(self, status: RunOutcome) -> None:
        """Waits for everything that was handed over: two minutes at most, and not as long if MLflow never answered."""
        self._calls.put(lambda: self._tracker.finish(status))
        self._calls.put(None)
        began = time.monotonic()
        with suppress(KeyboardInterrupt):  # what was tracked is on disk too: whoever presses Ctrl-C wants no more of it
            self._thread.join(QUIET_S)
            if self._thread.is_alive():  # only now is it known whether the first call has failed
                timeout_s = SILENT_TIMEOUT_S if self.is_unreachable else FINISH_TIMEOUT_S
                log.warning("waiting for tracking (MLflow) to take what is left, at most %g s", timeout_s)
                self._thread.join(max(0.0, timeout_s - QUIET_S))
        if self._thread.is_alive():
            self._is_given_up = True
            waited_s = round(time.monotonic() - began, 1)
            log.warning("tracking is not done after %g s; the rest of it is given up", waited_s)

    def _work(self) -> None:
        """Does what was handed over. A tracker's own fault must neither stop training nor vanish."""
        while (call := self._calls.get()) is not None and not self._is_given_up:
            try:
                call()
            except Exception as error:
                log.warning("tracking failed: %s", reason(error))
