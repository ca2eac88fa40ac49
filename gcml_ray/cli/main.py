"""The command line, ``gcml``: a command each in this package; the runs' own (demo, doctor, run) here.

This package is the composition root: it may import ``actors`` and ``tune``, inside its commands.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from gcml_ray.chaos import parse_chaos
from gcml_ray.cli.compare import compare
from gcml_ray.cli.export import export
from gcml_ray.cli.inspect import inspect
from gcml_ray.cli.predict import evaluate, predict
from gcml_ray.cli.prepare import prepare_app
from gcml_ray.cli.report import report
from gcml_ray.cli.running import STOPPED, watched
from gcml_ray.cli.site import site_app
from gcml_ray.cli.tune import tune
from gcml_ray.config import Config
from gcml_ray.config.file import load_config, setting
from gcml_ray.console.summary import (
    comparison_table,
    comparison_verdict,
    lost_words,
    run_facts,
    run_table,
    where_things_are,
)
from gcml_ray.console.terminal import print_while_read, terminal
from gcml_ray.errors import ConfigError, GcmlError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.tracking.client import import_lean_client
from gcml_ray.wording import in_shell

if TYPE_CHECKING:
    from actors.driver import RunSummary

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a key: method.dcml.beta=0.2, or 'method={name: local}'.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gcml-ray {importlib.metadata.version('gcml-ray')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Decentralised, personalised federated learning for medical image segmentation, on Ray."""
    del version  # its callback has answered


def main() -> None:
    """Runs the command line; the errors that a user can mend are shown without a traceback."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a site's name that a terminal cannot show must not end a run
    try:
        _check_here()
        app()
    except (GcmlError, OSError) as error:  # a disk that is full or read-only, a file where a folder should be
        words = str(error)
        if isinstance(error, OSError) and error.filename:
            words = f"{error.filename}: {error.strerror}"
        with suppress(OSError):  # the terminal may be gone
            terminal(is_error=True).print(f"error: {words}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(STOPPED)


def _open_closed_streams() -> None:
    """Libraries write to streams that whoever started us may have closed."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # takes the lowest that is free
            os.set_inheritable(number, True)
        os.close(number)
        sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115 - open as long as we run
        sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
        sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115


