"""Plots of a search: objective by trial, what mattered, and the learning curves with the scheduler's cuts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gcml_ray.errors import DataError
from gcml_ray.report.axes import COLOURS, figure_with_axes, save_figure
from gcml_ray.report.words import ENDINGS, OBJECTIVES
from gcml_ray.search.records import SearchRecord, TrialRecord, TrialStatus

# Colour and marker of each way in which a trial ends; shapes tell them apart without colour too.
LOOKS: dict[TrialStatus, tuple[str, str]] = {
    "finished": (COLOURS[0], "o"),
    "cut": (COLOURS[1], "X"),
    "stopped": (COLOURS[4], "s"),
    "running": (COLOURS[2], "^"),
    "waiting": ("0.6", "."),
    "failed": ("0.4", "v"),
}


def write_search_plots(search: SearchRecord, folder: Path) -> tuple[Path, ...]:
    """Draws every plot that the search has data for into a folder; returns the files."""
    plots: dict[str, Callable[[SearchRecord], Figure]] = {
        "objective_by_trial.png": plot_objective,
        "importance.png": plot_importance,
        "learning_curves.png": plot_curves,
        "dice_by_traffic.png": plot_traffic,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in plots.items():
        try:
            figure = plot(search)
        except DataError:
            continue
        save_figure(figure, folder / name, dpi=150)
        written.append(folder / name)
    return tuple(written)


def plot_objective(search: SearchRecord) -> Figure:
    """Objective of every trial by its number, and the best finished one so far as a line.

    Raises:
        DataError: no trial was evaluated.
    """
    trials = _evaluated(search)
    figure, axes = figure_with_axes(7.5, 4.5)
    for status, (colour, marker) in LOOKS.items():
        own = [trial for trial in trials if trial.status == status]
        if own:
            values = [trial.value(search.objective) for trial in own]
            numbers = [trial.number for trial in own]
            axes.scatter(numbers, values, color=colour, marker=marker, s=36, label=ENDINGS[status], zorder=3)
    finished = [trial for trial in trials if trial.status == "finished"]
    if finished:
        best = list(accumulate((trial.value(search.objective) for trial in finished), max))
        axes.step([trial.number for trial in finished], best, where="post", color="0.5", lw=1.2, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(OBJECTIVES[search.objective])
    axes.set_title(f"{search.name}: objective by trial", loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure


def plot_importance(search: SearchRecord) -> Figure:
    """Share of the objective's variance that each searched key explains.

    Raises:
        DataError: it is not known.
    """
    if not search.importances:
        raise DataError(f"{search.name}: too few trials to say what mattered")
    shares = sorted(search.importances.items(), key=lambda item: item[1])
    figure, axes = figure_with_axes(7.5, max(2.2, 1.2 + 0.4 * len(shares)))
    bars = axes.barh([key for key, _ in shares], [share for _, share in shares], color=COLOURS[0], height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.grid(visible=False)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("share of the objective's variance (fANOVA)")
    axes.set_title(f"{search.name}: what mattered", loc="left")
    return figure


def plot_curves(search: SearchRecord) -> Figure:
    """The objective of every trial by round; a cross where the scheduler cut it, the best one drawn thick.

    Raises:
        DataError: no trial was evaluated.
    """
    trials, best = _evaluated(search), search.best
    figure, axes = figure_with_axes(7.5, 4.5)
    named: set[str] = set()
    for trial in trials:
        is_best = best is not None and trial.number == best.number
        colour, marker = LOOKS[trial.status]
        words = ENDINGS[trial.status]
        rounds = [point.round_number for point in trial.points]
        values = [point.value(search.objective) for point in trial.points]
        name = f"best: trial {trial.number}" if is_best else "" if words in named else words
        if not is_best:
            named.add(words)
        width, alpha = (2.4, 1.0) if is_best else (1.0, 0.7)
        look: dict[str, Any] = {"lw": width, "alpha": alpha, "marker": marker, "ms": 6, "markevery": [-1]}
        axes.plot(rounds, values, color="black" if is_best else colour, label=name, **look)
    axes.set_xlim(left=0, right=search.rounds + 0.5)
    axes.set_xlabel("round")
    axes.set_ylabel(OBJECTIVES[search.objective])
    axes.set_title(f"{search.name}: learning curves", loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure


def plot_traffic(search: SearchRecord) -> Figure:
    """Dice of every finished trial against its traffic in MB; a line joins the Pareto front.

    Raises:
        DataError: no trial finished.
    """
    finished = [trial for trial in search.trials if trial.status == "finished" and trial.points]
    if not finished:
        raise DataError(f"{search.name}: no trial finished")
    figure, axes = figure_with_axes(7.5, 4.5)
    for trial in finished:
        axes.plot(trial.points[-1].megabytes, trial.points[-1].mean_dice, "o", color=COLOURS[0], ms=6)
    front = sorted((trial.points[-1].megabytes, trial.points[-1].mean_dice, trial.number) for trial in search.front)
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="0.5", lw=1.2, zorder=0, label="Pareto front")
    for x, y, number in front:
        axes.annotate(f"trial {number}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set_xlabel("megabytes sent by all sites")
    axes.set_ylabel(OBJECTIVES["mean_dice"])
    axes.set_title(f"{search.name}: Dice by traffic", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _evaluated(search: SearchRecord) -> list[TrialRecord]:
    trials = [trial for trial in search.trials if trial.points]
    if not trials:
        raise DataError(f"{search.name}: no trial was evaluated yet, nothing to plot")
    return trials
