"""What a person sees of a search: a live table of trials on a terminal, lines elsewhere, a table at the end."""

from __future__ import annotations

import logging
import math
from statistics import fmean, stdev
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gcml_ray.search_records import FinalRecord, SearchRecord, TrialRecord, describe_params, format_value

log = logging.getLogger(__name__)

NUM_SHOWN = 20  # trials in the live table: those that run, and the newest others


class SearchConsole:
    """Shows one search. A context: the live table is there inside it.

    Args:
        console: where to.
        search: its name, objective and rounds; its trials are not used.
    """

    def __init__(self, console: Console, *, search: SearchRecord) -> None:
        self.console = console
        self.search = search
        self.trials: dict[int, TrialRecord] = {}
        self.live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> SearchConsole:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def on_trial(self, trial: TrialRecord) -> None:
        """A trial is new, has reached a new round, or has ended."""
        before = self.trials.get(trial.number)
        self.trials[trial.number] = trial
        if before is None or before.status != trial.status:
            self.say(self._line(trial))
        if self.live is not None:
            self.live.update(self._live_table())

    def say(self, line: str) -> None:
        """One line above the table, and in the log."""
        log.info("%s", line)
        self.console.print(line, highlight=False, markup=False)

    def _line(self, trial: TrialRecord) -> str:
        text = f"trial {trial.number} {trial.status}"
        if trial.status in ("waiting", "running"):
            return f"{text}: {describe_params(trial.params)}"
        if trial.status == "failed":
            return f"{text}: {trial.reason}"
        value = format_value(trial.value(self.search.objective))
        return f"{text} in round {trial.last_round}/{self.search.rounds}: {self.search.objective} {value}"

    def _live_table(self) -> Table:
        """The trials that run, then the newest others."""
        newest = sorted(self.trials.values(), key=lambda trial: (trial.status != "running", -trial.number))
        shown = sorted(newest[:NUM_SHOWN], key=lambda trial: trial.number)
        counts = {name: sum(trial.status == name for trial in self.trials.values()) for name in _STATUSES}
        title = f"{self.search.name}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return _table(title, shown, self.search)


_STATUSES = ("waiting", "running", "finished", "cut", "stopped", "failed")


def search_table(search: SearchRecord) -> Table:
    """All trials, the best first, then those that were cut, stopped and failed."""
    order = ["finished", "running", "cut", "stopped", "waiting", "failed"]

    def rank(trial: TrialRecord) -> tuple[int, float, int]:
        value = trial.value(search.objective)
        return order.index(trial.status), math.inf if math.isnan(value) else -value, trial.number

    title = f"{search.name}: {len(search.trials)} trials by validation {search.objective}"
    return _table(title, sorted(search.trials, key=rank), search)


def search_verdict(search: SearchRecord) -> str:
    """What came of it, in a few lines: the winner, what mattered, what failed."""
    lines = []
    best = search.best
    if best is None:
        lines.append("No trial finished: there is no best configuration.")
    else:
        value = format_value(best.value(search.objective))
        lines.append(
            f"best: trial {best.number}, validation {search.objective} {value}: {describe_params(best.params)}"
        )
    if search.objective == "dice_and_megabytes":
        front = ", ".join(str(trial.number) for trial in search.front)
        lines.append(f"not beaten in both Dice and megabytes: trials {front or 'none'}; best.yaml has the highest Dice")
    if search.importances:
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in search.importances.items())
        lines.append(f"what mattered (fANOVA): {shares}")
    for trial in search.trials:
        if trial.status == "failed":
            lines.append(f"trial {trial.number} failed: {trial.reason}")
    return "\n".join(lines)


def _table(title: str, trials: list[TrialRecord], search: SearchRecord) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("trial", justify="right")
    table.add_column("status", no_wrap=True)
    for heading in ("round", "mean Dice", "worst Dice", "MB sent"):
        table.add_column(heading, justify="right")
    if search.objective == "dice_per_megabyte":
        table.add_column("Dice per MB", justify="right")
    table.add_column("values", overflow="fold", ratio=1)
    best = search.best
    for trial in trials:
        cells = [str(trial.number), trial.status, f"{trial.last_round}/{search.rounds}"]
        cells += _scores(trial, search)
        cells.append(describe_params(trial.params))
        table.add_row(*cells, style="bold" if best is not None and best.number == trial.number else None)
    return table


def _scores(trial: TrialRecord, search: SearchRecord) -> list[str]:
    is_per_megabyte = search.objective == "dice_per_megabyte"
    if not trial.points:
        return ["-"] * (4 if is_per_megabyte else 3)
    point = trial.points[-1]
    cells = [f"{point.mean_dice:.3f}", f"{point.worst_dice:.3f}", f"{point.megabytes:.1f}"]
    return cells + ([f"{point.value('dice_per_megabyte'):.4f}"] if is_per_megabyte else [])


def final_table(final: FinalRecord) -> Table:
    """The winner's test Dice by seed and site, and over the seeds."""
    title = f"{final.name}: the winner, trained anew and tested once for each seed (test Dice)"
    table = Table(title=title, title_justify="left")
    table.add_column("seed", justify="right")
    sites = sorted(final.scores[0].site_dice)
    for heading in (*sites, "mean of sites", "worst site"):
        table.add_column(heading, justify="right")
    for score in final.scores:
        cells = [score.site_dice[site] for site in sites] + [score.mean_dice, score.worst_dice]
        table.add_row(str(score.seed), *(f"{cell:.3f}" for cell in cells))
    table.add_section()
    columns = [[score.site_dice[site] for score in final.scores] for site in sites]
    columns += [[score.mean_dice for score in final.scores], [score.worst_dice for score in final.scores]]
    table.add_row("mean ± sd", *(f"{fmean(column):.3f} ± {stdev(column):.3f}" for column in columns), style="bold")
    return table
