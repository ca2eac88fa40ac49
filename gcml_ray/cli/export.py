"""``gcml export``: a site's personalised model taken out of its run, in a format that others read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gcml_ray.console.terminal import terminal
from gcml_ray.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from gcml_ray.export.model import Exporter, Source

Format = Literal["safetensors", "torch", "onnx", "bundle", "pyfunc"]


def export(
    run: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    site: Annotated[list[str], typer.Option(help="Whose personalised model; repeat it, or 'all'.")],
    format_: Annotated[Format, typer.Option("--format", help="What to write.")],
    out: Annotated[Path, typer.Option(help="Folder for it; with several sites, a folder in it a site.")],
    force: Annotated[bool, typer.Option("--force", help="Write over files of an earlier export.")] = False,
    register: Annotated[bool, typer.Option("--register", help="pyfunc: register it in MLflow's registry.")] = False,
    tracking_uri: Annotated[str | None, typer.Option(help="pyfunc: MLflow to register in; default the run's.")] = None,
) -> None:
    """Take a personalised model away: safetensors, torch.export, ONNX, MONAI bundle or MLflow pyfunc."""
    from gcml_ray.export.model import (  # noqa: PLC0415 - torch only where needed
        fresh_folder,
        missing_models,
        open_source,
        sites_to_export,
    )

    if (register or tracking_uri) and format_ != "pyfunc":
        raise ConfigError(f"--register and --tracking-uri would be ignored by --format {format_}: only pyfunc has them")
    if tracking_uri and not register:
        raise ConfigError("--tracking-uri would be ignored without --register")
    console = terminal()
    sites = sites_to_export(run, site)
    several = len(sites) > 1 or "all" in site
    write = _exporter(format_)
    missing: list[str] = []
    for name in sites:
        try:
            source, folder = open_source(run, name), out / name if several else out
        except CheckpointError as error:
            if "all" not in site:
                raise
            missing.append(f"{name}: {error}")
            continue
        registry = _registry(source, tracking_uri) if register else ""
        with fresh_folder(folder, force=force) as draft:
            line = write(source, draft)
        console.print(f"{source.card.provenance.site} -> {folder}: {line}")
        if register:
            console.print(_registered(source, folder, registry))
    missing += missing_models(run, sites) if "all" in site else []
    for each in missing:
        console.print(f"not exported: {each}", style="red")
    if missing:
        raise typer.Exit(1)


def _exporter(name: Format) -> Exporter:
    """The function that writes a format; imports no more than that format needs."""
    if name == "bundle":
        from gcml_ray.export.bundle import export_bundle  # noqa: PLC0415 - torch only where needed

        return export_bundle
    if name == "pyfunc":
        from gcml_ray.export.pyfunc import export_pyfunc  # noqa: PLC0415 - mlflow only where needed

        return export_pyfunc
    from gcml_ray.export.model import export_onnx, export_safetensors, export_torch  # noqa: PLC0415

    simple: dict[str, Exporter] = {"safetensors": export_safetensors, "torch": export_torch, "onnx": export_onnx}
    return simple[name]


def _registry(source: Source, uri: str | None) -> str:
    """Where to register; asked before anything is written."""
    from gcml_ray.export.pyfunc import registry_uri  # noqa: PLC0415 - mlflow only where needed

    return registry_uri(source, uri)


def _registered(source: Source, folder: Path, uri: str) -> str:
    from gcml_ray.export.pyfunc import register_pyfunc  # noqa: PLC0415 - mlflow only where needed

    return f"registered {register_pyfunc(source, folder, uri=uri)}"
