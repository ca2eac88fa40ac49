"""What a comparison leaves on disk: one small file a finished cell, and from these the tables and verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gcml_ray.comparison.cells import Cell, MethodRow, check_same_cases, read_cell, site_verdicts, summarise
from gcml_ray.comparison.config import ComparisonConfig, cell_name
from gcml_ray.comparison.table import csv_text, latex, markdown
from gcml_ray.config import Config
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
        scores=tuple(score for evaluation in evaluations for score in evaluation.scores),
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
