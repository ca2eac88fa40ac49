"""Charts of what sites gave each other: the gossip graph over time, traffic, who taught whom, models at other sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from gcml_ray.prediction.averages import mean
from gcml_ray.records import Edge, PushReceipt, RoundRecord
from gcml_ray.report.page.parts import (
    COLOURS,
    Chart,
    chart_text,
    hatched,
    looks,
    new_figure,
    whole_numbers,
)
from gcml_ray.report.page.records import RunRecords
from gcml_ray.report.words import megabytes, natural_order, points
from gcml_ray.wording import count, number

ARROW, REFUSED = "#7F7F7F", COLOURS[1]
GAIN, LOSS = "0,114,178", "213,94,0"
GAP = 0.04  # of both directions of a pair from the line between them; the circle of sites has the radius 1
MAX_FRAMES = 400  # rounds on the slider; beyond, a page would grow by megabytes
MANY_EDGES = 30  # from here on arrows are thin
FEW_NAMES = 8  # up to here a cell of a map has room for two lines


def pushing_names(run: RunRecords) -> tuple[str, ...]:
    """Sites, then whoever else sent or received: a server."""
    others = {name for record in run.rounds for push in record.pushes for name in (push.sender, push.receiver)}
    return run.sites + natural_order(others - set(run.sites))


def gossip_graph(run: RunRecords) -> Chart:
    """Sites on a circle and arrows for pushes; a slider goes from all rounds together to each single one."""
    names = pushing_names(run)
    angles = [math.pi / 2 - 2 * math.pi * index / len(names) for index in range(len(names))]
    places = {name: (math.cos(angle), math.sin(angle)) for name, angle in zip(names, angles, strict=True)}
    figure = new_figure(height=480 if len(names) <= FEW_NAMES else 640)
    for name, each in looks(names).items():
        x, y = places[name]
        figure.add_scatter(
            x=[x], y=[y], mode="markers+text", text=[f"<b>{chart_text(name)}</b>"], name=chart_text(name),
            textposition=_label_side(x, y), cliponaxis=False, hoverinfo="skip",
            marker={"size": _node_size(names), "color": each.colour, "symbol": each.symbol},
        )  # fmt: skip
    with_pushes = [record for record in run.rounds if record.pushes]
    everything = [push for record in with_pushes for push in record.pushes]
    together = _arrows(everything, places)
    frames = [("all", together)]
    frames += [(str(r.plan.round_number), _arrows(r.pushes, places)) for r in with_pushes[:MAX_FRAMES]]
    steps = [{"label": label, "method": "relayout", "args": [{"annotations": arrows}]} for label, arrows in frames]
    figure.update_layout(
        showlegend=False,
        annotations=together,
        sliders=[{"steps": steps, "currentvalue": {"prefix": "round: "}, "pad": {"t": 30, "l": 8, "r": 8}}],
    )
    figure.update_xaxes(visible=False, range=[-1.5, 1.5], fixedrange=True)
    figure.update_yaxes(visible=False, range=[-1.35, 1.4], scaleanchor="x", fixedrange=True)
    pushes = count(len(everything), "push", "pushes")
    words = f"Graph of {count(len(names), 'participant')} and {pushes} between them; the map below has the numbers."
    return Chart("Pushes, all rounds together or one by one", words, figure)


def _node_size(names: Sequence[str]) -> int:
    """Pixels."""
    return 24 if len(names) <= FEW_NAMES else 14


def _label_side(x: float, y: float) -> str:
    """Where a name stands clear of the arrows: outside the circle."""
    if abs(x) < 0.3:
        return "top center" if y > 0 else "bottom center"
    return "middle right" if x > 0 else "middle left"


def _arrows(pushes: Sequence[PushReceipt], places: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """An arrow an edge, as wide as its accepted traffic; a cross on it where a push was refused."""
    by_edge: dict[Edge, list[PushReceipt]] = {}
    for push in pushes:
        by_edge.setdefault(Edge(push.sender, push.receiver), []).append(push)
    traffic = {edge: sum(push.size_bytes for push in own if push.accepted) for edge, own in by_edge.items()}
    widest = max(traffic.values(), default=0) or 1
    standoff = 0.75 * _node_size(list(places))
    extra_width = 3 if len(by_edge) <= MANY_EDGES else 1
    arrows: list[dict[str, Any]] = []
    for edge, own in by_edge.items():
        (x0, y0), (x1, y1) = _beside(places[edge.sender], places[edge.receiver])
        is_refused = not any(push.accepted for push in own)
        arrows.append({
            "x": round(x1, 3), "y": round(y1, 3), "ax": round(x0, 3), "ay": round(y0, 3), "xref": "x", "yref": "y",
            "axref": "x", "ayref": "y", "showarrow": True, "arrowhead": 2, "text": "",
            "arrowwidth": round(1 + extra_width * traffic[edge] / widest, 1), "arrowsize": 0.9,
            "arrowcolor": REFUSED if is_refused else ARROW, "standoff": standoff, "startstandoff": standoff,
        })  # fmt: skip
        if not all(push.accepted for push in own):
            arrows.append({
                "x": round(x0 + 0.62 * (x1 - x0), 3), "y": round(y0 + 0.62 * (y1 - y0), 3), "showarrow": False,
                "text": "<b>\u2715</b>", "font": {"size": 17, "color": REFUSED},
            })  # fmt: skip
    return arrows


def _beside(start: tuple[float, float], end: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Both ends moved a little to the right of the way, so that both directions of a pair are seen."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy) or 1.0
    aside = (GAP * dy / length, -GAP * dx / length)
    return (start[0] + aside[0], start[1] + aside[1]), (end[0] + aside[0], end[1] + aside[1])


def traffic_by_round(rounds: Sequence[RoundRecord]) -> Chart:
    """MB a round: taken, and refused on top with a hatch."""
    figure = new_figure(height=300, x_title="round", y_title="MB")
    numbers = [record.plan.round_number for record in rounds]
    for accepted, name, colour, hatch in ((True, "taken", COLOURS[0], ""), (False, "refused", REFUSED, "x")):
        sizes = [sum(p.size_bytes for p in record.pushes if p.accepted == accepted) / 1e6 for record in rounds]
        if accepted or any(sizes):
            figure.add_bar(
                x=numbers, y=sizes, name=name, hovertemplate="round %{x}: %{y:.1f} MB",
                marker=hatched(colour, hatch),
            )  # fmt: skip
    whole_numbers(figure, rounds[-1].plan.round_number)
    figure.update_layout(barmode="stack", showlegend=len(figure.data) > 1)
    total = sum(push.size_bytes for record in rounds for push in record.pushes)
    return Chart("Traffic by round", f"Bars of MB sent in each round, {megabytes(total)} in all.", figure)


def push_map(run: RunRecords) -> Chart:
    """Sender by receiver: pushes taken and their MB; refused ones with a minus."""
    by_edge: dict[Edge, list[PushReceipt]] = {}
    for record in run.rounds:
        for push in record.pushes:
            by_edge.setdefault(Edge(push.sender, push.receiver), []).append(push)
    taken = {edge: float(sum(push.accepted for push in own)) for edge, own in by_edge.items()}

    def words(edge: Edge) -> tuple[str, str]:
        size = megabytes(sum(push.size_bytes for push in by_edge[edge] if push.accepted))
        refused = len(by_edge[edge]) - int(taken[edge])
        return f"{taken[edge]:.0f}", size + (f", {refused} refused" if refused else "")

    text = "; ".join(f"{edge.sender} to {edge.receiver} {' pushes, '.join(words(edge))}" for edge in by_edge)
    figure = pair_map(pushing_names(run), taken, words, low=GAIN)
    return Chart("Pushes taken, and their size, by pair", f"Map of sender by receiver: {text}.", figure)


def gain_map(gains: Mapping[Edge, Sequence[float]]) -> Chart:
    """Sender by receiver: mean change of the receiver's validation Dice, in points, and how often it was seen."""
    names = natural_order({name for edge in gains for name in (edge.sender, edge.receiver)})
    means = {edge: 100 * mean(values) for edge, values in gains.items()}

    def words(edge: Edge) -> tuple[str, str]:
        return points(mean(gains[edge])), f"{len(gains[edge])}\u00d7"

    text = "; ".join(f"{edge.sender} to {edge.receiver} {points(mean(values))}" for edge, values in gains.items())
    figure = pair_map(names, means, words, low=LOSS)
    return Chart("Mean change by pair, in Dice points", f"Map of sender by receiver: {text}.", figure)