def _check_here() -> None:
    """Libraries that are loaded later end the process where its folder is gone."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder no longer exists: change to another one (cd) and try again") from error


def run(
    config: Annotated[Path | None, typer.Argument(help="Configuration file (YAML).")] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="With --resume: train no further round, test the models as they are.")
    ] = False,
    chaos: Annotated[
        str | None, typer.Option(help="Faults on purpose, e.g. 'kill:CS@r3,slow:HTx5'; with --resume '' drops them.")
    ] = None,
) -> None:
    """Train a personalised model at every site of a federation."""
    if (config is None) == (resume is None):
        both = "not both: the run folder has its configuration" if config is not None else "one of them"
        raise ConfigError(f"give a configuration file, or --resume with the folder of a run, {both}")
    if resume is not None and overrides:
        raise ConfigError(
            "--resume continues with the configuration in the run folder: --set cannot change it. For other settings "
            "begin a new run; network.start_from lets it begin with the models of this one (gcml export)"
        )
    if finish and resume is None:
        raise ConfigError("--finish ends a run that has begun: give its folder with --resume")
    if resume is not None:
        loaded = load_config(RunFolder.open(resume).config_file).in_folder(resume)
        if chaos is not None:
            parse_chaos(chaos)
            loaded = loaded.model_copy(update={"chaos": chaos})
    else:
        assert config is not None
        loaded = load_config(config, [*overrides, *([] if chaos is None else [setting("chaos", chaos)])])
    console = terminal()
    try:
        summary, _ = _run_once(loaded, console, title=loaded.name, resume=resume is not None, finish=finish)
    except KeyboardInterrupt:
        if RunFolder(Path(loaded.output.folder)).config_file.exists():
            _stopped(loaded)
        raise
    if summary.evaluations:
        console.print(run_table(summary.evaluations, unit=loaded.data.distance_unit))
    folder = RunFolder(Path(loaded.output.folder))
    facts = run_facts(
        folder.rounds(),
        start_seconds=summary.start_seconds,
        evaluations=summary.evaluations,
        chaos="; then ".join(folder.faults()),
    )
    console.print(facts)
    console.print(where_things_are(loaded))
    if summary.status == "finished" and (lost := lost_words(folder.read_state(), folder.path)):
        console.print(lost, style="yellow")
    _exit_for(summary, loaded)


def demo(
    folder: Annotated[Path, typer.Option(help="Where data and runs go.")] = Path("runs/demo"),
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """Make four phantom sites, train them together and alone, and compare: a few minutes on two cores."""
    from actors.run import ray_session  # noqa: PLC0415 - the one place that knows all packages
    from gcml_ray.demo import alone_config, demo_config, prepare_demo  # noqa: PLC0415 - scipy only where phantoms are made

    console = terminal()
    target = _fresh_folder(folder)
    console.print(f"Making phantom sites in {target / 'data'}")
    datalist = prepare_demo(target / "data")
    gcml = demo_config(datalist, target / "gcml", overrides)
    local = alone_config(gcml, target / "local")
    with ray_session(gcml):
        together, is_enough = _run_once(gcml, console, title="together (GCML)")
        _exit_for(together, gcml)
        if is_enough:  # Ctrl-C in its last round, or in its test
            console.print(run_table(together.evaluations, unit=gcml.data.distance_unit))
            console.print("stopped before the run of sites alone, the other half of the demo")
            raise typer.Exit(STOPPED)
        alone, _ = _run_once(local, console, title="alone (local)")
        _exit_for(alone, local)
    console.print(comparison_table(alone.evaluations, together.evaluations, unit=gcml.data.distance_unit))
    console.print(comparison_verdict(alone.evaluations, together.evaluations))
    console.print(where_things_are(gcml))


def doctor(
    config: Annotated[Path | None, typer.Argument(help="Configuration file to check as well.")] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """Check packages, machine, cluster and data before a run, and forecast what it will take."""
    if overrides and config is None:
        raise ConfigError("--set changes a configuration: name its file too, gcml doctor CONFIG --set ...")
    from actors.doctor import run_checks  # noqa: PLC0415 - the one place that knows all packages

    console = terminal()
    colours = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}
    counts = dict.fromkeys(colours, 0)
    for check in run_checks(None if config is None else str(config), overrides):
        counts[check.verdict] += 1
        verdict = Text(check.verdict, style=colours[check.verdict])
        console.print(Text.assemble(verdict, "  ", (check.name, "bold"), f": {check.detail}"))
        if check.remedy:
            console.print(f"      -> {check.remedy}")
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["FAIL"]:
        raise typer.Exit(1)


def _run_once(
    config: Config, console: Console, *, title: str, resume: bool = False, finish: bool = False
) -> tuple[RunSummary, bool]:
    """One federation with its console and its signal handling; and whether it was asked to stop, in time or not."""
    console.print(f"{title}: starting")
    from actors.run import run_federation  # noqa: PLC0415 - the one place that knows all packages

    if config.tracking.enabled:  # beside Ray's start; the tracker's own thread waits for it
        threading.Thread(target=_import_ahead, daemon=True).start()
    with watched(console, title) as (listener, stop):
        summary = run_federation(config, listener=listener, stop=stop, resume=resume, finish=finish)
        return summary, stop.is_set()


def _import_ahead() -> None:
    """MLflow's import; where it fails the tracker says so."""
    with suppress(Exception):
        import_lean_client()


def _exit_for(summary: RunSummary, config: Config) -> None:
    """Ends with an exit code, and what to do next, where a run did not finish or its test did not; else nothing."""
    console = terminal(is_error=True)
    folder = config.output.folder
    if summary.status == "stopped":
        _stopped(config)
    if summary.status == "failed":
        cause, remedy = "every site was lost", f"try again: gcml run --resume {in_shell(folder)}"
        if summary.infos:
            cause, remedy = "no site has trained in any round", "start in another folder"
        console.print(f"{cause}; see {folder}/log.txt, mend the cause and {remedy}", style="red")
        raise typer.Exit(1)
    if summary.untested:
        names = ", ".join(summary.untested)
        words = f"not tested: {names}; see {folder}/log.txt. Test again: gcml run --resume {in_shell(folder)}"
        console.print(words, style="red")
        raise typer.Exit(1)


def _stopped(config: Config) -> NoReturn:
    """Ends with the exit code of a run that was asked to stop."""
    words = f"stopped; continue with: gcml run --resume {in_shell(config.output.folder)}"
    print_while_read(terminal(is_error=True), words)
    raise typer.Exit(STOPPED)


def _fresh_folder(folder: Path) -> Path:
    """``folder``, or ``folder-2``, ``folder-3``... where it exists already."""
    candidates = [folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


app.add_typer(prepare_app, name="prepare")
app.add_typer(site_app, name="site")
# In the order in which they are needed.
for command in (demo, inspect, doctor, run, compare, tune, predict, evaluate, report, export):
    app.command()(command)

if __name__ == "__main__":
    main()
