"""Charts of a search: objective by trial, parallel coordinates, what mattered, learning curves, Dice by traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from plotly.colors import sample_colorscale

from gcml_ray.report.page.parts import COLOURS, Chart, chart_text, hatched, look, new_figure, whole_numbers
from gcml_ray.report.words import ENDINGS, OBJECTIVES
from gcml_ray.search.effects import Effect, comparable, compared_round, value_at
from gcml_ray.search.records import SearchRecord, TrialRecord, TrialStatus, describe_params, format_value, short_names

# Look (by number) and symbol of each way in which a trial ends.
MARKS: dict[TrialStatus, tuple[int, str]] = {
    "finished": (0, "circle"),
    "cut": (1, "x"),
    "stopped": (3, "square"),
    "running": (2, "triangle-up"),
    "failed": (6, "triangle-down"),
}
SHADES = [[0, "#B9C4CC"], [0.5, COLOURS[5]], [1, COLOURS[0]]]  # from the worst trial to the best


def objective_by_trial(search: SearchRecord) -> Chart:
    """Objective of every trial by its number, and the best finished one so far as a line."""
    figure = new_figure(height=400, x_title="trial", y_title=OBJECTIVES[search.objective])
    trials = [trial for trial in search.trials if trial.points]
    for status, (index, symbol) in MARKS.items():
        own = [trial for trial in trials if trial.status == status]
        if own:
            figure.add_scatter(
                x=[trial.number for trial in own], y=[trial.value(search.objective) for trial in own],
                name=ENDINGS[status], mode="markers",
                marker={"symbol": symbol, "size": 10, "color": look(index).colour},
                text=[_hover(trial) for trial in own], hovertemplate="%{text}<br>%{y:.3f}<extra></extra>",
            )  # fmt: skip
    _add_own_values(figure, search)
    finished = [trial for trial in trials if trial.status == "finished"]
    if finished:
        best = list(accumulate((trial.value(search.objective) for trial in finished), max))
        figure.add_scatter(
            x=[trial.number for trial in finished], y=best, name="best so far", mode="lines", hoverinfo="skip",
            line={"shape": "hv", "color": "#7F7F7F", "width": 2},
        )  # fmt: skip
    last = max(trial.number for trial in trials)
    whole_numbers(figure, last)
    figure.update_xaxes(range=[0, last + 1])
    words = "; ".join(f"trial {t.number} {format_value(t.value(search.objective))}, {t.status}" for t in trials)
    return Chart("Objective by trial", f"Dot chart. {words}.", figure)


def _add_own_values(figure: Any, search: SearchRecord) -> None:
    """A ring about the trial with the federation's own values."""
    own = search.default_trial
    if own is not None and own.points:
        figure.add_scatter(
            x=[own.number], y=[own.value(search.objective)], name="the federation's own values", mode="markers",
            marker={"symbol": "circle-open", "size": 19, "color": "#7F7F7F", "line": {"width": 2}}, hoverinfo="skip",
        )  # fmt: skip


def learning_curves(search: SearchRecord) -> Chart:
    """The objective by round of every trial; a cross where the scheduler cut it, the best one thick."""
    figure = new_figure(height=440, x_title="round", y_title=OBJECTIVES[search.objective])
    best, named = search.best, set()
    for trial in search.trials:
        if not trial.points or trial.status not in MARKS:
            continue
        index, symbol = MARKS[trial.status]
        is_best = best is not None and trial.number == best.number
        name = f"best (trial {trial.number})" if is_best else ENDINGS[trial.status]
        last = len(trial.points) - 1
        figure.add_scatter(
            x=[point.round_number for point in trial.points],
            y=[point.value(search.objective) for point in trial.points], name=name, legendgroup=name,
            showlegend=name not in named, mode="lines+markers", opacity=1.0 if is_best else 0.65,
            line={"color": look(2 if is_best else index).colour, "width": 4 if is_best else 1.5},
            marker={"symbol": symbol, "size": [10 if place == last else 0 for place in range(last + 1)]},
            text=[_hover(trial)] * (last + 1), hovertemplate="%{text}<br>round %{x}: %{y:.3f}<extra></extra>",
        )  # fmt: skip
        named.add(name)
    whole_numbers(figure, search.rounds)
    cut = sum(trial.status == "cut" for trial in search.trials)
    return Chart("Learning curves", f"Line chart of the objective by round, a line a trial; {cut} were cut.", figure)


@dataclass(frozen=True)
class _Scale:
    """One row of the parallel coordinates: where each trial lies (0 left, 1 right), and marks with their places."""

    label: str
    places: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]


def parallel_coordinates(search: SearchRecord) -> Chart | None:
    """A line a trial, from row to row through its values, coloured by its objective at the round that all reached.

    Drawn with plain lines, a key a row: plotly's own kind needs WebGL, and has no room on a phone.
    """
    trials = comparable(search)
    keys = sorted({key for trial in trials for key in trial.params})
    if len(trials) < 2 or not keys:
        return None
    common = compared_round(search)
    values = [value_at(trial, common, search) for trial in trials]
    names = short_names(keys)
    scales = [_scale(names[key], [trial.params.get(key) for trial in trials]) for key in keys]
    scales.append(_number_scale("objective", values, is_log=False))
    figure = new_figure(height=90 + 62 * len(scales))
    order = sorted(range(len(trials)), key=lambda place: values[place])  # the best on top
    for place in order:
        share = order.index(place) / (len(trials) - 1)
        figure.add_scatter(
            x=[scale.places[place] for scale in scales], y=[scale.label for scale in scales], mode="lines+markers",
            line={"color": sample_colorscale(SHADES, share)[0], "width": 1 + 2.5 * share**3}, showlegend=False,
            marker={"size": 4 + 3 * share}, opacity=0.35 + 0.65 * share, text=[_hover(trials[place])] * len(scales),
            hovertemplate=f"%{{text}}<br>objective {values[place]:.3f}<extra></extra>",
        )  # fmt: skip
    for scale in scales:
        for x, text in scale.ticks:
            figure.add_annotation(x=x, y=scale.label, text=text, showarrow=False, yshift=13, font={"size": 11})
    figure.update_layout(showlegend=False)
    figure.update_xaxes(range=[-0.09, 1.09], showticklabels=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=True)
    words = "; ".join(f"{describe_params(t.params)}: {v:.3f}" for t, v in zip(trials, values, strict=True))
    title = f"All values of the trials, by the objective in round {common}: dark and thick is better"
    return Chart(title, f"Parallel coordinates. {words}.", figure)


