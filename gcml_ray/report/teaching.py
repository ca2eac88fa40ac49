"""Who taught whom, as a map with numbers: of one run, and of the methods of a comparison beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.gossip.teaching import gains_by_edge
from gcml_ray.prediction.averages import mean
from gcml_ray.records import Edge, RoundRecord
from gcml_ray.report.axes import finished_rounds, names_in_rounds, save_figure
from gcml_ray.report.site_maps import Field, SiteMap, draw_site_maps
from gcml_ray.report.words import points

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
    sites = names_in_rounds(rounds)
    gains = _between(sites, gains_by_edge(rounds))
    if not gains:
        raise DataError(f"{folder.path}: no validated round followed a push, so nobody is known to have taught anybody")
    return draw_site_maps([_map("", gains)], sites, rows="sender", columns="receiver", caption=CAPTION)


def plot_gains_by_method(runs: Mapping[str, Sequence[Sequence[RoundRecord]]], path: Path) -> bool:
    """The same for methods, a map each, the pushes of all seeds together; methods without pushes have none.

    Args:
        runs: for each method the rounds of each of its seeds.
        path: the picture.

    Returns:
        Whether there was anything to draw.
    """
    sites = names_in_rounds([record for seeds in runs.values() for rounds in seeds for record in rounds])
    merged = {method: _merged([gains_by_edge(rounds) for rounds in seeds]) for method, seeds in runs.items()}
    by_method = {method: between for method, gains in merged.items() if (between := _between(sites, gains))}
    if not by_method:
        return False
    seen = {name for gains in by_method.values() for edge in gains for name in (edge.sender, edge.receiver)}
    sites = tuple(site for site in sites if site in seen)  # not the one of pooled training
    maps = [_map(method, gains) for method, gains in by_method.items()]
    figure = draw_site_maps(maps, sites, rows="sender", columns="receiver", caption=CAPTION)
    save_figure(figure, path, dpi=150)
    return True


def _merged(gains: Sequence[Gains]) -> dict[Edge, tuple[float, ...]]:
    edges = sorted({edge for one in gains for edge in one})
    return {edge: tuple(value for one in gains for value in one.get(edge, ())) for edge in edges}


def _between(sites: Sequence[str], gains: Gains) -> dict[Edge, Sequence[float]]:
    """What sites taught each other; a server teaches nobody."""
    return {edge: values for edge, values in gains.items() if {edge.sender, edge.receiver} <= set(sites)}


def _map(title: str, gains: Gains) -> SiteMap:
    means = {edge: mean(values) for edge, values in gains.items()}
    return SiteMap(
        title,
        {
            (edge.sender, edge.receiver): Field(100 * means[edge], points(means[edge]), f"({len(values)})")
            for edge, values in gains.items()
        },
    )
