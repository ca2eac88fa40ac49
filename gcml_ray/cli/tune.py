"""``gcml tune``: search the weights of a federation, then train and test the winner."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from gcml_ray.cli.running import STOPPED, watched, wide_console
from gcml_ray.console.search import SearchConsole, final_table, search_table, search_verdict
from gcml_ray.errors import ConfigError
from gcml_ray.tracking.metrics import flat_params
from gcml_ray.wording import in_shell

if TYPE_CHECKING:
    from tune.trial_config import Search


def tune(
    config: Annotated[Path | None, typer.Argument(help="Search file (YAML).")] = None,
    overrides: Annotated[list[str], typer.Option("--set", help="Override a key of the search: budget.trials=8.")] = [],  # noqa: B006 - typer copies it
    base_overrides: Annotated[
        list[str], typer.Option("--base-set", help="Override a key of the federation: federation.rounds=6.")
    ] = [],  # noqa: B006 - typer copies it
    resume: Annotated[Path | None, typer.Option(help="Go on with the search in this folder.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="With --resume: failed trials too.")] = False,
    final: Annotated[
        Path | None,
        typer.Option(
            help="Train this search's winner with new seeds, and the federation's own values if others won; test once."
        ),
    ] = None,
) -> None:
    """Search the weights of mutual learning (or any key) by validation Dice; then test the winner, once."""
    if sum(given is not None for given in (config, resume, final)) != 1:
        raise ConfigError("give a search file, or --resume or --final with the folder of a search")
    if config is None and (overrides or base_overrides):
        raise ConfigError("--set and --base-set cannot change a search that has begun")
    if retry_failed and resume is None:
        raise ConfigError("--retry-failed would be ignored without --resume")
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("gcml tune needs optuna, which is not installed: pip install 'gcml-ray[tune]'")
    from tune.search_file import load_search, reopen_search  # noqa: PLC0415 - the command line knows all packages

    console = wide_console()
    if final is not None:
        _final(reopen_search(final), console)
    elif resume is not None:
        _search(reopen_search(resume), console, resume=True, retry_failed=retry_failed)
    elif config is not None:
        search = load_search(config, tuple(overrides), tuple(base_overrides))
        _search(search, console, resume=False, retry_failed=False)


def _search(search: Search, console: Console, *, resume: bool, retry_failed: bool) -> None:
    """Runs a search, shows and keeps what came of it."""
    from gcml_ray.report.search import write_search_plots  # noqa: PLC0415 - matplotlib only at the end
    from gcml_ray.tracking.search import SearchTracker  # noqa: PLC0415
    from tune.search import BEST_FILE, blank_record, run_search  # noqa: PLC0415 - ray only when a search runs
    from tune.search_file import SEARCH_FILE  # noqa: PLC0415

    name, objective = search.config.name, search.config.objective
    stop = threading.Event()
    params = flat_params(search.config.model_dump(mode="json"))
    tracker = SearchTracker(search.base, search.folder, name=name, objective=objective, params=params)
    try:
        with SearchConsole(console, search=blank_record(search)) as live:
            record = run_search(search, views=(live, tracker), stop=stop, resume=resume, retry_failed=retry_failed)
    except KeyboardInterrupt:
        tracker.abandon("KILLED")
        _say_stopped(console, f"--resume {in_shell(search.folder)}")
        raise
    except BaseException:
        tracker.abandon("FAILED")
        raise
    plots: Sequence[Path] = ()
    try:
        plots = write_search_plots(record, search.folder / "plots")
    except OSError as error:
        console.print(f"the plots were not written ({error}); gcml report shows the same", style="yellow")
    files = [search.folder / file for file in (SEARCH_FILE, BEST_FILE) if (search.folder / file).exists()]
    tracker.finish(record, [*files, *plots], is_stopped=stop.is_set())
    console.print(search_table(record))
    console.print(search_verdict(record))
    console.print(f"search folder {search.folder}")
    if stop.is_set():
        _say_stopped(console, f"--resume {in_shell(search.folder)}")
        raise typer.Exit(STOPPED)
    if record.best is None:
        raise typer.Exit(1)
    console.print(f"train it      gcml run {in_shell(search.folder / BEST_FILE)}")
    console.print(f"look at it    gcml report {in_shell(search.folder)}")
    if search.config.final.at_end:
        _final(search, console)
    else:
        console.print(f"test it once  gcml tune --final {in_shell(search.folder)}")


def _final(search: Search, console: Console) -> None:
    """Trains and tests the winner of a search."""
    from tune.final import run_final  # noqa: PLC0415 - ray only when it runs

    try:
        final = run_final(search, watch=partial(watched, console))
    except KeyboardInterrupt:  # pressed twice
        final = None
    if final is None:
        _say_stopped(console, f"--final {in_shell(search.folder)}")
        raise typer.Exit(STOPPED)
    console.print(final_table(final))
    console.print(final.verdict)


def _say_stopped(console: Console, options: str) -> None:
    console.print(f"stopped; continue with: gcml tune {options}")
