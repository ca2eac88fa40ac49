"""Every site's personalised model scored at every other site, after the test: the cross-site matrix.

One site after the other sends its model to all others, actor to actor as any push; these score it on their own test
cases at the same time. Through the driver go names and scores alone. A site that fails is left out of what follows.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.failure_policy import Decision
from actors.pace import CallKind
from actors.site_pool import Outcome
from gcml_ray.records import EvaluationReport

if TYPE_CHECKING:
    from actors.driver import Driver

log = logging.getLogger(__name__)


def score_across_sites(driver: Driver, own: tuple[EvaluationReport, ...]) -> None:
    """Fills ``cross_site.csv`` of the run folder: scores under the name of the site whose model it is.

    Args:
        driver: has just tested.
        own: what each site's personalised model scored at home.
    """
    rows = [replace(score, model=report.site) for report in own for score in report.scores]
    driver.folder.write_cross_site(rows)
    for owner in driver.roster.present:
        for report in _visit(driver, owner):
            rows += [replace(score, model=owner) for score in report.scores]
        driver.folder.write_cross_site(rows)


def _visit(driver: Driver, owner: str) -> list[EvaluationReport]:
    """What one site's model scores at the others."""
    others = tuple(name for name in driver.roster.present if name != owner)
    federation = driver.config.federation
    number, limit_s = federation.rounds, federation.round_timeout_s
    driver.roster.submit_sending(owner, "visit", others, number=number)
    receipts = [receipt for outcome in _answers(driver, (owner,), "visit") for receipt in outcome.result.receipts]
    driver.note_refusals(receipts)
    hosts = tuple(receipt.receiver for receipt in receipts if receipt.accepted)
    kind = CallKind("score_visitor")
    for name in hosts:
        driver.roster.submit(name, "score_visitor", owner, number=number, kind=kind, limit_s=limit_s)
    return [outcome.result for outcome in _answers(driver, hosts, "score_visitor")]


def _answers(driver: Driver, names: tuple[str, ...], stage: str) -> list[Outcome]:
    """The outcomes of a call to each of these sites; failures are said and left out."""
    outcomes = driver.roster.gather(names, stage, announces=False)
    for outcome in outcomes:
        if outcome.failure:
            log.warning("cross-site: %s of %s failed: %s", stage, outcome.site, outcome.failure.message)
            driver.listener.on_failure(outcome.failure, Decision.SKIP)
    return [outcome for outcome in outcomes if not outcome.failure]
