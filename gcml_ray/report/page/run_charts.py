"""Charts of one run: Dice by round, every test case, shares of the regions, time by stage."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from gcml_ray.prediction.averages import case_dice, mean
from gcml_ray.records import BEFORE_GOSSIP, ENSEMBLE, PERSONALISED, SHARED, CaseScore, RoundRecord
from gcml_ray.report.page.parts import Chart, chart_text, hatched, look, looks, new_figure, whole_numbers
from gcml_ray.report.page.records import RunRecords
from gcml_ray.report.words import MODELS, PHASES, natural_order, validation_series
from gcml_ray.wording import number

STAGES = {
    "train": "training",
    "judge": "checking what came in",
    "merge": "merging models",
    "validate": "validation",
    "checkpoint": "saving",
}
WAITING = "waiting, sending, starting"
REGIONS = {
    "omega": "Omega: anyone sees a structure",
    "pull": "R+ (pull): the peer is right",
    "push": "R\u2212 (push): the peer is wrong",
}
REGION_LOOKS = {"omega": (6, "dot"), "pull": (0, "solid"), "push": (1, "dash")}
MANY_POINTS = 40  # from here on a line needs no marker at every point


def dice_by_round(run: RunRecords) -> Chart | None:
    """Validation Dice by round, one line a site; phases shaded, best rounds and missed rounds marked."""
    series = {site: validation_series(run.rounds, site) for site in run.sites}
    series = {site: values for site, values in series.items() if values}
    if not series:
        return None
    figure = new_figure(height=460, x_title="round", y_title="validation Dice")
    best_points, missed_points = [], []
    for site, each in looks(run.sites).items():
        values = series.get(site)
        if values is None:
            continue
        is_long = len(values) > MANY_POINTS
        figure.add_scatter(
            x=list(values), y=list(values.values()), name=chart_text(site),
            mode="lines" if is_long else "lines+markers", line={"color": each.colour, "dash": each.dash, "width": 2},
            marker={"symbol": each.symbol, "size": 8}, hovertemplate="round %{x}: %{y:.3f}",
        )  # fmt: skip
        best = max(values, key=lambda place: -1.0 if math.isnan(values[place]) else values[place])
        best_points.append((best, values[best], site))
        for record in run.rounds:
            if record.missed(site):
                near = min(values, key=lambda place: abs(place - record.plan.round_number))
                missed_points.append((record.plan.round_number, values[near], site))
    _add_marks(figure, best_points, name="best round", symbol="star-open", size=17)
    _add_marks(figure, missed_points, name="site did not train", symbol="x-thin-open", size=12)
    _shade_phases(figure, run.rounds)
    best_words = "; ".join(f"{site} at best {number(value)} in round {place}" for place, value, site in best_points)
    return Chart("Validation Dice by round", f"Line chart of validation Dice by round: {best_words}.", figure)


def _add_marks(
    figure: go.Figure, marks: Sequence[tuple[int, float, str]], *, name: str, symbol: str, size: int
) -> None:
    if marks:
        figure.add_scatter(
            x=[place for place, _, _ in marks], y=[value for _, value, _ in marks], name=name, mode="markers",
            marker={"symbol": symbol, "size": size, "color": "#7F7F7F", "line": {"width": 2}},
            text=[chart_text(site) for _, _, site in marks], hovertemplate=f"%{{text}}: {name} (%{{x}}), %{{y:.3f}}"
            "<extra></extra>",
        )  # fmt: skip


def _shade_phases(figure: go.Figure, rounds: Sequence[RoundRecord]) -> None:
    """A band for each phase without exchange, and each phase's name at the bottom."""
    phases = itertools.groupby(rounds, key=lambda record: record.plan.phase)
    for index, (phase, members) in enumerate(phases):
        numbers = [record.plan.round_number for record in members]
        figure.add_vrect(
            x0=numbers[0] - 0.5, x1=numbers[-1] + 0.5, line_width=0, layer="below",
            fillcolor="rgba(127,127,127,0)" if phase == "exchange" else "rgba(127,127,127,0.15)",
            annotation={"text": PHASES[phase], "font": {"size": 11}, "yshift": 14 * (index % 2)},
            annotation_position="bottom left",
        )  # fmt: skip
    whole_numbers(figure, rounds[-1].plan.round_number)
    figure.update_xaxes(range=[rounds[0].plan.round_number - 0.5, rounds[-1].plan.round_number + 0.5])


