"""``gcml report``: one HTML page about a run, a comparison or a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gcml_ray.console.terminal import terminal
from gcml_ray.errors import ConfigError


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, of a comparison, or of a search.")],
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The page; default: report.html in the folder.")
    ] = None,
    regions: Annotated[
        bool, typer.Option("--regions/--no-regions", help="Compute the example of what mutual learning compares.")
    ] = True,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Pictures of patients; without them the page holds none.")
    ] = True,
) -> None:
    """Write one HTML page that shows a run, a comparison or a search, to read offline and to hand on."""
    try:
        from gcml_ray.report.page.write import write_report  # noqa: PLC0415 - plotly is an extra, and takes a second
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("plotly", "jinja2"):
            raise
        raise ConfigError(f"gcml report needs {error.name}: pip install 'gcml-ray[report]'") from error
    console = terminal()
    hint = "; an example of the regions, if there is one, takes longest (--no-regions)" if images and regions else ""
    console.print(f"reading {folder}, drawing its charts{hint}")
    with console.status("drawing"):
        page = write_report(folder, out, with_images=images, with_regions=regions)
    console.print(f"report  {page}  ({page.stat().st_size / 1e6:.1f} MB, one file)")