def cross_site_map(dice: Mapping[tuple[str, str], float]) -> Chart:
    """Whose model by where it was tested: mean Dice, and points against the model of the site where it was tested."""
    names = natural_order({name for pair in dice for name in pair})
    values = {Edge(owner, site): value for (owner, site), value in dice.items()}
    change = {edge: 100 * (value - dice.get((edge.receiver, edge.receiver), value)) for edge, value in values.items()}

    def words(edge: Edge) -> tuple[str, str]:
        is_home = edge.sender == edge.receiver
        return number(values[edge]), "at home" if is_home else points(change[edge] / 100)

    text = "; ".join(f"{edge.sender} at {edge.receiver} {number(value)}" for edge, value in values.items())
    figure = pair_map(names, change, words, low=LOSS, rows="model of", columns="tested at")
    return Chart("Mean test Dice of each model at each site", f"Map of model by site: {text}.", figure)


def pair_map(
    names: Sequence[str],
    values: Mapping[Edge, float],
    words: Callable[[Edge], tuple[str, str]],
    *,
    low: str,
    rows: str = "sender",
    columns: str = "receiver",
) -> go.Figure:
    """Senders in rows, receivers in columns; a number in each cell, its strength as a tint.

    Args:
        names: rows and columns.
        values: decide the tint; symmetric about 0 where one is negative.
        words: number and small print of a cell.
        low: RGB of the tint below 0.
        rows: title of the rows.
        columns: title of the columns.
    """
    figure = new_figure(height=150 + 62 * min(len(names), 14), x_title=columns, y_title=rows)
    labels = [chart_text(name) for name in names]
    grid = [[values.get(Edge(sender, receiver)) for receiver in names] for sender in names]
    largest = max((abs(value) for value in values.values()), default=0.0) or 1.0
    figure.add_heatmap(
        x=labels, y=labels, z=grid, zmin=-largest, zmax=largest, showscale=False, xgap=2, ygap=2, hoverinfo="skip",
        colorscale=[[0, f"rgba({low},0.6)"], [0.5, "rgba(127,127,127,0.08)"], [1, f"rgba({GAIN},0.6)"]],
    )  # fmt: skip
    is_small = len(names) > FEW_NAMES
    cells = {edge: words(edge) for edge in values if edge.sender in names and edge.receiver in names}
    figure.add_scatter(
        x=[chart_text(edge.receiver) for edge in cells], y=[chart_text(edge.sender) for edge in cells], mode="text",
        text=[cell[0] if is_small else f"<b>{cell[0]}</b><br>{cell[1]}" for cell in cells.values()],
        textfont={"size": 10 if is_small else 13},
        hovertext=[chart_text(f"{edge.sender} to {edge.receiver}: {', '.join(cell)}") for edge, cell in cells.items()],
        hoverinfo="text",
    )  # fmt: skip
    figure.update_xaxes(side="top", ticks="", showline=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", showline=False, title_standoff=16)
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(type="category", categoryorder="array", categoryarray=labels)
    return figure
