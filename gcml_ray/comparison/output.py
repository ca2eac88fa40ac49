"""What a comparison leaves on disk: one small file a finished cell, and from these the tables, verdicts and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gcml_ray.comparison.cells import Cell, MethodRow, Score, check_same_cases, read_cell, site_verdicts, summarise
from gcml_ray.comparison.config import ComparisonConfig, cell_name
from gcml_ray.comparison.table import csv_text, latex, markdown
from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.files.whole_files import replace_file
from gcml_ray.records import EvaluationReport, RoundRecord

OF_A_SECOND_MODEL = {"incoming_segmentation", "shared_segmentation"}  # losses of a round that trained two


@dataclass(frozen=True)
class Tables:
    """What is known so far: the rows of the table, best first, the verdicts in words, and the unit of HD95."""

    rows: tuple[MethodRow, ...]
    verdicts: tuple[str, ...]
    files: tuple[Path, ...]
    unit: str


def cell_file(comparison: ComparisonConfig, method: str, seed: int) -> Path:
    """Where a finished cell is kept."""
    return Path(comparison.results) / f"{cell_name(method, seed)}.csv"


def finished_cells(comparison: ComparisonConfig) -> tuple[Cell, ...]:
    """All finished cells, by method and seed.

    Raises:
        DataError: a file is no cell, or two of them were scored on different cases.
    """
    paths = [cell_file(comparison, method, seed) for method in comparison.methods for seed in comparison.seeds]
    cells = {path: read_cell(path) for path in paths if path.exists()}
    check_same_cases(cells)
    return tuple(cells.values())


def make_cell(
    method: str,
    seed: int,
    config: Config,
    evaluations: Iterable[EvaluationReport],
    rounds: Iterable[RoundRecord],
) -> Cell:
    """A finished run as a cell. A step that trains two models counts as two: a mutual one, Ditto's, ProxyFL's."""
    rounds = tuple(rounds)
    reports = [report for record in rounds for report in record.trained]
    return Cell(
        method=method,
        seed=seed,
        identity=config.identity,
        sent_bytes=sum(receipt.size_bytes for record in rounds for receipt in record.pushes if receipt.accepted),
        seconds=sum(record.seconds for record in rounds),
        num_steps=sum(r.num_steps * (2 if OF_A_SECOND_MODEL & r.losses.keys() else 1) for r in reports),
        scores=tuple(
            Score(s.site, s.case, s.model, s.class_name, s.dice, s.hd95, s.surface_dice)
            for evaluation in evaluations
            for s in evaluation.scores
        ),
    )


def write_tables(comparison: ComparisonConfig, *, unit: str) -> Tables:
    """Table and verdicts of what is finished so far, into ``output``."""
    folder = Path(comparison.output)
    cells = finished_cells(comparison)
    rows = summarise(cells, bounds=comparison.bounds)
    if not rows:
        return Tables((), (), (), unit)
    verdicts = site_verdicts(cells, method=comparison.focus, alone=comparison.alone)
    texts = {
        "table.md": "\n".join([markdown(rows, unit=unit), *verdicts, ""]),
        "table.csv": csv_text(rows, unit=unit),
        "table.tex": latex(rows, unit=unit),
    }
    for name, text in texts.items():
        replace_file(folder / name, text)
    return Tables(rows, verdicts, tuple(folder / name for name in texts), unit)


def draw_plots(comparison: ComparisonConfig, rows: tuple[MethodRow, ...]) -> tuple[Path, ...]:
    """All plots that there is something for, into ``output``."""
    if not rows:
        return ()
    from gcml_ray.report import comparison as report_comparison  # noqa: PLC0415 - matplotlib, slow
    from gcml_ray.report import cross_site as report_cross_site  # noqa: PLC0415 - matplotlib, slow
    from gcml_ray.report import teaching as report_teaching  # noqa: PLC0415 - matplotlib, slow

    folder = Path(comparison.output)
    folders = _folders(comparison)
    rounds = {method: [one.rounds() for one in own] for method, own in folders.items()}
    runs = {method: seeds for method, seeds in rounds.items() if any(seeds)}
    cross_site = {method: [one.cross_site() for one in own] for method, own in folders.items()}
    report_comparison.plot_dice_against_bytes(rows, folder / "dice_against_bytes.png")
    report_comparison.plot_site_dice(rows, folder / "dice_by_site.png")
    if runs:
        report_comparison.plot_dice_by_round(runs, rows, folder / "dice_by_round.png")
    report_teaching.plot_gains_by_method(runs, folder / "who_taught_whom.png")
    report_cross_site.plot_cross_site_by_method(cross_site, folder / "cross_site.png")
    return tuple(sorted(folder.glob("*.png")))


def _folders(comparison: ComparisonConfig) -> dict[str, list[RunFolder]]:
    """The run folders of each method's finished seeds, as far as they are here."""
    return {
        method: [
            RunFolder(Path(comparison.output) / cell_name(method, seed))
            for seed in comparison.seeds
            if cell_file(comparison, method, seed).exists()
        ]
        for method in comparison.methods
    }