def case_distribution(run: RunRecords) -> Chart | None:
    """Test Dice of every case, a row a site; before gossip and personalised beside each other."""
    if not run.scores:
        return None
    rows = {
        MODELS[model]: {site: case_dice(run.scores, site, model) for site in run.scored_sites} for model in run.models
    }
    first = {BEFORE_GOSSIP: 6, SHARED: 4, ENSEMBLE: 2, PERSONALISED: 0}
    return distribution_chart(rows, styles=[first[model] for model in run.models], title="Test Dice of every case")


def distribution_chart(rows: dict[str, dict[str, dict[str, float]]], *, styles: Sequence[int], title: str) -> Chart:
    """Boxes with every case as a point.

    Args:
        rows: for each series (a model), for each row of the chart, Dice by case.
        styles: the look of each series.
        title: heading of the chart.
    """
    num_rows = max(len(groups) for groups in rows.values())
    figure = new_figure(height=110 + num_rows * (26 + 34 * len(rows)), x_title="test Dice")
    for index, (series, groups) in zip(styles, rows.items(), strict=True):
        each = look(index)
        places = [(row, case, dice) for row, by_case in groups.items() for case, dice in by_case.items()]
        figure.add_box(
            x=[dice for _, _, dice in places], y=[chart_text(row) for row, _, _ in places], name=series,
            orientation="h", boxpoints="all", jitter=0.5, pointpos=0, boxmean=True,
            line={"color": each.colour, "width": 1.5}, fillcolor="rgba(127,127,127,0.10)",
            marker={"symbol": each.symbol + "-open", "size": 7, "color": each.colour, "opacity": 0.9},
            text=[chart_text(case) for _, case, _ in places], hovertemplate="%{text}: %{x:.3f}", hoveron="points",
        )  # fmt: skip
    figure.update_layout(boxmode="group", boxgap=0.25)
    figure.update_xaxes(showgrid=True, range=[-0.02, 1.02])
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    words = "; ".join(
        f"{row}, {series}: {number(min(values, default=math.nan))} to {number(max(values, default=math.nan))}"
        for series, groups in rows.items()
        for row, by_case in groups.items()
        if (values := [dice for dice in by_case.values() if not math.isnan(dice)])
    )
    return Chart(title, f"Box chart with every test case as a point. Lowest to highest Dice: {words}.", figure)


def region_shares(run: RunRecords) -> Chart | None:
    """Mean share of Omega, R+ and R- over the sites that learned from a peer, by round."""
    by_region: dict[str, dict[int, float]] = {}
    for record in run.rounds:
        taught = [report.regions for report in record.trained if report.regions]
        for region in REGIONS:
            found = [regions[region] for regions in taught if region in regions]
            if found:
                by_region.setdefault(region, {})[record.plan.round_number] = 100 * mean(found)
    if not by_region:
        return None
    figure = new_figure(height=380, x_title="round", y_title="% of the image patch")
    for region, values in by_region.items():
        index, dash = REGION_LOOKS[region]
        each = look(index)
        figure.add_scatter(
            x=list(values), y=list(values.values()), name=REGIONS[region], mode="lines+markers",
            line={"color": each.colour, "dash": dash, "width": 2},
            marker={"symbol": each.symbol, "size": 6}, hovertemplate="round %{x}: %{y:.2f} %",
        )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    whole_numbers(figure, run.rounds[-1].plan.round_number)
    last = {region: list(values.values())[-1] for region, values in by_region.items()}
    words = ", ".join(f"{REGIONS[region]} {value:.2f} %" for region, value in last.items())
    return Chart(
        "Shares by round, mean over sites", f"Line chart of the regions' shares; in the last round {words}.", figure
    )


