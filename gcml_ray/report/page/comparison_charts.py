"""Charts of a comparison: Dice by method and site, against traffic, by round, by case; the gain of joining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcml_ray.comparison.cells import (
    MIN_CASES,
    Cell,
    MethodRow,
    dice_over_seeds,
    differences_of_methods,
    mean_interval,
)
from gcml_ray.comparison.table import label
from gcml_ray.prediction.averages import mean
from gcml_ray.report.page.parts import COLOURS, Chart, chart_text, looks, new_figure, whole_numbers
from gcml_ray.report.page.records import RunRecords
from gcml_ray.report.page.run_charts import MANY_POINTS, distribution_chart
from gcml_ray.report.words import megabytes, points, validation_series
from gcml_ray.wording import number


def dice_by_method(rows: Sequence[MethodRow]) -> Chart:
    """A row a method: its mean as a line, each site as a mark of its own."""
    names = [chart_text(label(row)) for row in rows]
    figure = new_figure(height=120 + 40 * len(rows), x_title="mean test Dice")
    for site, each in looks(list(rows[0].site_dice)).items():
        figure.add_scatter(
            x=[row.site_dice.get(site) for row in rows], y=names, mode="markers", name=chart_text(site),
            marker={"symbol": each.symbol, "color": each.colour, "size": 10, "opacity": 0.85},
            hovertemplate="%{y}: %{x:.3f}",
        )  # fmt: skip
    figure.add_scatter(
        x=[row.dice for row in rows], y=names, mode="markers", name="mean of sites",
        marker={"symbol": "line-ns-open", "size": 26, "color": "#7F7F7F", "line": {"width": 4}},
        hovertemplate="%{y}: %{x:.3f}",
    )  # fmt: skip
    figure.update_xaxes(showgrid=True)
    figure.update_yaxes(autorange="reversed", type="category")
    words = "; ".join(f"{label(row)} {number(row.dice)}" for row in rows)
    return Chart("Mean test Dice by method and site", f"Dot chart. Mean over sites: {words}.", figure)


def dice_against_bytes(rows: Sequence[MethodRow]) -> Chart:
    """Each method's mean test Dice against what it sent; bars are the spread over seeds."""
    height = 420 + 20 * (len(rows) // 3)  # a legend of many methods takes its room above the marks
    figure = new_figure(height=height, x_title="MB sent in a whole run", y_title="mean test Dice")
    for row, each in zip(rows, looks([label(row) for row in rows]).values(), strict=True):
        figure.add_scatter(
            x=[row.sent_bytes / 1e6], y=[row.dice], mode="markers", name=chart_text(label(row)), cliponaxis=False,
            error_y={"type": "data", "array": [row.dice_sd]} if row.num_seeds > 1 else None,
            marker={"symbol": each.symbol, "size": 12, "color": each.colour},
            hovertemplate="%{x:.3g} MB, Dice %{y:.3f}",
        )  # fmt: skip
    figure.update_xaxes(showgrid=True, rangemode="tozero")
    words = "; ".join(f"{label(row)} {number(row.dice)} for {megabytes(row.sent_bytes)}" for row in rows)
    return Chart("Dice against traffic", f"Dot chart with a mark a method: {words}.", figure)


def gains_by_site(cells: Sequence[Cell], *, method: str, alone: str) -> Chart | None:
    """Difference of joining to training alone at each site, with its 95 % interval over the site's cases.

    A site with too few cases to tell has an open grey mark and no interval.
    """
    differences = differences_of_methods(cells, method, alone)
    by_site = {site: 100 * values for site, values in differences.items() if np.isfinite(values).all()}
    if not by_site:
        return None
    figure = new_figure(height=130 + 46 * len(by_site), x_title="Dice points, better to the right")
    enough = {site: values for site, values in by_site.items() if len(values) >= MIN_CASES}
    few = {site: values for site, values in by_site.items() if len(values) < MIN_CASES}
    if enough:
        _add_gains(figure, enough, colour=COLOURS[0], symbol="diamond", name="with 95 % interval")
        means = [mean(values) for values in enough.values()]
        intervals = [mean_interval([values]) for values in enough.values()]
        figure.data[0].error_x = {
            "type": "data", "symmetric": False, "thickness": 2, "width": 6, "color": COLOURS[0],
            "array": [high - value for (_, high), value in zip(intervals, means, strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(intervals, means, strict=True)],
        }  # fmt: skip
    if few:
        _add_gains(figure, few, colour=COLOURS[6], symbol="diamond-open", name="too few test cases to tell")
    figure.update_layout(showlegend=bool(few))
    figure.update_xaxes(showgrid=True, zeroline=True, zerolinewidth=2)
    names = [chart_text(site) for site in by_site]
    figure.update_yaxes(autorange="reversed", type="category", categoryorder="array", categoryarray=names)
    words = "; ".join(
        f"{site} {points(mean(values) / 100)}{', too few cases to tell' if site in few else ''}"
        for site, values in by_site.items()
    )
    return Chart(f"{method} against {alone}", f"Differences with intervals, in Dice points: {words}.", figure)


def _add_gains(figure: Any, by_site: Mapping[str, NDArray[np.float64]], *, colour: str, symbol: str, name: str) -> None:
    """A mark a site at its mean difference, with the number above it."""
    means = [mean(values) for values in by_site.values()]
    figure.add_scatter(
        x=means, y=[chart_text(site) for site in by_site], mode="markers+text", name=name,
        text=[f"{value:+.1f}" for value in means], textposition="top center", hoverinfo="skip", cliponaxis=False,
        marker={"size": 11, "color": colour, "symbol": symbol},
    )  # fmt: skip


def cases_by_method(cells: Sequence[Cell], rows: Sequence[MethodRow]) -> Chart:
    """Test Dice of every case, a row a method and tested model, in the order of the table."""
    shown = {}
    for row in rows:
        dice = dice_over_seeds([cell for cell in cells if cell.method == row.method], row.model)
        shown[label(row)] = {f"{site}, {case}": value for (site, case), value in dice.items()}
    return distribution_chart({"each test case": shown}, styles=[0], title="Test Dice of every case")


def mean_dice_by_round(by_method: Mapping[str, Sequence[RunRecords]], rows: Sequence[MethodRow]) -> Chart | None:
    """Validation Dice by round, mean over sites and seeds, one line a method, in the looks and order of the table."""
    figure = new_figure(height=440, x_title="round", y_title="validation Dice, mean of sites")
    ends = []
    names = dict.fromkeys([*(label(row) for row in rows), *by_method])
    for method, each in looks(list(names)).items():
        if method not in by_method:
            continue
        by_round: dict[int, list[float]] = {}
        for run in by_method[method]:
            for site in run.sites:
                for place, dice in validation_series(run.rounds, site).items():
                    by_round.setdefault(place, []).append(dice)
        if not by_round:
            continue
        places = sorted(by_round)
        values = [mean(by_round[place]) for place in places]
        ends.append(f"{method} {number(values[-1])}")
        figure.add_scatter(
            x=places, y=values, name=chart_text(method), mode="lines" if len(places) > MANY_POINTS else "lines+markers",
            line={"color": each.colour, "dash": each.dash, "width": 2}, marker={"symbol": each.symbol, "size": 8},
            hovertemplate="round %{x}: %{y:.3f}",
        )  # fmt: skip
    if not ends:
        return None
    whole_numbers(
        figure, max(run.rounds[-1].plan.round_number for runs in by_method.values() for run in runs if run.rounds)
    )
    return Chart("Mean validation Dice by round", f"Line chart; at the end {'; '.join(ends)}.", figure)
