"""``gcml site``: sites that join or leave a run that is going on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gcml_ray.console.terminal import terminal
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.wording import in_shell

site_app = typer.Typer(no_args_is_help=True, help="Let a site join or leave a run that is going on.")

Run = Annotated[Path, typer.Argument(help="The run's folder (output.folder).")]
Site = Annotated[str, typer.Argument(help="The site's name in the datalist.")]


@site_app.command()
def add(run: Run, site: Site) -> None:
    """A site takes part from the next round on; one that was here before goes on from its checkpoint.

    A site that a finished run had lost is tested with the others when the run is resumed.
    """
    from actors.attendance import request  # noqa: PLC0415 - the command line knows all packages

    request(run, "add", site)
    folder = RunFolder.open(run)
    if folder.state_file.exists() and folder.read_state().status == "finished":
        words = f"Asked: {site} is tested too by gcml run --resume {in_shell(run)}"
        terminal().print(words)
        return
    _say(run, f"{site} joins before the next round")


@site_app.command()
def remove(run: Run, site: Site) -> None:
    """A site leaves before the next round; its files stay."""
    from actors.attendance import request  # noqa: PLC0415

    request(run, "remove", site)
    _say(run, f"{site} leaves before the next round")


def _say(run: Path, what: str) -> None:
    terminal().print(f"Asked: {what}. {run / 'log.txt'} tells when it has happened.")
