"""Every site's personalised model scored at every other site, after the test: the cross-site matrix.

One site after the other sends its model to all others, actor to actor as any push; these score it on their own test
cases at the same time. Through the driver go names and scores alone. A site whose process is lost meanwhile is started
again and left out until it is back; what is missing at the end of a pass is asked for once more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from actors.failure_policy import Decision
from actors.pace import CallKind
from actors.site_pool import Outcome
from gcml_ray.records import EvaluationReport

if TYPE_CHECKING:
    from actors.driver import Driver

log = logging.getLogger(__name__)


def score_across_sites(driver: Driver, own: tuple[EvaluationReport, ...]) -> list[str]:
    """Fills ``cross_site.csv`` of the run folder: scores under the name of the site whose model it is.

    Args:
        driver: has just tested.
        own: what each site's personalised model scored at home.

    Returns:
        What is missing, in words.
    """
    rows = [replace(score, model=report.site) for report in own for score in report.scores]
    driver.folder.write_cross_site(rows)
    names = driver.roster.present
    missing = {owner: [name for name in names if name != owner] for owner in names}
    for is_last in (False, True):
        for owner, others in missing.items():
            reports = _visit(driver, owner, others)
            missing[owner] = sorted(set(others) - {report.site for report in reports})
            rows += [replace(score, model=owner) for report in reports for score in report.scores]
            driver.folder.write_cross_site(rows)
        if is_last or not any(missing.values()):
            break
        driver.roster.wait_for_absent(driver.config.federation.start_timeout_s, is_enough=driver.stop.is_set)
    return [f"{owner}'s model at {name}" for owner, others in missing.items() for name in others]


def _visit(driver: Driver, owner: str, others: Sequence[str]) -> list[EvaluationReport]:
    """What one site's model scores at these others, as far as all of them are there."""
    present = driver.roster.present
    others = tuple(name for name in others if name in present)
    if owner not in present or not others:
        return []
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
    for failure in [outcome.failure for outcome in outcomes if outcome.failure]:
        if failure.kind == "raised":
            log.warning("cross-site: %s of %s failed: %s", stage, failure.site, failure.words)
            driver.listener.on_failure(failure, Decision.SKIP)
        else:
            driver.roster.handle(failure)
    return [outcome for outcome in outcomes if not outcome.failure]
