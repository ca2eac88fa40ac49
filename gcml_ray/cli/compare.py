"""``gcml compare``: several methods over several seeds on the same data, and a table of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from gcml_ray.cli.running import STOPPED, stop_on_signal, watched, wide_console
from gcml_ray.comparison.config import ComparisonConfig, cell_config, load_comparison
from gcml_ray.console.comparison import CellsConsole
from gcml_ray.console.comparison_tables import method_tables, site_table
from gcml_ray.console.terminal import print_while_read
from gcml_ray.files.run_folder import TRACKING_FILE
from gcml_ray.tracking.client import how_to_open, tracking_uri
from gcml_ray.wording import in_shell

if TYPE_CHECKING:
    from actors.compare import Ending, Views
    from actors.listener import Listener


def compare(
    config: Annotated[Path, typer.Argument(help="Comparison file (YAML): base, methods, seeds.")],
    overrides: Annotated[list[str], typer.Option("--set", help="Override a key of every cell.")] = [],  # noqa: B006 - typer copies it
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Federations at a time; by default as many as the cluster has room for.")
    ] = None,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Run nothing: tables and plots of the cells that are finished.")
    ] = False,
) -> None:
    """Run several methods over several seeds and tabulate them; finished cells are never run again."""
    from actors.compare import Views, run_comparison  # noqa: PLC0415 - the command line knows all packages

    console = wide_console()
    comparison = load_comparison(config, overrides)

    say = partial(print_while_read, console)
    how_to_go_on = f"stopped; the same command goes on where it was: gcml compare {in_shell(config)}"

    @contextmanager
    def open_views(at_once: int) -> Iterator[Views]:
        if at_once == 1:
            yield Views(cell=partial(watched, console), abort=lambda: None)
            return
        with CellsConsole(console, title=comparison.name) as cells, stop_on_signal(cells) as stop:

            @contextmanager
            def beside(title: str) -> Iterator[tuple[Listener, threading.Event]]:
                with cells.row(title) as row:
                    yield row, stop

            yield Views(cell=beside, abort=cells.abort)

    try:
        ending = run_comparison(
            comparison, overrides, open_views=open_views, say=say, at_once=at_once, tables_only=tables_only
        )
    except KeyboardInterrupt:
        say(how_to_go_on)
        raise
    _show(console, comparison, ending)
    for name, text in where_things_are(comparison, overrides).items():
        say(f"{name:<23}{text}")
    if ending.is_stopped:
        say(how_to_go_on)
        raise typer.Exit(STOPPED)
    if ending.failures:
        raise typer.Exit(1)


def _show(console: Console, comparison: ComparisonConfig, ending: Ending) -> None:
    """The table, the verdicts, and what failed."""
    rows = ending.tables.rows
    if rows:
        title = f"{comparison.name}: personalised models on the sites' own test cases, mean over sites"
        for table in method_tables(rows, title=title, unit=ending.tables.unit, console=console):
            console.print(table, soft_wrap=False)
        console.print(site_table(rows), soft_wrap=False)
    for line in ending.tables.verdicts:
        console.print(line)
    by_reason: dict[str, list[str]] = {}
    for title, reason in ending.failures.items():
        by_reason.setdefault(reason, []).append(title)
    for reason, titles in by_reason.items():
        text = reason.replace("\n", "\n  ")
        console.print(f"failed: {'; '.join(titles)}\n  {text}", style="red")


def where_things_are(comparison: ComparisonConfig, overrides: Sequence[str]) -> dict[str, str]:
    """What lies where, as commands and paths to copy; MLflow where the comparison was tracked."""
    places = {
        "table, plots and runs": comparison.output,
        "finished cells": comparison.results,
        "one page": f"gcml report {in_shell(comparison.output)}",
    }
    if (Path(comparison.output) / TRACKING_FILE).is_file():
        cell = cell_config(comparison, next(iter(comparison.methods)), comparison.seeds[0], overrides)
        uri = tracking_uri(cell, Path(cell.output.folder))
        places["MLflow"] = how_to_open(uri)
    return places
