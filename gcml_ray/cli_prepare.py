"""``gcml prepare``: from files in a known layout to a datalist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from gcml_ray.data.datalist import Case, site_names, write_datalist

prepare_app = typer.Typer(help="Write a datalist from images in a known layout.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", help="The datalist to write (JSON).")]


@prepare_app.command()
def manifest(
    csv: Annotated[Path, typer.Argument(help="CSV with a site column and path columns.")],
    out: Out,
    image: Annotated[list[str], typer.Option(help="Image path column; repeat it for channels, in order.")],
    label: Annotated[str, typer.Option(help="Label path column.")],
    site: Annotated[str, typer.Option(help="Site column.")] = "site",
    case: Annotated[str, typer.Option(help="Case name column.")] = "case",
    label_rule: Annotated[
        str | None, typer.Option(help="Column with rules like value>127, for masks stored as grey images.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of relative paths; default: the CSV's own.")] = None,
) -> None:
    """Any data set that a CSV describes: one line a case."""
    from gcml_ray.data.adapters.manifest import prepare_manifest  # noqa: PLC0415 - only this command needs it

    cases = prepare_manifest(
        csv,
        image_columns=image,
        label_column=label,
        site_column=site,
        case_column=case,
        label_rule_column=label_rule,
        root=root,
    )
    _write(out, cases, description=f"from {csv.name}")


@prepare_app.command()
def lgg(
    folder: Annotated[Path, typer.Argument(help="The kaggle_3m folder, or the one that holds it.")],
    out: Out,
    volumes: Annotated[
        Path | None, typer.Option(help="Where the NIfTI volumes go; default: volumes/ beside the datalist.")
    ] = None,
) -> None:
    """The public LGG segmentation data set: tif slices to NIfTI volumes, sites by hospital code."""
    from gcml_ray.data.adapters.lgg import prepare_lgg  # noqa: PLC0415 - only this command needs it

    with Progress(transient=True) as bar:
        task = bar.add_task("converting")
        cases = prepare_lgg(
            folder,
            volumes or out.parent / "volumes",
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _write(out, cases, description="LGG segmentation data set (kaggle_3m)")


@prepare_app.command()
def phantom(
    out: Out,
    sites: Annotated[int | None, typer.Option(help="Number of sites; default: the four of the demo.")] = None,
    cases: Annotated[int | None, typer.Option(help="Cases a site; default: few to train on, eight to test.")] = None,
    shape: Annotated[str, typer.Option(help="Voxels, e.g. 40x40x20 or 64x64 for 2D.")] = "36x32x20",
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
) -> None:
    """Made-up sites whose scanners, lesions and annotators differ: for trying things out, and for tests."""
    from gcml_ray.data.phantom import prepare_phantom  # noqa: PLC0415 - only this command needs it

    size = parse_shape(shape)
    names = None if sites is None else [f"site{number}" for number in range(1, sites + 1)]
    made = prepare_phantom(
        out.resolve().parent / "volumes",
        sites=names,
        cases_per_site=cases,
        shape=size,
        seed=seed,
        spatial_dims=2 if len(size) == 2 else 3,
    )
    _write(out, made, description=f"phantom sites, seed {seed}, {shape} voxels")


def parse_shape(text: str) -> tuple[int, ...]:
    """``40x40x20`` as numbers; typer shows what is wrong with anything else."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not a shape; write 40x40x20, or 64x64 for 2D", param_hint="--shape")
    return tuple(int(part) for part in parts)


def _write(out: Path, cases: Sequence[Case], *, description: str) -> None:
    """The datalist, and one line a site."""
    write_datalist(out, cases, description=description)
    console = Console(soft_wrap=True)
    counts = Counter(case.site for case in cases)
    for site in site_names(cases):
        console.print(f"{site}: {counts[site]} cases", highlight=False)
    console.print(f"{len(cases)} cases of {len(counts)} sites -> {out}", highlight=False)
