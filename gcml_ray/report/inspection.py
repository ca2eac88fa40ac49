"""The picture of an inspected data set: where do the sites differ?"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from gcml_ray.inspection.facts import CaseFacts, Inspection
from gcml_ray.inspection.sites import AXIS_NAMES, Quantity, by_verdict, quantities
from gcml_ray.report.axes import empty_figure, save_figure, site_looks, tidy
from gcml_ray.wording import some

COLUMNS = 3
PANEL = (4.3, 3.1)  # inches
MAX_LINES = 60  # cases of a site that are drawn in a panel of intensities
MAX_NAMED = 3  # quantities of one verdict in the headline
GREY = "0.35"
VERDICT_COLOURS = {"very different": "#B2182B", "somewhat different": "#B35806"}


def plot_inspection(inspection: Inspection, *, title: str) -> Figure:
    """One panel for each thing that can differ, a column a site; the panel's second line says how much it does.

    Args:
        inspection: what was found.
        title: of the data set.
    """
    found = quantities(inspection)
    shown = [each for each in found if not (each.is_constant and each.kind in ("size", "spacing"))]
    num_panels = 1 + len(shown)
    num_rows = -(-num_panels // COLUMNS)
    figure = empty_figure(PANEL[0] * COLUMNS, PANEL[1] * num_rows + 1.3)
    grid = figure.subplots(num_rows, COLUMNS, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    _draw_counts(panels[0], inspection)
    for axes, quantity in zip(panels[1:], shown, strict=False):
        if quantity.kind == "intensity":
            _draw_intensities(axes, inspection, quantity)
        else:
            _draw_dots(axes, quantity)
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    figure.suptitle(f"{title}: where do the sites differ?\n{_headline(found)}", fontsize=13, parse_math=False)
    figure.supxlabel(_reading_aid(inspection, found), fontsize=9, color=GREY, parse_math=False)
    return figure


def write_inspection(path: Path, inspection: Inspection, *, title: str) -> None:
    """The picture as a PNG file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(plot_inspection(inspection, title=title), path, dpi=130)


def _headline(found: Sequence[Quantity]) -> str:
    differing = [each for each in found if not _is_same(each)]
    parts = [
        f"{word.capitalize()}: {some([each.name[0].lower() + each.name[1:] for each in those], MAX_NAMED)}"
        for word, those in by_verdict(differing).items()
        if those and word in VERDICT_COLOURS
    ]
    return textwrap.fill(". ".join(parts) or "In nothing that was measured, but perhaps in number of cases", 120)


def _reading_aid(inspection: Inspection, found: Sequence[Quantity]) -> str:
    lines = [
        "One dot is one case, a black bar the middle of the site's cases. Under each title: how much of the "
        "difference between cases comes with the site (0 %: none of it, 100 %: all)."
    ]
    if inspection.channel_names:
        lines.append(
            "Brightness: intensities as stored, of voxels above the image's mean (no air). A dot is a case's median, "
            "its line runs from the 1st to the 99th percentile.\nTraining normalises each channel, which removes part "
            "of these differences."
        )
    for kind, name in (("size", "image size"), ("spacing", "voxel size")):
        same = [each for each in found if each.kind == kind and _is_same(each)]
        if same:
            values = ", ".join(f"{_number(_only_value(each))} ({AXIS_NAMES[int(each.key)]} axis)" for each in same)
            lines.append(f"The same in all cases: {name} {values}, in {same[0].unit}.")
    return "\n".join(lines)


def _is_same(quantity: Quantity) -> bool:
    return quantity.is_constant and quantity.kind in ("size", "spacing")


def _only_value(quantity: Quantity) -> float:
    return next(value for values in quantity.by_site.values() for value in values)


def _draw_counts(axes: Axes, inspection: Inspection) -> None:
    """Number of cases; a site with few learns little on its own."""
    _prepare(axes, inspection.sites)
    for place, (site, (colour, _)) in enumerate(site_looks(inspection.sites).items()):
        number = len(inspection.of_site(site))
        axes.bar(place, number, 0.6, color=colour)
        axes.annotate(str(number), (place, number), ha="center", va="bottom", fontsize=9)
    axes.margins(y=0.15)
    _head(axes, "Number of cases", "how much each site can learn from", unit="cases", colour=GREY)


