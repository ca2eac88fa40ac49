"""Who taught whom, as a heat map with numbers: of one run, and of the methods of a comparison beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from gcml_ray.errors import DataError
from gcml_ray.records import Edge, RoundRecord
from gcml_ray.report_axes import empty_figure, finished_rounds, site_names
from gcml_ray.run_folder import RunFolder
from gcml_ray.teaching import gains_by_edge

COLOUR_MAP = "RdBu"  # red: Dice fell, blue: it rose
MAX_COLUMNS = 3
NUMBERS_UP_TO = 12  # sites; in a larger map nobody could read them
CAPTION = (
    "mean change of the receiver's validation Dice, in points,\nover rounds with this sender's push (number of pushes)"
)

Gains = Mapping[Edge, Sequence[float]]


def plot_who_taught_whom(folder: RunFolder) -> Figure:
    """Senders in rows, receivers in columns: mean change of the receiver's validation Dice, and over how many pushes.

    Raises:
        DataError: no round is finished, or no push was followed by a score that could be compared.
    """
    rounds = finished_rounds(folder)
    sites = site_names(rounds)
    gains = _between(sites, gains_by_edge(rounds))
    if not gains:
        raise DataError(f"{folder.path}: no validated round followed a push, so nobody is known to have taught anybody")
    side = max(3.6, 0.8 * len(sites) + 1.4)
    figure = empty_figure(side + 1.2, side)
    axes = figure.subplots()
    _draw(figure, [axes], [gains], sites)
    return figure


def plot_gains_by_method(runs: Mapping[str, Sequence[Sequence[RoundRecord]]], path: Path) -> bool:
    """The same for methods, a panel each, the pushes of all seeds together; methods without pushes have no panel.

    Args:
        runs: for each method the rounds of each of its seeds.
        path: the picture.

    Returns:
        Whether there was anything to draw.
    """
    sites = site_names([record for seeds in runs.values() for rounds in seeds for record in rounds])
    merged = {method: _merged([gains_by_edge(rounds) for rounds in seeds]) for method, seeds in runs.items()}
    by_method = {method: between for method, gains in merged.items() if (between := _between(sites, gains))}
    if not by_method:
        return False
    seen = {name for gains in by_method.values() for edge in gains for name in (edge.sender, edge.receiver)}
    sites = tuple(site for site in sites if site in seen)  # not the one of pooled training
    num_columns = min(MAX_COLUMNS, len(by_method))
    num_rows = -(-len(by_method) // num_columns)
    side = max(2.6, 0.62 * len(sites) + 0.9)
    figure = empty_figure(side * num_columns + 1.2, (side + 0.3) * num_rows + 0.5)
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes in panels[len(by_method) :]:
        axes.set_axis_off()
    for axes, method in zip(panels, by_method, strict=False):
        axes.set_title(method, fontsize=10)
    _draw(figure, panels[: len(by_method)], list(by_method.values()), sites)
    figure.savefig(path, dpi=150)
    return True


def _merged(gains: Sequence[Gains]) -> dict[Edge, tuple[float, ...]]:
    edges = sorted({edge for one in gains for edge in one})
    return {edge: tuple(value for one in gains for value in one.get(edge, ())) for edge in edges}


def _between(sites: Sequence[str], gains: Gains) -> dict[Edge, Sequence[float]]:
    """What sites taught each other; a server teaches nobody."""
    return {edge: values for edge, values in gains.items() if {edge.sender, edge.receiver} <= set(sites)}


def _draw(figure: Figure, panels: Sequence[Axes], gains: Sequence[Gains], sites: Sequence[str]) -> None:
    """A map into each panel, all with one scale of colours, and its bar."""
    limit = max(abs(float(np.mean(values))) for one in gains for values in one.values()) or 1e-3
    image: AxesImage | None = None
    for axes, one in zip(panels, gains, strict=True):
        image = _draw_map(axes, one, sites, limit=100 * limit)
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), shrink=0.8 if len(panels) <= MAX_COLUMNS else 0.5, aspect=25)
        bar.set_label("Dice points", fontsize=9)
        bar.outline.set_visible(False)
    figure.supxlabel(CAPTION, fontsize=8, color="0.35")


def _draw_map(axes: Axes, gains: Gains, sites: Sequence[str], *, limit: float) -> AxesImage:
    points = np.full((len(sites), len(sites)), np.nan)
    for edge, values in gains.items():
        points[sites.index(edge.sender), sites.index(edge.receiver)] = 100 * float(np.mean(values))
    image = axes.imshow(points, cmap=COLOUR_MAP, vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(points):
        if math.isnan(value) or len(sites) > NUMBERS_UP_TO:
            continue
        colour = "white" if abs(value) > 0.65 * limit else "0.1"
        number = len(gains[Edge(sites[row], sites[column])])
        axes.text(
            column, row - 0.12, f"{round(value, 1) + 0.0:+.1f}", ha="center", va="center", fontsize=9, color=colour
        )
        axes.text(column, row + 0.24, f"({number})", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(sites)), sites, rotation=90 if len(sites) > 6 else 0, fontsize=9)
    axes.set_yticks(range(len(sites)), sites, fontsize=9)
    axes.set(xlabel="receiver", ylabel="sender")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image
