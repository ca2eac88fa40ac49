"""What the plots of a run share: its rounds and sites, one look a site, plain axes.

Figures are drawn by Agg through matplotlib's objects: no display, and no state shared between plots.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import RoundRecord
from gcml_ray.report.words import natural_order

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLES = ("solid", "dashed", "dotted")


def finished_rounds(folder: RunFolder) -> tuple[RoundRecord, ...]:
    """The rounds of a run.

    Raises:
        DataError: there is none.
    """
    rounds = folder.rounds()
    if not rounds:
        raise DataError(f"{folder.path}: no round is finished yet (rounds.jsonl is empty or missing), nothing to plot")
    return rounds


def names_in_rounds(rounds: Sequence[RoundRecord]) -> tuple[str, ...]:
    """Every site that was ever planned, in one order for all plots."""
    return natural_order({site for record in rounds for site in record.plan.sites})


def site_looks(sites: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style by site: 21 that differ."""
    return {
        site: (COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)])
        for index, site in enumerate(sites)
    }


def empty_figure(width: float, height: float) -> Figure:
    """A figure of that many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_with_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches with one pair of tidy axes."""
    figure = empty_figure(width, height)
    axes = figure.subplots()
    tidy(axes)
    return figure, axes


def save_figure(figure: Figure, target: Path | IO[bytes], *, dpi: int) -> None:
    """Writes a PNG. Names in letters that the font lacks are drawn as boxes, without a warning a letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
        figure.savefig(target, dpi=dpi, format="png")


def tidy(axes: Axes) -> None:
    """Light horizontal lines, no box, whole numbers along x."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y", color="0.88", lw=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def span_rounds(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    """Let x run from the first to the last round, with half a round to spare."""
    axes.set_xlim(rounds[0].plan.round_number - 0.5, rounds[-1].plan.round_number + 0.5)