def _draw_dots(axes: Axes, quantity: Quantity) -> None:
    """One dot a case, spread sideways so that equal ones are seen."""
    _prepare(axes, tuple(quantity.by_site))
    for place, (site, (colour, _)) in enumerate(site_looks(tuple(quantity.by_site)).items()):
        values = np.asarray(quantity.by_site[site])
        if not values.size:
            continue
        axes.plot(place + _spread(values.size), values, ".", color=colour, ms=6, alpha=0.65, mew=0)
        _median_bar(axes, place, float(np.median(values)))
    if quantity.kind in ("label", "pieces"):
        _long_tail(axes, [value for values in quantity.by_site.values() for value in values])
    if quantity.kind in ("size", "pieces") and axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    colour = VERDICT_COLOURS.get(quantity.verdict, GREY)
    _head(axes, quantity.name, _explained(quantity), unit=quantity.unit, colour=colour)


def _draw_intensities(axes: Axes, inspection: Inspection, quantity: Quantity) -> None:
    """One line a case from the 1st to the 99th percentile, sorted by their medians."""
    _prepare(axes, inspection.sites)
    for place, (site, (colour, _)) in enumerate(site_looks(inspection.sites).items()):
        facts = _sorted_channels(inspection.of_site(site), quantity.key)
        if not facts:
            continue
        offsets = np.linspace(-0.36, 0.36, len(facts)) if len(facts) > 1 else np.zeros(1)
        low, middle, high = (np.array([each[index] for each in facts]) for index in (0, 2, 4))
        axes.vlines(place + offsets, low, high, color=colour, lw=max(0.6, min(3.0, 40 / len(facts))), alpha=0.35)
        axes.plot(place + offsets, middle, ".", color=colour, ms=5, mew=0)
        _median_bar(axes, place, float(np.median(middle)))
    values = [value for site in inspection.sites for each in _sorted_channels(inspection.of_site(site), quantity.key)
              for value in each]  # fmt: skip
    if values and min(values) > 0:
        _long_tail(axes, values, least_factor=1000)
    colour = VERDICT_COLOURS.get(quantity.verdict, GREY)
    _head(axes, quantity.name, _explained(quantity), unit="intensity as stored", colour=colour)


def _sorted_channels(cases: Sequence[CaseFacts], name: str) -> list[tuple[float, ...]]:
    """Percentiles of a channel, cases in the order of their medians; of many cases some, evenly."""
    facts = [each for case in cases for each in case.channels if each.name == name and math.isfinite(each.median)]
    facts.sort(key=lambda each: each.median)
    step = -(-len(facts) // MAX_LINES) if facts else 1
    return [each.percentiles for each in facts[::step]]


def _explained(quantity: Quantity) -> str:
    if math.isnan(quantity.site_share):
        return "too few cases to compare sites"
    return f"{quantity.verdict}: the site explains {100 * quantity.site_share:.0f} %"


def _spread(number: int) -> NDArray[np.float64]:
    """Sideways places that fill a column evenly without order (golden ratio)."""
    return (np.arange(number, dtype=np.float64) * 0.618034 % 1 - 0.5) * 0.5 if number > 1 else np.zeros(1)


def _median_bar(axes: Axes, place: int, value: float) -> None:
    axes.plot([place - 0.4, place + 0.4], [value, value], color="black", lw=1.8, solid_capstyle="butt", zorder=5)


def _long_tail(axes: Axes, values: Sequence[float], *, least_factor: float = 30) -> None:
    """A logarithmic axis where values differ by more than this factor; 0 keeps its place at the foot."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > least_factor:
        if min(values) <= 0:
            axes.set_yscale("symlog", linthresh=min(positive), linscale=0.3)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(positive) / min(positive) < 1e3 else (1,)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda _, __: ""))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    else:
        axes.set_ylim(bottom=0)


def _prepare(axes: Axes, sites: Sequence[str]) -> None:
    tidy(axes)
    crowded = len(sites) > 8 or max(map(len, sites), default=0) > 9
    axes.set_xticks(range(len(sites)), sites, rotation=40 if crowded else 0, ha="right" if crowded else "center")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(sites) - 0.4)


def _head(axes: Axes, title: str, subtitle: str, *, unit: str, colour: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=18, parse_math=False)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color=colour, parse_math=False)
    axes.set_ylabel(unit, fontsize=9, parse_math=False)


def _number(value: float) -> str:
    return f"{value:.6g}" if value >= 1e-4 or value == 0 else f"{value:.0e}"
