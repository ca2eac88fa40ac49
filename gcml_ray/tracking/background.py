"""A tracker that works in a thread of its own, so that no round waits for a database."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gcml_ray.config import Config
from gcml_ray.records import EvaluationReport, RoundRecord, RunOutcome, SiteInfo
from gcml_ray.tracking.run import Tracker

log = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 120.0


class BackgroundTracker:
    """Hands every call to another tracker, in order, in one thread; ``finish`` waits for all of them.

    Args:
        tracker: does the work.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")

    def start(self, config: Config, *, resume_run_id: str | None = None) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._submit(lambda: self._tracker.start(config, resume_run_id=resume_run_id))

    def log_sites(self, infos: Sequence[SiteInfo]) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._submit(lambda: self._tracker.log_sites(infos))

    def log_round(self, record: RoundRecord) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._submit(lambda: self._tracker.log_round(record))

    def log_scores(self, reports: Sequence[EvaluationReport]) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._submit(lambda: self._tracker.log_scores(reports))

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._submit(lambda: self._tracker.log_artifacts(paths))

    def log_model(self, site: str, path: Path) -> None:
        """See :class:`gcml_ray.tracking.run.Tracker`."""
        self._submit(lambda: self._tracker.log_model(site, path))

    def finish(self, status: RunOutcome) -> None:
        """Waits for everything that was handed over, for two minutes at most."""
        last = self._submit(lambda: self._tracker.finish(status))
        try:
            last.result(timeout=FINISH_TIMEOUT_S)
        except TimeoutError:
            log.warning("tracking is not done after %g s; the rest of it is given up", FINISH_TIMEOUT_S)
        except Exception:
            log.warning("tracking could not be finished", exc_info=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, call: Callable[[], None]) -> Future[None]:
        future = self._thread.submit(call)
        future.add_done_callback(_report)
        return future


def _report(future: Future[None]) -> None:
    """A tracker's own fault must neither stop training nor vanish."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.warning("tracking failed: %r", error)
