"""Maps of sites against sites, with numbers: red where something got worse, blue where it got better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from gcml_ray.report.axes import empty_figure

COLOUR_MAP = "RdBu"
MAX_COLUMNS = 3
NUMBERS_UP_TO = 12  # sites; in a larger map nobody could read them


@dataclass(frozen=True)
class Field:
    """One field of a map: ``points`` (Dice points) gives its colour, the texts stand in it, the second one small."""

    points: float
    text: str
    small_text: str


@dataclass(frozen=True)
class SiteMap:
    """Fields by (row, column), both names of sites; ``title`` stands above."""

    title: str
    fields: Mapping[tuple[str, str], Field]


def draw_site_maps(maps: Sequence[SiteMap], sites: Sequence[str], *, rows: str, columns: str, caption: str) -> Figure:
    """Maps beside each other, all with one scale of colours.

    Args:
        maps: at least one.
        sites: rows and columns in their order.
        rows: what the rows are.
        columns: what the columns are.
        caption: below all maps.
    """
    num_columns = min(MAX_COLUMNS, len(maps))
    num_rows = -(-len(maps) // num_columns)
    scale = 0.8 if len(maps) == 1 else 0.62
    side = max(3.0, scale * len(sites) + 1.2)
    figure = empty_figure(side * num_columns + 1.2, (side + 0.2) * num_rows + 0.4)
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    limit = max((abs(field.points) for one in maps for field in one.fields.values()), default=0.0) or 0.1
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    used = panels[: len(maps)]
    images = [_draw(axes, one, sites, limit=limit) for axes, one in zip(used, maps, strict=True)]
    for axes in used:
        axes.set(xlabel=columns, ylabel=rows)
    bar = figure.colorbar(images[0], ax=used, shrink=0.8 if num_rows == 1 else 0.5, aspect=25)
    bar.set_label("Dice points", fontsize=9)
    bar.outline.set_visible(False)
    figure.supxlabel(caption, fontsize=8, color="0.35")
    return figure


def _draw(axes: Axes, one: SiteMap, sites: Sequence[str], *, limit: float) -> AxesImage:
    colours = np.full((len(sites), len(sites)), np.nan)
    size = 9 if len(sites) <= 6 else 7
    for (row, column), field in one.fields.items():
        place = sites.index(row), sites.index(column)
        colours[place] = field.points
        if len(sites) <= NUMBERS_UP_TO:
            colour = "white" if abs(field.points) > 0.65 * limit else "0.1"
            axes.text(place[1], place[0] - 0.12, field.text, ha="center", va="center", fontsize=size, color=colour)
            axes.text(
                place[1], place[0] + 0.24, field.small_text, ha="center", va="center", fontsize=size - 2, color=colour
            )
    axes.set_xticks(range(len(sites)), sites, rotation=90 if len(sites) > 6 else 0, fontsize=9)
    axes.set_yticks(range(len(sites)), sites, fontsize=9)
    axes.set_title(one.title, fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes.imshow(colours, cmap=COLOUR_MAP, vmin=-limit, vmax=limit, aspect="auto")
