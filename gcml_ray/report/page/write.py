"""One self-contained HTML page about a run, a comparison or a search: ``gcml report``."""

from __future__ import annotations

from pathlib import Path

from gcml_ray.comparison.cells import COLUMNS
from gcml_ray.errors import DataError
from gcml_ray.files.whole_files import replace_file
from gcml_ray.report.page.parts import Page, render
from gcml_ray.report.page.records import read_run
from gcml_ray.report.page.run import run_page
from gcml_ray.search.folder import RECORD_FILE

PAGE_FILE = "report.html"


def write_report(folder: Path, out: Path | None = None, *, with_images: bool = True, with_regions: bool = True) -> Path:
    """Writes the page about a run, a search, or a comparison (a folder of runs, or of finished cells).

    Args:
        folder: ``output.folder`` of a run; ``folder`` of a search; ``output`` or ``results`` of a comparison.
        out: the page; ``report.html`` in ``folder`` where left out.
        with_images: whether pictures of patients go into the page.
        with_regions: whether an example of the regions of mutual learning is computed (takes both sites' models).

    Returns:
        The page's path.

    Raises:
        DataError: the folder is none of them, or the page cannot be written.
        CheckpointError: a file of a run cannot be read.
        ConfigError: a run's configuration cannot be read.
    """
    page = _page(folder, with_images=with_images, with_regions=with_regions)
    target = out or folder / PAGE_FILE
    try:
        replace_file(target, render(page))
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror}); give another file with --out") from error
    return target


def _page(folder: Path, *, with_images: bool, with_regions: bool) -> Page:
    from gcml_ray.report.page.comparison import comparison_page, read_cells, read_runs  # noqa: PLC0415

    if (folder / RECORD_FILE).is_file():
        from gcml_ray.report.page.search import search_page  # noqa: PLC0415

        return search_page(folder)
    if (folder / "config.yaml").is_file():
        return run_page(read_run(folder), with_images=with_images, with_regions=with_regions)
    runs = read_runs(folder)
    cells = read_cells(folder)
    if runs or cells:
        return comparison_page(folder, runs, cells, with_images=with_images, with_regions=with_regions)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give that of a run, a comparison or a search")
    raise DataError(
        f"{folder} holds neither a run (config.yaml), nor folders of runs, nor a comparison's finished cells (CSV "
        f"files with the columns {', '.join(COLUMNS[:4])}...). Give output.folder of a run, or output or results of a "
        "comparison"
    )
