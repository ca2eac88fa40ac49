"""``gcml compare``: runs every cell (method x seed) that is not finished, one after the other, and tabulates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from actors.driver import RunSummary
from actors.federation import ray_session, run_federation
from actors.listener import Listener
from gcml_ray.comparison import Cell, Score, read_cell, site_verdicts, summarise, write_cell
from gcml_ray.comparison_config import ComparisonConfig, cell_config, cell_name
from gcml_ray.comparison_table import csv_text, latex, markdown
from gcml_ray.config import Config
from gcml_ray.errors import ConfigError
from gcml_ray.records import RoundRecord
from gcml_ray.run_folder import RunFolder, replace_file

Watch = Callable[[str], AbstractContextManager[tuple[Listener, threading.Event]]]


def run_comparison(
    comparison: ComparisonConfig, overrides: Sequence[str], *, watch: Watch, say: Callable[[str], None]
) -> bool:
    """Runs what is missing; a cell that is finished is never run again.

    Args:
        comparison: what is compared.
        overrides: ``--set`` for every cell.
        watch: a listener and a stop event for one cell, by its title.
        say: shows one line.

    Returns:
        Whether all cells are finished; False where the run was stopped.

    Raises:
        ConfigError: a finished cell was made with another configuration.
    """
    configs = {
        (method, seed): cell_config(comparison, method, seed, overrides)
        for seed in comparison.seeds
        for method in comparison.methods
    }
    todo = [key for key in configs if not _is_finished(comparison, *key, configs[key])]
    say(f"{comparison.name}: {len(configs)} cells, {len(configs) - len(todo)} finished")
    if todo:
        with ray_session(configs[todo[0]]):
            for number, (method, seed) in enumerate(todo, start=1):
                title = f"{comparison.name} {number}/{len(todo)}: {method}, seed {seed}"
                with watch(title) as (listener, stop):
                    if not _run_cell(comparison, method, seed, configs[method, seed], listener=listener, stop=stop):
                        return False
                write_tables(comparison, unit=configs[method, seed].data.distance_unit)
    write_tables(comparison, unit=next(iter(configs.values())).data.distance_unit)
    return True


def cell_file(comparison: ComparisonConfig, method: str, seed: int) -> Path:
    """Where a finished cell is kept."""
    return Path(comparison.results) / f"{cell_name(method, seed)}.csv"


def finished_cells(comparison: ComparisonConfig) -> tuple[Cell, ...]:
    """All finished cells, by method and seed."""
    paths = (cell_file(comparison, method, seed) for method in comparison.methods for seed in comparison.seeds)
    return tuple(read_cell(path) for path in paths if path.exists())


def _is_finished(comparison: ComparisonConfig, method: str, seed: int, config: Config) -> bool:
    path = cell_file(comparison, method, seed)
    if not path.exists():
        return False
    cell = read_cell(path)
    if cell.identity != config.identity:
        raise ConfigError(
            f"{path} was made with another configuration ({cell.identity}, not {config.identity}): delete it to run "
            "the cell again, or give the comparison another results folder"
        )
    return True


def _run_cell(
    comparison: ComparisonConfig,
    method: str,
    seed: int,
    config: Config,
    *,
    listener: Listener,
    stop: threading.Event,
) -> bool:
    """Runs or resumes one cell; False where it was stopped."""
    resume = RunFolder(Path(config.output.folder)).state_file.exists()
    summary = run_federation(config, listener=listener, stop=stop, resume=resume)
    if summary.status != "finished":
        return False
    rounds = RunFolder(Path(config.output.folder)).rounds()
    write_cell(cell_file(comparison, method, seed), make_cell(method, seed, config, summary, rounds))
    return True


def make_cell(method: str, seed: int, config: Config, summary: RunSummary, rounds: Iterable[RoundRecord]) -> Cell:
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
            for evaluation in summary.evaluations
            for s in evaluation.scores
        ),
    )


def write_tables(comparison: ComparisonConfig, *, unit: str) -> str:
    """Table, verdicts and plots of what is finished so far, into ``output``; returns the Markdown."""
    from gcml_ray import report_comparison  # noqa: PLC0415 - matplotlib only when there is something to plot

    folder = Path(comparison.output)
    cells = finished_cells(comparison)
    rows = summarise(cells)
    if not rows:
        return ""
    text = markdown(rows, unit=unit)
    verdicts = site_verdicts(cells, method=comparison.focus, alone=comparison.alone)
    replace_file(folder / "table.md", "\n".join([text, *verdicts, ""]))
    replace_file(folder / "table.csv", csv_text(rows, unit=unit))
    replace_file(folder / "table.tex", latex(rows, unit=unit))
    report_comparison.plot_dice_against_bytes(rows, folder / "dice_against_bytes.png")
    report_comparison.plot_site_dice(rows, folder / "dice_by_site.png")
    by_method = {
        method: [
            RunFolder(folder / cell_name(method, seed)).rounds()
            for seed in comparison.seeds
            if (folder / cell_name(method, seed) / "rounds.jsonl").exists()
        ]
        for method in comparison.methods
    }
    runs = {name: seeds for name, seeds in by_method.items() if seeds}
    report_comparison.plot_dice_by_round(runs, folder / "dice_by_round.png")
    return "\n".join([text, *verdicts])
