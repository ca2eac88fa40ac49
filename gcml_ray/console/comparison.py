"""What a person sees of federations that run side by side: one live table with a row each, a line where one ends.

What a cell says beyond that goes to its own ``log.txt``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from gcml_ray.config import Config
from gcml_ray.console.clock import Clock
from gcml_ray.console.live import LiveTable
from gcml_ray.console.run import round_line
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
from gcml_ray.wording import some

log = logging.getLogger(__name__)

MAX_TOLD = 4  # cells in a line


class CellsConsole(LiveTable):
    """Shows cells that run at the same time. A context: the live table is there inside it.

    Args:
        console: where to write; a live table only where it is a terminal.
        title: above the table.
    """

    def __init__(self, console: Console, *, title: str) -> None:
        super().__init__(console, refresh_per_second=2, get_table=self._table)
        self.title = title
        self.is_aborted = threading.Event()
        self._rows: list[CellRow] = []
        self._lock = threading.Lock()

    @contextmanager
    def row(self, title: str) -> Iterator[CellRow]:
        """A listener for one cell, whose row is in the table for the length of the block."""
        row = CellRow(title, say=self.say, beat=self._beat, is_aborted=self.is_aborted)
        with self._lock:
            self._rows.append(row)
        try:
            yield row
        finally:
            with self._lock:
                self._rows.remove(row)

    def abort(self) -> None:
        """Ends every cell now, at its next sign of life."""
        self.is_aborted.set()

    def say(self, line: str) -> None:
        """One line above the table."""
        self.print_line(line)

    def _beat(self) -> None:
        """A cell shows a sign of life."""
        self.break_silence(self._what_they_do)

    def _what_they_do(self) -> str:
        with self._lock:
            rows = list(self._rows)
        doing = [f"{row.title}: {row.now}, {row.clock.elapsed} gone" for row in rows]
        return some(doing, MAX_TOLD, between="; ")

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        table.add_column("cell", no_wrap=True)
        table.add_column("now", min_width=24, no_wrap=True)
        for heading in ("sites", "val Dice", "gone", "left"):
            table.add_column(heading, justify="right")
        with self._lock:
            rows = list(self._rows)
        for row in rows:
            table.add_row(row.title, row.now, str(row.num_sites), row.dice, row.clock.elapsed, row.left)
        return table


class CellRow:
    """One cell's row: a listener of its driver, in the driver's own thread.

    Args:
        title: the cell.
        say: shows one line.
        beat: is called at each sign of life.
        is_aborted: once set, the driver is interrupted as by Ctrl-C: that signal reaches the main thread alone.
    """

    def __init__(
        self, title: str, *, say: Callable[[str], None], beat: Callable[[], None], is_aborted: threading.Event
    ) -> None:
        self.title = title
        self.now = "starting"
        self.num_sites = 0
        self.dice = ""
        self.left = ""
        self.clock = Clock()
        self._say = say
        self._beat = beat
        self._is_aborted = is_aborted

    def on_connected(self, where: str) -> None:
        """All cells are on one cluster, and each one's log says which."""

    def on_start(self, config: Config, sites: Sequence[str]) -> None:
        """All sites begin to load."""
        self.config = config
        self.num_sites = len(sites)
        self._say(f"{self.title} begins")
        log.info("%s: %d sites, %d rounds", self.title, len(sites), config.federation.rounds)

    def on_site_ready(self, info: SiteInfo) -> None:
        """A site has loaded its data."""
        for note in info.notes:
            log.info("%s, %s: %s", self.title, info.site, note)

    def on_round_begin(self, plan: RoundPlan) -> None:
        """A round is planned."""
        federation, number = self.config.federation, plan.round_number
        where = f"round {number}/{federation.rounds}" if federation.mode == "sync" else f"record {number}"
        self.now = f"{where} {plan.phase}"
        self.num_sites = len(plan.sites)

    def on_status(self, statuses: Sequence[SiteStatus]) -> None:
        """About twice a second; the one place where a cell in another thread can be ended."""
        if any(status.stage == WAITS_FOR_ROOM for status in statuses):
            self.now = WAITS_FOR_ROOM
        self._beat()
        if self._is_aborted.is_set():
            raise KeyboardInterrupt

    def on_site_trained(self, report: TrainReport) -> None:
        """A site's round is over; the round's line says it."""

    def on_failure(self, failure: SiteFailure, decision: Any) -> None:
        """A site failed."""
        self.now = f"{failure.site} {failure.kind} -> {decision.value}"

    def on_round_end(self, record: RoundRecord) -> None:
        """A round is on disk: one line in the cell's log."""
        self.clock.add(record)
        self.left = self.clock.left(self.config, record.plan.round_number)
        if scores := record.validation_dice.values():
            self.dice = f"{mean(scores):.3f}"
        log.info("%s", round_line(self.config, record, left=self.left))

    def on_evaluated(self, report: EvaluationReport) -> None:
        """A site has scored a model."""
        self.now = f"testing: {report.site}, {report.model}"
