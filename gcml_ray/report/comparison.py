"""Plots of a comparison: Dice against bytes, Dice by site, validation Dice by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from gcml_ray.comparison.cells import MethodRow
from gcml_ray.comparison.table import label
from gcml_ray.records import RoundRecord
from gcml_ray.report.axes import COLOURS, STYLES, figure_with_axes, save_figure


def plot_dice_against_bytes(rows: Sequence[MethodRow], path: Path) -> None:
    """Each method's mean test Dice against what it sent; methods that send nothing stand at the left edge."""
    figure, axes = figure_with_axes(8, 4.8)
    sent = [row.sent_bytes / 1e6 for row in rows]
    positive = [value for value in sent if value > 0]
    places = [max(value, min(positive, default=3.0) / 3) for value in sent]
    heights = _apart([row.dice for row in rows], places)
    for index, (row, place, height) in enumerate(zip(rows, places, heights, strict=True)):
        error = row.dice_sd if row.num_seeds > 1 else 0.0
        axes.errorbar(place, row.dice, yerr=error, fmt="o", color=COLOURS[index % len(COLOURS)], capsize=3)
        axes.annotate(label(row), (place, height), xytext=(7, -3), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    ticks = sorted({round(value, 1) for value in positive})
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_xlabel("MB sent in the whole run (left edge: nothing)")
    axes.set_ylabel("mean test Dice over sites")
    save_figure(figure, path, dpi=150)


def _apart(values: Sequence[float], places: Sequence[float]) -> list[float]:
    """Heights for labels beside their marks: below each other where marks of one place lie too close."""
    gap = 0.035 * (max(values) - min(values))
    heights = list(values)
    for place in set(places):
        above = float("inf")
        for index in sorted((i for i, own in enumerate(places) if own == place), key=lambda i: -values[i]):
            heights[index] = above = min(values[index], above - gap)
    return heights


def plot_site_dice(rows: Sequence[MethodRow], path: Path) -> None:
    """Test Dice by site, one mark a method."""
    sites = list(rows[0].site_dice)
    figure, axes = figure_with_axes(max(6.0, 1.8 * len(sites) + 3), 4.8)
    for index, row in enumerate(rows):
        offset = (index - (len(rows) - 1) / 2) * 0.7 / len(rows)
        places = [place + offset for place in range(len(sites))]
        marker = "osD^vP*X"[index % 8]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(places, [row.site_dice[site] for site in sites], marker, color=colour, label=label(row))
    axes.set_xticks(range(len(sites)), sites)
    axes.set_ylabel("test Dice")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    save_figure(figure, path, dpi=150)


def plot_dice_by_round(runs: Mapping[str, Sequence[Sequence[RoundRecord]]], path: Path) -> None:
    """Validation Dice by round, mean over sites and seeds: whether every method has converged.

    Args:
        runs: for each method the rounds of each of its seeds.
        path: the picture.
    """
    figure, axes = figure_with_axes(8, 4.8)
    for index, (method, seeds) in enumerate(runs.items()):
        by_round: dict[int, list[float]] = {}
        for record in (record for rounds in seeds for record in rounds):
            scores = [report.validation_dice for report in record.trained if report.validation_dice is not None]
            if scores:
                by_round.setdefault(record.plan.round_number, []).append(sum(scores) / len(scores))
        numbers = sorted(by_round)
        values = [sum(by_round[number]) / len(by_round[number]) for number in numbers]
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        axes.plot(numbers, values, color=COLOURS[index % len(COLOURS)], linestyle=style, label=method)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel("validation Dice, mean over sites and seeds")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    save_figure(figure, path, dpi=150)
