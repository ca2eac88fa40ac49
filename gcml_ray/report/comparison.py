"""Plots of a comparison: Dice against bytes, Dice by site, validation Dice by round."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gcml_ray.comparison.cells import MethodRow
from gcml_ray.comparison.config import ComparisonConfig, cell_name
from gcml_ray.comparison.output import cell_file
from gcml_ray.comparison.table import label
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import PERSONALISED, RoundRecord
from gcml_ray.report.axes import COLOURS, STYLES, figure_with_axes, save_figure
from gcml_ray.report.cross_site import plot_cross_site_by_method
from gcml_ray.report.teaching import plot_gains_by_method

MARKERS = "osD^vP*X"
LEAST_SPAN = 0.02  # of Dice along an axis: less would make nothing look like much
NEARLY = 1.05  # a ratio that cannot be seen along the axis of bytes


def draw_plots(comparison: ComparisonConfig, rows: tuple[MethodRow, ...]) -> tuple[Path, ...]:
    """All plots that there is something for, into ``output``."""
    if not rows:
        return ()
    folder = Path(comparison.output)
    folders = _folders(comparison)
    rounds = {method: [one.rounds() for one in own] for method, own in folders.items()}
    runs = {method: seeds for method, seeds in rounds.items() if any(seeds)}
    plot_dice_against_bytes(rows, folder / "dice_against_bytes.png")
    plot_site_dice(rows, folder / "dice_by_site.png")
    if runs:
        plot_dice_by_round(runs, rows, folder / "dice_by_round.png")
    plot_gains_by_method(runs, folder / "who_taught_whom.png")
    cross_site = {method: [one.cross_site() for one in own] for method, own in folders.items()}
    plot_cross_site_by_method(cross_site, folder / "cross_site.png")
    return tuple(sorted(folder.glob("*.png")))


def _folders(comparison: ComparisonConfig) -> dict[str, list[RunFolder]]:
    """The run folders of each method's finished seeds, as far as they are here."""
    return {
        method: [
            RunFolder(Path(comparison.output) / cell_name(method, seed))
            for seed in comparison.seeds
            if cell_file(comparison, method, seed).exists()
        ]
        for method in comparison.methods
    }


def plot_dice_against_bytes(rows: Sequence[MethodRow], path: Path) -> None:
    """Each method's mean test Dice against what it sent; methods that send nothing stand at 0, left of all.

    Those that send nearly the same stand side by side, at one tick.
    """
    figure, axes = _figure(rows, 8.5)
    sent = [row.sent_bytes / 1e6 for row in rows]
    positive = [value for value in sent if value > 0]
    left_edge = min(positive, default=3.0) / 3
    places = _side_by_side([max(value, left_edge) for value in sent])
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        error = row.dice_sd if row.num_seeds > 1 else 0.0
        axes.errorbar(place, row.dice, yerr=error, capsize=3, elinewidth=0.8, label=label(row), **_look(index))
    axes.set_xscale("log")
    ticks = [_middle([positive[index] for index in group]) for group in _nearly_equal(positive)]
    names = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in ticks]
    nothing = [left_edge] if min(sent) == 0 else []
    axes.set_xticks([*nothing, *ticks], ["0", *names] if nothing else names)
    axes.minorticks_off()
    axes.margins(x=0.12)
    _widen(axes)
    axes.set_xlabel("MB sent in the whole run (logarithmic)")
    axes.set_ylabel("mean test Dice over sites")
    _add_legend(axes)
    save_figure(figure, path, dpi=150)


def _widen(axes: Axes) -> None:
    """Gives the axis of Dice at least :data:`LEAST_SPAN`."""
    low, high = axes.get_ylim()
    missing = max(0.0, LEAST_SPAN - (high - low))
    axes.set_ylim(low - missing / 2, high + missing / 2)


def _side_by_side(places: Sequence[float]) -> list[float]:
    """Places along a logarithmic axis, so far apart that marks of nearly one value can be told from each other."""
    groups = _nearly_equal(places)
    step = max(places) / min(places) if len(groups) > 1 else 10.0
    apart = list(places)
    for group in groups:
        middle = _middle([places[index] for index in group])
        for position, index in enumerate(group):
            apart[index] = middle * step ** (0.014 * (position - (len(group) - 1) / 2))
    return apart


def _nearly_equal(values: Sequence[float]) -> list[list[int]]:
    """Which values differ so little that they share a place; from the smallest, and in their order."""
    groups: list[list[int]] = []
    for index in sorted(range(len(values)), key=values.__getitem__):
        if groups and values[index] <= NEARLY * values[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [sorted(group) for group in groups]


def _middle(values: Sequence[float]) -> float:
    """Half way between the smallest and the largest on a logarithmic axis."""
    return math.sqrt(min(values) * max(values))


def plot_site_dice(rows: Sequence[MethodRow], path: Path) -> None:
    """Test Dice by site, one mark a method."""
    sites = list(rows[0].site_dice)
    figure, axes = _figure(rows, max(6.0, 1.8 * len(sites) + 3))
    for index, row in enumerate(rows):
        offset = (index - (len(rows) - 1) / 2) * 0.7 / len(rows)
        places = [place + offset for place in range(len(sites))]
        axes.plot(places, [row.site_dice[site] for site in sites], label=label(row), **_look(index))
    axes.set_xticks(range(len(sites)), sites)
    axes.set_ylabel("test Dice")
    _add_legend(axes)
    save_figure(figure, path, dpi=150)


def _figure(rows: Collection[object], width: float) -> tuple[Figure, Axes]:
    """As high as its legend, one line a row, has to be."""
    return figure_with_axes(width, max(4.8, 0.21 * len(rows) + 0.4))


def _look(index: int) -> dict[str, Any]:
    """Colour and marker of a row, the same in every plot: 56 that differ."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}


def _add_legend(axes: Axes) -> None:
    """Beside the axes, in the order of the table."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def plot_dice_by_round(
    runs: Mapping[str, Sequence[Sequence[RoundRecord]]], rows: Sequence[MethodRow], path: Path
) -> None:
    """Validation Dice by round, mean over sites and seeds: whether every method has converged.

    Args:
        runs: for each method the rounds of each of its seeds.
        rows: the table; a method has the look of its personalised models there.
        path: the picture.
    """
    figure, axes = _figure(runs, 8.5)
    for index, row in enumerate(rows):
        if row.model != PERSONALISED or row.method not in runs:
            continue
        by_round: dict[int, list[float]] = {}
        for record in (record for rounds in runs[row.method] for record in rounds):
            scores = [report.validation_dice for report in record.trained if report.validation_dice is not None]
            if scores:
                by_round.setdefault(record.plan.round_number, []).append(sum(scores) / len(scores))
        numbers = sorted(by_round)
        values = [sum(by_round[number]) / len(by_round[number]) for number in numbers]
        line = STYLES[index // len(COLOURS) % len(STYLES)]
        marks = {"markevery": max(1, len(numbers) // 8), "markersize": 5}
        axes.plot(numbers, values, label=row.method, **(_look(index) | {"linestyle": line} | marks))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _widen(axes)
    axes.set_xlabel("round")
    axes.set_ylabel("validation Dice, mean over sites and seeds")
    _add_legend(axes)
    save_figure(figure, path, dpi=150)
