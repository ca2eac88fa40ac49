"""What a comparison leaves on disk: one small file a finished cell, and from these the tables, verdicts and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gcml_ray.comparison import Cell, MethodRow, Score, read_cell, site_verdicts, summarise
from gcml_ray.comparison_config import ComparisonConfig, cell_name
from gcml_ray.comparison_table import csv_text, latex, markdown
from gcml_ray.config import Config
from gcml_ray.records import EvaluationReport, RoundRecord
from gcml_ray.run_folder import RunFolder, replace_file


@dataclass(frozen=True)
class Tables:
    """What is known so far: the rows of the table, best first, the verdicts in words, and the files they are in."""

    rows: tuple[MethodRow, ...]
    verdicts: tuple[str, ...]
    files: tuple[Path, ...]


def cell_file(comparison: ComparisonConfig, method: str, seed: int) -> Path:
    """Where a finished cell is kept."""
    return Path(comparison.results) / f"{cell_name(method, seed)}.csv"


def finished_cells(comparison: ComparisonConfig) -> tuple[Cell, ...]:
    """All finished cells, by method and seed."""
    paths = (cell_file(comparison, method, seed) for method in comparison.methods for seed in comparison.seeds)
    return tuple(read_cell(path) for path in paths if path.exists())


def make_cell(
    method: str,
    seed: int,
    config: Config,
    evaluations: Iterable[EvaluationReport],
    rounds: Iterable[RoundRecord],
) -> Cell:
    """A finished run as a cell. A mutual step counts as two optimiser steps: it trains two models."""
    rounds = tuple(rounds)
    reports = [report for record in rounds for report in record.trained]
    return Cell(
        method=method,
        seed=seed,
        identity=config.identity,
        sent_bytes=sum(receipt.size_bytes for record in rounds for receipt in record.pushes if receipt.accepted),
        seconds=sum(record.seconds for record in rounds),
        num_steps=sum(r.num_steps * (2 if "incoming_segmentation" in r.losses else 1) for r in reports),
        scores=tuple(
            Score(s.site, s.case, s.model, s.class_name, s.dice, s.hd95, s.surface_dice)
            for evaluation in evaluations
            for s in evaluation.scores
        ),
    )


def write_tables(comparison: ComparisonConfig, *, unit: str) -> Tables:
    """Table, verdicts and plots of what is finished so far, into ``output``."""
    folder = Path(comparison.output)
    cells = finished_cells(comparison)
    rows = summarise(cells)
    if not rows:
        return Tables((), (), ())
    verdicts = site_verdicts(cells, method=comparison.focus, alone=comparison.alone)
    texts = {
        "table.md": "\n".join([markdown(rows, unit=unit), *verdicts, ""]),
        "table.csv": csv_text(rows, unit=unit),
        "table.tex": latex(rows, unit=unit),
    }
    for name, text in texts.items():
        replace_file(folder / name, text)
    return Tables(rows, verdicts, (*(folder / name for name in texts), *_plot(comparison, rows)))


def _plot(comparison: ComparisonConfig, rows: tuple[MethodRow, ...]) -> tuple[Path, ...]:
    """All plots that there is something for."""
    from gcml_ray import report_comparison, report_teaching  # noqa: PLC0415 - matplotlib only when something is drawn

    folder = Path(comparison.output)
    runs = _runs(comparison)
    report_comparison.plot_dice_against_bytes(rows, folder / "dice_against_bytes.png")
    report_comparison.plot_site_dice(rows, folder / "dice_by_site.png")
    report_comparison.plot_dice_by_round(runs, folder / "dice_by_round.png")
    report_teaching.plot_gains_by_method(runs, folder / "who_taught_whom.png")
    return tuple(sorted(folder.glob("*.png")))


def _runs(comparison: ComparisonConfig) -> dict[str, list[tuple[RoundRecord, ...]]]:
    """The rounds of each method's seeds, as far as their run folders are here."""
    folders = {
        method: [RunFolder(Path(comparison.output) / cell_name(method, seed)) for seed in comparison.seeds]
        for method in comparison.methods
    }
    rounds = {method: [one.rounds() for one in own if one.rounds_file.exists()] for method, own in folders.items()}
    return {method: seeds for method, seeds in rounds.items() if seeds}
