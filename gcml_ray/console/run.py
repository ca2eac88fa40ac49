"""What a person sees of a run: a live table of sites on a terminal, plain lines elsewhere and in the log.

Both are listeners of the driver. Every round leaves one line that says who trained, who did not and why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gcml_ray.config import Config
from gcml_ray.console.clock import Clock
from gcml_ray.console.live import LiveTable
from gcml_ray.prediction.averages import mean
from gcml_ray.records import (
    WAITS_FOR_ROOM,
    EvaluationReport,
    RoundPlan,
    RoundRecord,
    SiteFailure,
    SiteInfo,
    SiteStatus,
    TrainReport,
)
from gcml_ray.wording import NO_PROCESS, count, some

log = logging.getLogger(__name__)

MAX_TOLD = 8  # sites in a line
PATIENCE_S = 15.0  # before a person is told that sites wait for room: a busy machine may take so long by itself


@dataclass
class SiteRow:
    """What the table shows of one site."""

    cases: str = ""
    stage: str = "starting"
    loss: float | None = None
    validation_dice: float | None = None
    best_dice: float | None = None
    learnt_from: str = ""
    sent_bytes: int = 0
    received_bytes: int = 0
    epsilon: float | None = None
    has_stopped: bool = False


class RunConsole(LiveTable):
    """Shows one run. A context: the live table is there inside it.

    Args:
        console: where to write; a live table only where it is a terminal.
        title: what the run is called.
    """

    def __init__(self, console: Console, *, title: str) -> None:
        super().__init__(console, refresh_per_second=4)
        self.title = title
        self.rows: dict[str, SiteRow] = {}
        self.clock = Clock()
        self.round_line = "starting"
        self.asked_at = 0.0
        self.has_told_who_waits = False

    def say(self, line: str) -> None:
        """One line above the table, and in the log."""
        log.info("%s", line)
        self.print_line(line)

    # --- the driver's events -----------------------------------------------------------------

    def on_connected(self, where: str) -> None:
        """Which cluster it is; the log says it anyway."""
        self.print_line(f"{self.title}: running on {where}")

    def on_start(self, config: Config, sites: Sequence[str]) -> None:
        """All sites begin to load."""
        self.config = config
        self.asked_at = time.monotonic()
        self.rows = {site: SiteRow() for site in sites}
        size = f"{count(len(sites), 'site')}, {count(config.federation.rounds, 'round')}"
        self.say(f"{self.title}: {size}, method {config.method.name}")
        if config.chaos:
            self.say(f"  faults on purpose, what this run gives is no result: {config.chaos}")
        self._refresh()

    def on_site_ready(self, info: SiteInfo) -> None:
        """A site has loaded its data."""
        row = self.rows.setdefault(info.site, SiteRow())
        row.cases = f"{info.num_train}/{info.num_validation}/{info.num_test}"
        row.stage = "ready"
        restored = f", restored at round {info.restored_round}" if info.restored_round else ""
        self.say(
            f"  {info.site}: {row.cases} training/validation/test cases, {info.num_parameters:,} parameters "
            f"on {info.device}, ready in {info.seconds:.1f} s{restored}"
        )
        for note in info.notes:
            self.say(f"    note: {note}")
        self._refresh()

    def on_round_begin(self, plan: RoundPlan) -> None:
        """A round is planned."""
        what = "round" if self.config.federation.mode == "sync" else "record"
        self.round_line = f"{what} {plan.round_number}"
        if self.config.federation.mode == "sync":
            self.round_line += f" of {self.config.federation.rounds}"
        for site in plan.sites:
            self.rows[site].learnt_from = ""
        for edge in plan.edges:
            if edge.receiver not in self.rows:  # a server
                continue
            before = self.rows[edge.receiver].learnt_from
            self.rows[edge.receiver].learnt_from = f"{before}, {edge.sender}" if before else edge.sender
        self._refresh()

    def on_status(self, statuses: Sequence[SiteStatus]) -> None:
        """What the sites are doing now."""
        self._tell_who_waits([status.site for status in statuses if status.stage == WAITS_FOR_ROOM])
        for status in statuses:
            if status.site in self.rows:
                steps = f" {status.step}/{status.num_steps}" if status.num_steps > 1 else ""
                own = f"r{status.round_number} " if self.config.federation.mode == "async" else ""
                self.rows[status.site].stage = f"{own}{status.stage}{steps}"
        self.break_silence(self._what_they_do)
        self._refresh()

    def _what_they_do(self) -> str:
        doing = [f"{site} {row.stage}" for site, row in sorted(self.rows.items())]
        return f"{self.round_line}, {self.clock.elapsed} gone: {some(doing, MAX_TOLD)}"

    def _tell_who_waits(self, sites: Sequence[str]) -> None:
        """Says once whom the cluster has had no room for all the time since the start."""
        if sites and not self.has_told_who_waits and time.monotonic() - self.asked_at > PATIENCE_S:
            self.has_told_who_waits = True
            self.say(f"  {', '.join(sorted(sites))}: {NO_PROCESS}. Waiting")

    def on_site_trained(self, report: TrainReport) -> None:
        """A site's round is over."""
        row = self.rows[report.site]
        row.stage = "trained"
        if report.num_steps == 0 and report.privacy_epsilon is not None:
            row.stage = "epsilon limit"
            if not row.has_stopped:
                self.say(f"  ! {report.site} trains no more: epsilon {report.privacy_epsilon:.2f} is at its limit")
            row.has_stopped = True
        row.epsilon = report.privacy_epsilon
        row.loss = report.losses.get("segmentation")
        row.learnt_from = ", ".join(report.peers)
        if report.validation_dice is not None:
            row.validation_dice = report.validation_dice
            if report.is_best:
                row.best_dice = report.validation_dice
        self._refresh()

    def on_failure(self, failure: SiteFailure, decision: Any) -> None:
        """A site failed."""
        what = f"{failure.stage} {failure.kind}: {failure.words} -> {decision.value}"
        if failure.site in self.rows:  # else it is the server
            self.rows[failure.site].stage = f"{failure.kind} -> {decision.value}"
        self.say(f"  ! {failure.site}: {what}")
        self._refresh()

    def on_round_end(self, record: RoundRecord) -> None:
        """A round is on disk: one line."""
        self.clock.add(record)
        for receipt in record.pushes:
            if receipt.sender in self.rows:
                self.rows[receipt.sender].sent_bytes += receipt.size_bytes
            if receipt.accepted and receipt.receiver in self.rows:
                self.rows[receipt.receiver].received_bytes += receipt.size_bytes
            if not receipt.accepted:
                self.say(f"  ! {receipt.receiver} refused {receipt.sender}'s push: {receipt.reason}")
        self.say(round_line(self.config, record, left=self.clock.left(self.config, record.plan.round_number)))
        self._refresh()

    def on_evaluated(self, report: EvaluationReport) -> None:
        """A site has scored a model."""
        if report.site in self.rows:
            self.rows[report.site].stage = "tested"
        self.round_line = "testing"
        self._refresh()

    # --- the table ---------------------------------------------------------------------------

    def _refresh(self) -> None:
        self.show(self._table)

    def _table(self) -> Table:
        """Sites as rows."""
        title = f"{self.title}: {self.round_line}, {self.clock.elapsed} gone"
        # Few lines between columns: numbers have to be whole in 80 columns.
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.add_column("site", overflow="fold")
        table.add_column("cases", justify="right", min_width=7)
        table.add_column("stage", min_width=10, no_wrap=True)
        table.add_column("learns from", overflow="fold")
        has_epsilon = any(row.epsilon is not None for row in self.rows.values())
        for heading in ("loss", "val Dice", "best", "sent MB", "recv MB", *(("epsilon",) if has_epsilon else ())):
            table.add_column(heading, justify="right", min_width=5)
        for site, row in sorted(self.rows.items()):
            table.add_row(
                site,
                row.cases,
                row.stage,
                row.learnt_from,
                _number(row.loss),
                _number(row.validation_dice),
                _number(row.best_dice),
                f"{row.sent_bytes / 1e6:.1f}",
                f"{row.received_bytes / 1e6:.1f}",
                *([_number(row.epsilon)] if has_epsilon else ()),
            )
        return table


