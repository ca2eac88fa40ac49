"""Who watches a run: the driver tells a listener what happens, as it happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from actors.failure_policy import Decision
from gcml_ray.config import SERVER, Config
from gcml_ray.records import (
    EvaluationReport,
    RoundPlan,
    RoundRecord,
    SiteFailure,
    SiteInfo,
    SiteStatus,
    TrainReport,
    by_site,
)


class Listener(Protocol):
    """Who watches a run; see ``gcml_ray/console/run.py``. Called from the driver's thread."""

    def on_connected(self, where: str) -> None:
        """The run has found the place where its sites will live, in words."""

    def on_start(self, config: Config, sites: Sequence[str]) -> None:
        """The sites are about to load their data."""

    def on_site_ready(self, info: SiteInfo) -> None:
        """A site is ready to train."""

    def on_round_begin(self, plan: RoundPlan) -> None:
        """A round begins."""

    def on_status(self, statuses: Sequence[SiteStatus]) -> None:
        """What the sites are doing, about twice a second; of n > 20 sites every n / 40 seconds."""

    def on_site_trained(self, report: TrainReport) -> None:
        """A site has finished its round."""

    def on_failure(self, failure: SiteFailure, decision: Decision) -> None:
        """A site failed, and this is what is done about it."""

    def on_round_end(self, record: RoundRecord) -> None:
        """A round is over and on disk."""

    def on_evaluated(self, report: EvaluationReport) -> None:
        """A site has scored a model on its test cases."""


class NullListener:
    """Ignores every event; also the base class of listeners for a few of them."""

    def on_connected(self, where: str) -> None:
        """Nothing to do."""

    def on_start(self, config: Config, sites: Sequence[str]) -> None:
        """Nothing to do."""

    def on_site_ready(self, info: SiteInfo) -> None:
        """Nothing to do."""

    def on_round_begin(self, plan: RoundPlan) -> None:
        """Nothing to do."""

    def on_status(self, statuses: Sequence[SiteStatus]) -> None:
        """Nothing to do."""

    def on_site_trained(self, report: TrainReport) -> None:
        """Nothing to do."""

    def on_failure(self, failure: SiteFailure, decision: Decision) -> None:
        """Nothing to do."""

    def on_round_end(self, record: RoundRecord) -> None:
        """Nothing to do."""

    def on_evaluated(self, report: EvaluationReport) -> None:
        """Nothing to do."""


def announce(listener: Listener, result: Any) -> None:
    """Tells of what a site, not a server, has answered, as soon as it is there."""
    if isinstance(result, SiteInfo) and result.site != SERVER:
        listener.on_site_ready(result)
    elif isinstance(result, TrainReport) and result.site != SERVER:
        listener.on_site_trained(result)
    elif isinstance(result, EvaluationReport):
        for report in by_site(result):
            listener.on_evaluated(report)