def _scale(name: str, params: Sequence[Any]) -> _Scale:
    """Numbers over more than a decade by their logarithm, names side by side."""
    label = chart_text(name)
    if all(isinstance(param, int | float) and not isinstance(param, bool) for param in params):
        return _number_scale(label, params, is_log=min(params) > 0 and max(params) > 10 * min(params))
    names = sorted({format_value(param) for param in params})
    step = 1 / max(1, len(names) - 1)
    short = [name.partition("(")[0] for name in names]
    shown = short if len(set(short)) == len(names) else names
    places = tuple(names.index(format_value(param)) * step for param in params)
    return _Scale(label, places, tuple((index * step, chart_text(name)) for index, name in enumerate(shown)))


def _number_scale(label: str, numbers: Sequence[float], *, is_log: bool) -> _Scale:
    """From the lowest to the highest number."""
    low, high = min(numbers), max(numbers)

    def place(number: float) -> float:
        if high == low:
            return 0.5
        return math.log(number / low) / math.log(high / low) if is_log else (number - low) / (high - low)

    ticks = [tick for tick in _decade_ticks(low, high) if 0.1 < place(tick) < 0.9] if is_log else []
    marks = tuple(dict.fromkeys((low, *ticks, high)))
    texts = _told_apart(marks)
    return _Scale(label, tuple(map(place, numbers)), tuple(zip(map(place, marks), texts, strict=True)))


def _told_apart(numbers: Sequence[float]) -> list[str]:
    """The numbers in three digits, or in as many as it takes to tell them apart."""
    texts = ([f"{number:.{digits}g}" for number in numbers] for digits in range(3, 18))
    return next(found for found in texts if len(set(found)) == len(numbers))


def _decade_ticks(low: float, high: float) -> list[float]:
    """1, 3, 10, 30, ... within a range."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for exponent in exponents for tick in (10.0**exponent, 3 * 10.0**exponent) if low <= tick <= high]


def what_mattered(found: Sequence[Effect]) -> Chart | None:
    """Share of the objective's variance that each searched key explains."""
    known = [effect for effect in found if not math.isnan(effect.share)]
    if not known:
        return None
    figure = new_figure(height=110 + 34 * len(known), x_title="share of the variance (fANOVA)")
    figure.add_bar(
        x=[effect.share for effect in known], y=[chart_text(effect.key) for effect in known], orientation="h",
        text=[f"{100 * effect.share:.0f} %" for effect in known], textposition="outside", cliponaxis=False,
        marker=hatched(COLOURS[0], ""), hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.update_xaxes(range=[0, min(1.0, 1.25 * max(effect.share for effect in known))], tickformat=".0%")
    figure.update_yaxes(autorange="reversed", type="category")
    words = "; ".join(f"{effect.key} {100 * effect.share:.0f} %" for effect in known)
    return Chart("What mattered", f"Bar chart. {words}.", figure)


def dice_by_traffic(search: SearchRecord) -> Chart | None:
    """Dice of every finished trial against its traffic in MB; a line joins the Pareto front. None if none finished."""
    finished = [trial for trial in search.trials if trial.status == "finished" and trial.points]
    if not finished:
        return None
    figure = new_figure(height=400, x_title="megabytes sent by all sites", y_title=OBJECTIVES["mean_dice"])
    front = sorted(search.front, key=lambda trial: trial.points[-1].megabytes)
    figure.add_scatter(
        x=[trial.points[-1].megabytes for trial in front], y=[trial.points[-1].mean_dice for trial in front],
        name="not beaten in both (Pareto front)", mode="lines", line={"color": "#7F7F7F", "width": 2},
        hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=[trial.points[-1].megabytes for trial in finished], y=[trial.points[-1].mean_dice for trial in finished],
        name="finished trials", mode="markers+text", textposition="top center",
        text=[str(trial.number) for trial in finished], cliponaxis=False,
        marker={"symbol": "circle", "size": 9, "color": COLOURS[0]},
        customdata=[_hover(trial) for trial in finished],
        hovertemplate="%{customdata}<br>%{x:.3g} MB, Dice %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(showgrid=True)
    words = "; ".join(
        f"trial {trial.number} {trial.points[-1].mean_dice:.3f} for {trial.points[-1].megabytes:.1f} MB"
        for trial in finished
    )
    return Chart("Dice by traffic", f"Dot chart with the Pareto front. {words}.", figure)


def _hover(trial: TrialRecord) -> str:
    """The trial and its values, a line each."""
    values = describe_params(trial.params).replace(", ", "<br>")
    return f"trial {trial.number}<br>" + chart_text(values).replace("&lt;br&gt;", "<br>")
