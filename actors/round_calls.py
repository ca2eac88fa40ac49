"""The order of calls in a round: with peers push, train; with a server train, push, mean, push, adopt.

With a server all sites train first; what each has learnt goes to the server, whose mean goes back to every
living site. A site that failed is left out of the mean and still takes part in what follows. Where the server
fails, the sites go on with their own weights. The driver itself holds no weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gcml_ray.config import SERVER
from gcml_ray.records import AdoptReport, Edge, PushReceipt, RoundPlan, SiteFailure, TrainOrder, TrainReport

if TYPE_CHECKING:
    from actors.driver import Driver


@dataclass(frozen=True)
class RoundWork:
    """What came of a round's calls, and the seconds they took by stage."""

    trained: tuple[TrainReport, ...]
    pushes: tuple[PushReceipt, ...]
    seconds: dict[str, float]


def peer_round(driver: Driver, plan: RoundPlan, order: TrainOrder, failures: list[SiteFailure]) -> RoundWork:
    """One round without a server: sites push to each other, if at all, then train; see :func:`server_round`."""
    began = time.perf_counter()
    pushes = driver.push(plan.edges, plan.round_number, failures)
    pushed = time.perf_counter()
    trained = driver.train(plan.sites, order, failures, ends_round=True)
    return RoundWork(trained, pushes, {"push": pushed - began, "train": time.perf_counter() - pushed})


def server_round(driver: Driver, plan: RoundPlan, order: TrainOrder, failures: list[SiteFailure]) -> RoundWork:
    """One round with a server.

    Args:
        driver: asks sites and server, and deals with those that fail.
        plan: the sites.
        order: sites validate and write their checkpoint as it says, but after the exchange.
        failures: gets what went wrong.
    """
    began = time.perf_counter()
    trained = driver.train(plan.sites, replace(order, evaluate=False, checkpoint=False), failures, ends_round=False)
    ended = time.perf_counter()
    pushes: tuple[PushReceipt, ...] = ()
    if trained:
        pushes += driver.push([Edge(report.site, SERVER) for report in trained], order.round_number, failures)
        if driver.form_mean(order, failures):
            pushes += driver.push([Edge(SERVER, site) for site in driver.sites], order.round_number, failures)
    exchanged = time.perf_counter()
    adopted = driver.adopt(order, failures)
    reports = tuple(_ended(report, adopted.get(report.site)) for report in trained)
    for report in reports:
        driver.listener.on_site_trained(report)
    seconds = {"train": ended - began, "push": exchanged - ended, "adopt": time.perf_counter() - exchanged}
    return RoundWork(reports, pushes, seconds)


def _ended(report: TrainReport, adopted: AdoptReport | None) -> TrainReport:
    """A site's report with what followed its training."""
    if adopted is None:
        return report
    stages = {*report.seconds, *adopted.seconds}
    return replace(
        report,
        peers=(SERVER,) if adopted.has_adopted else (),
        merge="server" if adopted.has_adopted else "",
        validation_dice=adopted.validation_dice,
        is_best=adopted.is_best,
        seconds={stage: report.seconds.get(stage, 0.0) + adopted.seconds.get(stage, 0.0) for stage in sorted(stages)},
        peak_memory_bytes=max(report.peak_memory_bytes, adopted.peak_memory_bytes),
    )
