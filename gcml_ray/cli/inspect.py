"""``gcml inspect``: what a datalist holds, and where its sites differ."""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gcml_ray.data.datalist import SPLITS, listed, read_datalist

FEW_SITES = 5  # for which a table has room for ranges

if TYPE_CHECKING:
    from gcml_ray.inspection.cases import CaseFacts, Inspection
    from gcml_ray.inspection.sites import Quantity


def inspect(
    datalist: Annotated[Path, typer.Argument(help="The datalist (JSON).")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for picture and table; default: <datalist>_inspect beside the datalist.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Headers only: sizes and voxel sizes.")] = False,
    real_spacing: Annotated[
        bool, typer.Option("--spacing/--no-spacing", help="Whether voxel sizes in the headers mean something.")
    ] = True,
) -> None:
    """Show what a datalist holds, what is wrong with it, and where its sites differ (tables and a picture)."""
    from gcml_ray.inspection.cases import inspect_cases  # noqa: PLC0415 - seconds to import
    from gcml_ray.inspection.sites import quantities  # noqa: PLC0415
    from gcml_ray.report.inspection import write_inspection  # noqa: PLC0415

    cases = read_datalist(datalist)
    with Progress(transient=True) as bar:
        task = bar.add_task("reading headers" if quick else "reading")
        inspection = inspect_cases(
            cases,
            quick=quick,
            spacing_is_real=real_spacing,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    folder = out or datalist.with_name(f"{datalist.stem}_inspect")
    write_inspection(folder / "sites.png", inspection, title=datalist.stem)
    write_cases(folder / "cases.csv", inspection)
    console = Console(soft_wrap=True)
    found = quantities(inspection)
    console.print(sites_table(inspection))
    if not inspection.is_quick and found:
        console.print(quantities_table(inspection, found))
    for heading, lines, style in (("note", inspection.notes, "yellow"), ("problem", inspection.problems, "red")):
        if lines:
            console.print(f"{len(lines)} {heading}(s):{listed(lines)}", style=style, highlight=False, markup=False)
    if not inspection.problems:
        console.print("No problem found.", style="green")
    console.print(f"Picture: {folder / 'sites.png'}\nEvery case: {folder / 'cases.csv'}", highlight=False, markup=False)
    if inspection.problems:
        raise typer.Exit(1)


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


def write_cases(path: Path, inspection: Inspection) -> None:
    """One line a case, everything that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels, values = inspection.channel_names, inspection.label_values
    header = ["site", "case", "split", "shape", "spacing_mm", "orientation"]
    header += [f"{name}_{part}" for name in channels for part in ("p1", "p25", "p50", "p75", "p99", "zero_share")]
    header += [f"label_{value}_{part}" for value in values for part in ("size", "pieces")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "problems", "notes"])
        for case in inspection.cases:
            writer.writerow([*_cells(case, channels, values), "; ".join(case.problems), "; ".join(case.notes)])


def _cells(case: CaseFacts, channels: Sequence[str], values: Sequence[int]) -> list[str]:
    cells = [
        case.site,
        case.name,
        case.split or "",
        _times(case.shape),
        _times(case.spacing_mm),
        case.orientation or "",
    ]
    by_name = {each.name: each for each in case.channels}
    for name in channels:
        facts = by_name.get(name)
        cells += [""] * 6 if facts is None else [f"{value:g}" for value in (*facts.percentiles, facts.zero_share)]
    by_value = {each.value: each for each in case.labels}
    for value in values:
        label = by_value.get(value)
        cells += ["0", "0"] if label is None else [f"{label.size:g}", str(label.num_pieces)]
    return cells


def _times(sides: Sequence[float] | None) -> str:
    return "" if sides is None else "x".join(f"{side:g}" for side in sides)


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
