"""What a person sees of a search: a live table of trials on a terminal, lines elsewhere, a table at the end."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from gcml_ray.console.live import LiveTable
from gcml_ray.search.records import FinalRecord, SearchRecord, TrialRecord, describe_params, format_value
from gcml_ray.wording import count, some

log = logging.getLogger(__name__)

NUM_SHOWN = 20  # trials in the live table
LINES_AROUND = 8  # of the terminal: title, headings, borders, and what was said last
HEADINGS = ("round", "mean Dice", "worst Dice", "MB sent")
MAX_TOLD = 4  # trials in a line
NARROW = 110  # columns below which the live table leaves out what matters least


class SearchConsole(LiveTable):
    """Shows one search. A context: the live table is there inside it.

    Args:
        console: where to.
        search: its name, objective and rounds; its trials are not used.
    """

    def __init__(self, console: Console, *, search: SearchRecord) -> None:
        super().__init__(console, refresh_per_second=2)
        self.search = search
        self.trials: dict[int, TrialRecord] = {}

    def on_trial(self, trial: TrialRecord) -> None:
        """A trial is new, has reached a new round, or has ended."""
        before = self.trials.get(trial.number)
        self.trials[trial.number] = trial
        if before is None or before.status != trial.status:
            self.say(self._line(trial))
        self.break_silence(self._what_runs)
        self.show(self._live_table)

    def say(self, line: str) -> None:
        """One line above the table, and in the log."""
        log.info("%s", line)
        self.print_line(line)

    def _what_runs(self) -> str:
        rounds = self.search.rounds
        running = [trial for trial in self.trials.values() if trial.status == "running"]
        return some([f"trial {trial.number} in round {trial.last_round}/{rounds}" for trial in running], MAX_TOLD)

    def _line(self, trial: TrialRecord) -> str:
        text = f"trial {trial.number} {trial.status}"
        if trial.status in ("waiting", "running"):
            return f"{text}: {describe_params(trial.params)}"
        if trial.status == "failed":
            return f"{text}: {trial.reason}"
        value = format_value(trial.value(self.search.objective))
        return f"{text} in round {trial.last_round}/{self.search.rounds}: {self.search.objective} {value}"

    def _live_table(self) -> Table:
        """A line a trial, as many as the terminal is high: those that run, the best one, then the newest others."""
        search = replace(self.search, trials=tuple(self.trials.values()))
        best = 0 if search.best is None else search.best.number
        num_lines = max(1, min(NUM_SHOWN, self.console.height - LINES_AROUND))
        newest = sorted(search.trials, key=lambda each: (each.status != "running", each.number != best, -each.number))
        shown = sorted(newest[:num_lines], key=lambda trial: trial.number)
        counts = {name: sum(trial.status == name for trial in self.trials.values()) for name in _STATUSES}
        title = f"{self.search.name}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return _table(title, shown, search, width=self.console.width)


_STATUSES = ("waiting", "running", "finished", "cut", "stopped", "failed")


def search_table(search: SearchRecord) -> Table:
    """All trials, the best first, then those that were cut, stopped and failed."""
    order = ["finished", "running", "cut", "stopped", "waiting", "failed"]

    def rank(trial: TrialRecord) -> tuple[int, float, int]:
        value = trial.value(search.objective)
        return order.index(trial.status), math.inf if math.isnan(value) else -value, trial.number

    title = f"{search.name}: {count(len(search.trials), 'trial')} by validation {search.objective}"
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
    lines += _against_default(search)
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


def _against_default(search: SearchRecord) -> list[str]:
    """How the winner stands against the federation's own values, as far as validation with one seed can say."""
    own, best = search.default_trial, search.best
    if own is None or best is None or not own.points:
        return []
    if own.number == best.number:
        return [f"trial {own.number} had the federation's own values: no other one was better"]
    value = own.value(search.objective)
    if own.status != "finished":
        return [f"the federation's own values (trial {own.number}) were {own.status} in round {own.last_round}"]
    return [
        f"the federation's own values (trial {own.number}): {format_value(value)}, so "
        f"{best.value(search.objective) - value:+.4f} on validation, with one seed; a final test says whether it holds"
    ]


def _table(title: str, trials: list[TrialRecord], search: SearchRecord, *, width: int | None = None) -> Table:
    """A row a trial. With ``width``, in characters: one line a row, cut off at the end; if narrow, fewer columns."""
    is_narrow = width is not None and width < NARROW
    headings = ["trial", "status", "round", "mean Dice"] if is_narrow else ["trial", "status", *HEADINGS]
    if search.objective == "dice_per_megabyte" and not is_narrow:
        headings.append("Dice per MB")
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "status" else "right", no_wrap=True)
    table.add_column("values", overflow="fold", ratio=1)
    best, room = search.best, None
    if width is not None:  # three characters between columns, and the longest cells below the headings
        room = max(10, width - sum(max(len(heading), 8) + 3 for heading in headings) - 4)
    for trial in trials:
        cells = [str(trial.number), trial.status, f"{trial.last_round}/{search.rounds}", *_scores(trial, search)]
        values = describe_params(trial.params)
        is_cropped = room is not None and len(values) > room
        cells = [*cells[: len(headings)], f"{values[: (room or 0) - 1]}…" if is_cropped else values]
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
    """Test Dice by seed and site, and over the seeds, of the winner and of the federation's own values."""
    title = f"{final.name}: trained anew and tested once for each seed (test Dice)"
    table = Table(title=title, title_justify="left")
    table.add_column("values")
    table.add_column("seed", justify="right")
    sites = sorted(final.scores[0].site_dice)
    for heading in (*sites, "mean of sites", "worst site"):
        table.add_column(heading, justify="right")
    for name, scores in (("winner", final.scores), ("own", final.default_scores)):
        for score in scores:
            cells = [score.site_dice[site] for site in sites] + [score.mean_dice, score.worst_dice]
            table.add_row(name, str(score.seed), *(f"{cell:.3f}" for cell in cells))
        if scores:
            columns = [[score.site_dice[site] for score in scores] for site in sites]
            columns += [[score.mean_dice for score in scores], [score.worst_dice for score in scores]]
            cells_over = [f"{fmean(column):.3f} ± {stdev(column):.3f}" for column in columns]
            table.add_row(name, "all", *cells_over, style="bold")
            table.add_section()
    return table