# --- time --------------------------------------------------------------------------------------


def stage_seconds(rounds: Sequence[RoundRecord]) -> dict[str, dict[str, float]]:
    """Seconds of each site by stage in words; what is left of its rounds is waiting."""
    by_site: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for record in rounds:
        for site in record.plan.sites:
            by_site[site][WAITING] += record.seconds
        for report in record.trained:
            for stage, seconds in report.seconds.items():
                by_site[report.site][STAGES.get(stage, stage)] += seconds
                by_site[report.site][WAITING] -= seconds
    return {site: {stage: max(0.0, value) for stage, value in by_site[site].items()} for site in natural_order(by_site)}


def time_by_stage(run: RunRecords) -> Chart | None:
    """Each site's time by stage."""
    return stage_chart(stage_seconds(run.rounds), title="Time of each site")


def stage_chart(by_row: Mapping[str, Mapping[str, float]], *, title: str) -> Chart | None:
    """Stacked bars, a hatch and a colour a stage.

    Args:
        by_row: for each row (a site, a method) the seconds of each stage.
        title: heading of the chart.
    """
    if not by_row:
        return None
    found = {stage for stages in by_row.values() for stage in stages}
    known = [stage for stage in (*STAGES.values(), WAITING) if stage in found]
    stages = known + sorted(found - set(known))
    total = max(sum(values.values()) for values in by_row.values())
    unit, divisor = ("minutes", 60.0) if total > 300 else ("seconds", 1.0)
    figure = new_figure(height=130 + 44 * len(by_row), x_title=unit)
    for index, stage in enumerate(stages):
        each = look(6 if stage == WAITING else index)
        figure.add_bar(
            x=[values.get(stage, 0.0) / divisor for values in by_row.values()], y=[chart_text(row) for row in by_row],
            name=stage, orientation="h", hovertemplate=f"%{{x:.1f}} {unit}",
            marker=hatched(each.colour, each.hatch),
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(showgrid=True)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    words = "; ".join(
        f"{row}: " + ", ".join(f"{values.get(stage, 0.0) / divisor:.1f} {unit} {stage}" for stage in stages)
        for row, values in by_row.items()
    )
    return Chart(title, f"Stacked bars. {words}.", figure)


def time_by_round(run: RunRecords) -> Chart | None:
    """Seconds of each round."""
    if len(run.rounds) < 2:
        return None
    figure = new_figure(height=280, x_title="round", y_title="seconds")
    numbers = [record.plan.round_number for record in run.rounds]
    figure.add_bar(
        x=numbers, y=[record.seconds for record in run.rounds], name="round", marker={"color": look(0).colour},
        hovertemplate="round %{x}: %{y:.1f} s<extra></extra>",
    )  # fmt: skip
    whole_numbers(figure, numbers[-1])
    slowest = max(run.rounds, key=lambda record: record.seconds)
    words = (
        f"Bars of each round's seconds; the longest, round {slowest.plan.round_number}, took {slowest.seconds:.1f} s."
    )
    return Chart("Time of each round", words, figure)


def class_means(scores: Sequence[CaseScore], site: str, model: str) -> dict[str, float]:
    """Mean Dice over cases, by class."""
    names = list(dict.fromkeys(score.class_name for score in scores))
    own = [score for score in scores if (score.site, score.model) == (site, model)]
    return {name: mean(score.dice for score in own if score.class_name == name) for name in names}


def describe_phases(rounds: Sequence[RoundRecord]) -> str:
    """``6 of warm-up, 39 of exchange, 15 of cool-down``."""
    counts = Counter[str](record.plan.phase for record in rounds)
    return ", ".join(f"{counts[phase]} of {name}" for phase, name in PHASES.items() if counts[phase])
