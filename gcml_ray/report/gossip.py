"""The gossip graph of a run: who sent to whom, how much, and what was refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from numpy.typing import NDArray

from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import PushReceipt
from gcml_ray.report.axes import empty_figure, finished_rounds, names_in_rounds, site_looks
from gcml_ray.report.words import megabytes
from gcml_ray.wording import count

PushesByEdge = dict[tuple[str, str], list[PushReceipt]]
REFUSED_COLOUR = "#D55E00"
BEND = 0.13  # of an arrow, so that both directions of a pair are seen
MARK_AT = 0.7  # share of an arrow before its mark: past its middle, where fewer arrows cross


def plot_gossip_graph(folder: RunFolder) -> Figure:
    """Who sent to whom: arrows as wide as their traffic, and the numbers as a table.

    Raises:
        DataError: no round is finished.
    """
    rounds = finished_rounds(folder)
    sites = names_in_rounds(rounds)
    by_edge: PushesByEdge = {}
    for receipt in folder.transfers():
        by_edge.setdefault((receipt.sender, receipt.receiver), []).append(receipt)
    sites += tuple(sorted({name for edge in by_edge for name in edge} - set(sites)))  # a server
    num_pushes = sum(map(len, by_edge.values()))
    table_width = max(3.4, 0.7 * len(sites) + 1.4) if num_pushes else 0.0
    size = max(5.0, 0.5 * len(sites) + 1.5)
    figure = empty_figure(size + table_width, size)
    if num_pushes:
        graph, table = figure.subplots(1, 2, width_ratios=(size, table_width))
        _draw_table(table, sites, by_edge)
    else:
        graph = figure.subplots()
    _draw_graph(graph, sites, by_edge)
    total = sum(receipt.size_bytes for receipts in by_edge.values() for receipt in receipts)
    num_refused = sum(map(_num_refused, by_edge.values()))
    in_rounds = f"in {count(len(rounds), 'round')}"
    text = f"{count(num_pushes, 'push', 'pushes')}, {num_refused} refused, {megabytes(total)} {in_rounds}"
    figure.suptitle(text if num_pushes else f"no pushes {in_rounds}", fontsize=11)
    return figure


def _draw_graph(axes: Axes, sites: Sequence[str], by_edge: PushesByEdge) -> None:
    """Sites on a circle; a cross on an arrow stands for refused pushes."""
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(sites)) / len(sites)
    places = dict(zip(sites, np.stack((np.cos(angles), np.sin(angles)), axis=1), strict=True))
    traffic = {edge: sum(receipt.size_bytes for receipt in receipts) for edge, receipts in by_edge.items()}
    widest = max(traffic.values(), default=0) or 1
    node_size = 17 if len(sites) <= 6 else 12
    thickest = 4.0 if len(by_edge) <= 20 else 2.4
    for (sender, receiver), receipts in by_edge.items():
        start, end = places[sender], places[receiver]
        arrow = FancyArrowPatch(
            (start[0], start[1]),
            (end[0], end[1]),
            connectionstyle=f"arc3,rad={BEND}",
            arrowstyle="-|>",
            mutation_scale=13 if len(by_edge) <= 20 else 9,
            shrinkA=node_size * 0.9,
            shrinkB=node_size * 0.9,
            lw=0.5 + (thickest - 0.5) * traffic[sender, receiver] / widest,
            color="0.4",
            alpha=0.8,
        )
        axes.add_patch(arrow)
        if _num_refused(receipts):
            axes.plot(*_on_arrow(start, end), "x", color=REFUSED_COLOUR, ms=7, mew=2.2, zorder=4)
    for (site, (x, y)), (colour, _) in zip(places.items(), site_looks(sites).values(), strict=True):
        axes.plot(x, y, "o", ms=node_size * 1.3, color=colour, mec="white", mew=1.5, zorder=5)
        side = "center" if abs(x) < 0.3 else "left" if x > 0 else "right"
        axes.text(1.17 * x, 1.17 * y, site, ha=side, va="center", fontsize=10, zorder=6)
    axes.set(xlim=(-1.6, 1.6), ylim=(-1.35, 1.35), aspect="equal")
    axes.set_axis_off()
    handles = [
        Line2D([], [], color="0.4", lw=thickest, label=megabytes(widest)),
        Line2D([], [], color=REFUSED_COLOUR, marker="x", ms=7, mew=2.2, ls="none", label="pushes were refused"),
    ]
    if by_edge:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False, fontsize=9)


def _on_arrow(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """A point of the quadratic Bezier curve that "arc3" draws, :data:`MARK_AT` of the way."""
    control = (start + end) / 2 + BEND * np.array((end[1] - start[1], start[0] - end[0]))
    return (1 - MARK_AT) ** 2 * start + 2 * MARK_AT * (1 - MARK_AT) * control + MARK_AT**2 * end


def _draw_table(axes: Axes, sites: Sequence[str], by_edge: PushesByEdge) -> None:
    """Senders in rows, receivers in columns: accepted pushes, refused ones with a minus, MB."""
    counts = np.full((len(sites), len(sites)), np.nan)
    for (sender, receiver), receipts in by_edge.items():
        counts[sites.index(sender), sites.index(receiver)] = sum(receipt.accepted for receipt in receipts)
    highest = np.nanmax(counts) if np.isfinite(counts).any() else 1.0
    axes.imshow(counts, cmap="Blues", vmin=0, vmax=2 * max(1.0, highest), aspect="auto")
    size = 10 if len(sites) <= 6 else 7.5
    for (sender, receiver), receipts in by_edge.items():
        row, column = sites.index(sender), sites.index(receiver)
        traffic = megabytes(sum(receipt.size_bytes for receipt in receipts))
        num_refused = _num_refused(receipts)
        axes.text(column, row - 0.14, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=size + 1)
        axes.text(column, row + 0.2, traffic, ha="center", va="center", fontsize=size - 2, color="0.25")
        if num_refused:
            axes.text(column + 0.46, row - 0.4, f"\u2212{num_refused}", ha="right", va="center", fontsize=size - 1,
                      color="#B03A00", fontweight="bold")  # fmt: skip
    axes.set_xticks(range(len(sites)), sites, rotation=90 if len(sites) > 6 else 0)
    axes.set_yticks(range(len(sites)), sites)
    axes.set(xlabel="receiver", ylabel="sender")
    axes.set_title("accepted pushes (\u2212n: refused), traffic", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _num_refused(receipts: Sequence[PushReceipt]) -> int:
    return sum(not receipt.accepted for receipt in receipts)
