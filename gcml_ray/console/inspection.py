"""The tables of ``gcml inspect``."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from gcml_ray.data.datalist import SPLITS
from gcml_ray.inspection.facts import Inspection
from gcml_ray.inspection.sites import Quantity

FEW_SITES = 5  # for which a table has room for ranges


def sites_table(inspection: Inspection) -> Table:
    """Cases, sizes and voxel sizes of each site; columns that say nothing are left out."""
    columns: dict[str, list[str]] = {
        heading: [] for heading in ("cases", "train/val/test", "voxels", "mm", "axes", "faulty")
    }
    for site in inspection.sites:
        own = inspection.of_site(site)
        splits = Counter(case.split for case in own)
        spacings = [case.spacing_mm for case in own if case.spacing_mm is not None and inspection.spacing_is_real]
        num_faulty = sum(bool(case.problems) for case in own)
        columns["cases"].append(str(len(own)))
        columns["train/val/test"].append("-" if splits[None] else "/".join(str(splits[split]) for split in SPLITS))
        columns["voxels"].append(_ranges([case.shape for case in own if case.shape is not None]))
        columns["mm"].append(_ranges(spacings))
        columns["axes"].append(", ".join(sorted({case.orientation for case in own if case.orientation})) or "-")
        columns["faulty"].append(str(num_faulty) if num_faulty else "-")
    shown = {heading: cells for heading, cells in columns.items() if set(cells) != {"-"}}
    table = Table(title="Sites", title_justify="left")
    table.add_column("site")
    for heading in shown:
        table.add_column(heading, justify="right")
    for site, *cells in zip(inspection.sites, *shown.values(), strict=True):
        table.add_row(site, *cells)
    return table


def quantities_table(inspection: Inspection, found: Sequence[Quantity]) -> Table:
    """Median over each site's cases and its range, and how much comes with the site; of many sites the extremes."""
    is_short = len(inspection.sites) > FEW_SITES
    title = "Median (smallest to largest) of a site's cases; how far sites differ"
    if is_short:
        title = "Median of a site's cases, at the sites where it is lowest and highest; how far sites differ"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in (*(("lowest", "highest") if is_short else inspection.sites), "sites are"):
        table.add_column(heading, justify="right")
    for each in found:
        if each.kind in ("size", "spacing"):
            continue
        share = "" if math.isnan(each.site_share) else f" ({100 * each.site_share:.0f} %)"
        cells = _extremes(each) if is_short else [_spread(each.by_site[site]) for site in inspection.sites]
        unit = f" ({each.unit})" if each.kind == "label" else ""
        table.add_row(f"{each.name}{unit}", *cells, f"{each.verdict}{share}")
    return table


def _ranges(sizes: Sequence[Sequence[float]]) -> str:
    """``128x128x20..60``: one number an axis, or the smallest and largest."""
    if not sizes:
        return "-"
    axes = [(min(sides), max(sides)) for sides in zip(*sizes, strict=False)]
    return "x".join(f"{low:g}" if low == high else f"{low:g}..{high:g}" for low, high in axes)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}\n({min(values):.3g} to {max(values):.3g})" if values else "-"


def _extremes(quantity: Quantity) -> list[str]:
    """The lowest and the highest of the sites' medians, each with its site."""
    medians = sorted((statistics.median(values), site) for site, values in quantity.by_site.items() if values)
    return [f"{value:.3g}\n({site})" for value, site in (medians[0], medians[-1])] if medians else ["-", "-"]
