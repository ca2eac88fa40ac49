"""Every site's personalised model at every site, as a map: of one run, and of the methods of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import cross_site_dice
from gcml_ray.records import CaseScore
from gcml_ray.report.axes import save_figure
from gcml_ray.report.site_maps import Field, SiteMap, draw_site_maps
from gcml_ray.report.words import natural_order, points

CAPTION = "mean test Dice (in points against the model of the site where it was tested)"

Dice = Mapping[tuple[str, str], float]


def plot_cross_site(folder: RunFolder) -> Figure:
    """Models in rows, where they were tested in columns; the diagonal is each model at home.

    Raises:
        DataError: the run has no ``cross_site.csv``.
    """
    scores = folder.cross_site()
    dice = cross_site_dice([scores])
    if not dice:
        raise DataError(f"{folder.path}: models were not scored across sites (evaluation.cross_site)")
    return _draw({"": dice})


def plot_cross_site_by_method(runs: Mapping[str, Sequence[Sequence[CaseScore]]], path: Path) -> bool:
    """The same for methods, a map each, averaged over seeds; methods that were not scored so have none.

    Args:
        runs: for each method the rows of ``cross_site.csv`` of each of its seeds.
        path: the picture.

    Returns:
        Whether there was anything to draw.
    """
    by_method = {method: dice for method, seeds in runs.items() if (dice := cross_site_dice(seeds))}
    if not by_method:
        return False
    save_figure(_draw(by_method), path, dpi=150)
    return True


def _draw(by_method: Mapping[str, Dice]) -> Figure:
    sites = natural_order({name for dice in by_method.values() for pair in dice for name in pair})
    maps = [_map(method, dice) for method, dice in by_method.items()]
    return draw_site_maps(maps, sites, rows="model of", columns="tested at", caption=CAPTION)


def _map(title: str, dice: Dice) -> SiteMap:
    """Coloured by how much better a model is than the one of the site where it is tested."""
    fields = {}
    for (owner, site), value in dice.items():
        change = value - dice.get((site, site), value)
        fields[owner, site] = Field(100 * change, f"{value:.3f}", "" if owner == site else f"({points(change)})")
    return SiteMap(title, fields)