def round_line(config: Config, record: RoundRecord, *, left: str) -> str:
    """One round in one line: phase, time, who trained, mean Dice, traffic, who was skipped and why."""
    plan = record.plan
    names = [report.site for report in record.trained]
    reasons = record.left_out | dict.fromkeys(record.late, "late")
    reasons |= {failure.site: f"{failure.stage} {failure.kind}" for failure in record.failures}
    phase = "alone" if config.method.name in ("local", "pooled") else plan.phase
    is_async = config.federation.mode == "async"
    is_whole = not (is_async or record.skipped) and len(names) == len(plan.sites) > 2
    who = f"trained all {len(names)}" if is_whole else f"trained {', '.join(names) or 'nobody'}"
    if record.skipped:
        who += "; skipped " + ", ".join(f"{site} ({reasons.get(site, 'unknown')})" for site in record.skipped)
    scores = record.validation_dice.values()
    dice = f"val Dice {mean(scores):.3f}" if scores else "not validated"
    taken = [receipt for receipt in record.pushes if receipt.accepted]
    num_pushes = len(record.pushes if is_async else plan.edges)  # without a barrier a push may end in a later record
    traffic = f"{len(taken)}/{count(num_pushes, 'push', 'pushes')}, {sum(r.size_bytes for r in taken) / 1e6:.1f} MB"
    exchanged = traffic if num_pushes else "no pushes"
    number = f"round {plan.round_number}/{config.federation.rounds}"
    if is_async:
        own = [report.round_number for report in record.trained] or [0]
        span = f"{min(own)}" if min(own) == max(own) else f"{min(own)}-{max(own)}"
        number = f"record {plan.round_number}: rounds {span}/{config.federation.rounds}"
    return f"{number} {phase:8s} {record.seconds:5.1f} s  {dice}  {exchanged}  {who}  (left {left})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
