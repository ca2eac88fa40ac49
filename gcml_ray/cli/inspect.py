"""``gcml inspect``: what a datalist holds, and where its sites differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gcml_ray.console.progress import counted
from gcml_ray.console.terminal import terminal
from gcml_ray.data.datalist import listed, read_datalist


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
    from gcml_ray.console.inspection import quantities_table, sites_table  # noqa: PLC0415 - seconds to import
    from gcml_ray.inspection.case_table import write_cases  # noqa: PLC0415
    from gcml_ray.inspection.cases import inspect_cases  # noqa: PLC0415
    from gcml_ray.inspection.sites import quantities  # noqa: PLC0415
    from gcml_ray.report.inspection import write_inspection  # noqa: PLC0415

    cases = read_datalist(datalist)
    with counted(terminal(is_error=True), "reading headers" if quick else "reading") as progress:
        inspection = inspect_cases(cases, quick=quick, spacing_is_real=real_spacing, progress=progress)
    folder = out or datalist.with_name(f"{datalist.stem}_inspect")
    write_inspection(folder / "sites.png", inspection, title=datalist.stem)
    write_cases(folder / "cases.csv", inspection)
    console = terminal()
    found = quantities(inspection)
    console.print(sites_table(inspection))
    if not inspection.is_quick and found:
        console.print(quantities_table(inspection, found))
    for heading, lines, style in (("note", inspection.notes, "yellow"), ("problem", inspection.problems, "red")):
        if lines:
            console.print(f"{len(lines)} {heading}(s):{listed(lines)}", style=style)
    if not inspection.problems:
        console.print("No problem found.", style="green")
    console.print(f"Picture: {folder / 'sites.png'}\nEvery case: {folder / 'cases.csv'}")
    if inspection.problems:
        raise typer.Exit(1)
