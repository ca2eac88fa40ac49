"""The test at the end of a run: every site scores its personalised model, and its own model before gossip.

All rounds are over, so no site is given up any more: one whose process is lost in the test is started anew from its
last checkpoint and asked once more; one that still gives no scores is named, and a resume tests it. A site that has
trained in no round, as one that joined too late, has no model of its own: it is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from actors.cross_site import score_across_sites
from actors.failure_policy import Decision
from actors.pace import CallKind
from gcml_ray.errors import NoModelError
from gcml_ray.gossip.phases import models_to_test
from gcml_ray.records import BEFORE_GOSSIP, PERSONALISED, EvaluationReport, SiteFailure, by_site

if TYPE_CHECKING:
    from actors.driver import Driver

log = logging.getLogger(__name__)


class FinalTest:
    """Asks every site for the scores of its test cases, into ``cases.csv`` and, where asked for, ``cross_site.csv``.

    Args:
        driver: has ended its rounds.

    Attributes:
        reports: what the sites have scored so far.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.roster = driver.roster
        self.reports: list[EvaluationReport] = []
        self._untested: dict[tuple[str, str], None] = {}
        self._not_across: list[str] = []
        self._lost: set[str] = set()

    @property
    def untested(self) -> tuple[str, ...]:
        """What has no scores, in words: ``SITE (MODEL)``, or of the cross-site test ``SITE's model at SITE``."""
        return (*(f"{site} ({model})" for site, model in self._untested), *self._not_across)

    def run(self, done: int) -> None:
        """Tests every model there is after ``done`` rounds."""
        config = self.driver.config
        self.roster.end_rounds()
        self._wait_for_absent()
        last_round = done if config.federation.mode == "sync" else None  # else it counts records
        models = models_to_test(config, last_round=last_round)
        self._untested = dict.fromkeys((site, model) for site in sorted(self.roster.members) for model in models)
        for model in models:
            if again := self._score(model, self.roster.present, is_last=False):
                self._wait_for_absent()
                self._score(model, again, is_last=True)
        self.driver.tracker.log_scores(self.reports)
        if config.evaluation.cross_site:
            own = tuple(each for each in self.reports if each.model == PERSONALISED)
            self._not_across = score_across_sites(self.driver, own)

    def _wait_for_absent(self) -> None:
        """Sites that are being started may take as long as at the start of the run; later ones are not asked."""
        federation = self.driver.config.federation
        away = self.roster.absent
        self.roster.wait_for_absent(federation.start_timeout_s, is_enough=self.driver.stop.is_set)
        lost = away - set(self.roster.take_returned())
        self._lost |= lost
        for name in sorted(lost - self.roster.dropped.keys()):
            self._give_up(SiteFailure(name, federation.rounds, "evaluate", "unreachable", "it has not come back"))

    def _score(self, model: str, names: Sequence[str], *, is_last: bool) -> list[str]:
        """Asks these sites at once.

        Returns:
            The sites to ask again: those whose process was lost, unless this ``is_last``.
        """
        federation = self.driver.config.federation
        kind, limit_s = CallKind(f"test {model}"), federation.round_timeout_s
        asked = [name for name in names if name not in self._lost]
        for name in asked:
            self.roster.submit(name, "evaluate", "test", model, number=federation.rounds, kind=kind, limit_s=limit_s)
        again: list[str] = []
        for outcome in self.roster.gather(asked, "evaluate"):
            if outcome.failure is None:
                self._keep(outcome.result)
            elif outcome.failure.kind == "raised" or is_last:
                self._give_up(outcome.failure)
                if (outcome.failure.error_type, model) == (NoModelError.__name__, BEFORE_GOSSIP):  # it came later
                    self._untested.pop((outcome.site, model), None)
            else:
                again.append(outcome.site)
                self.roster.handle(outcome.failure)
        return again

    def _keep(self, report: EvaluationReport) -> None:
        if self.driver.has_trained and (report.model, report.round_number) == (PERSONALISED, 0):
            self._untested = {key: None for key in self._untested if key[0] != report.site}
            self.roster.drop(report.site, "it has trained in no round, its model is the initial one")
            return
        self._untested.pop((report.site, report.model), None)
        self.reports.extend(by_site(report))
        self.driver.folder.write_cases(report.scores)

    def _give_up(self, failure: SiteFailure) -> None:
        log.warning("site %s was not evaluated: %s", failure.site, failure.words)
        self.driver.listener.on_failure(failure, Decision.SKIP)
