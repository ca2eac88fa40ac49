"""``gcml prepare``: from files in a known layout to a datalist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gcml_ray.console.progress import counted
from gcml_ray.console.terminal import terminal
from gcml_ray.data.datalist import SPLITS, Case, cases_of_site, few_cases_problem, site_names, write_datalist
from gcml_ray.wording import count

prepare_app = typer.Typer(help="Write a datalist from images in a known layout.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", dir_okay=False, help="The datalist to write (JSON).")]
SkipFaulty = Annotated[bool, typer.Option("--skip-faulty", help="Leave out cases with problems, with a warning each.")]


@prepare_app.command()
def manifest(
    csv: Annotated[Path, typer.Argument(help="CSV with a site column and path columns.")],
    out: Out,
    image: Annotated[list[str], typer.Option(help="Image path column; repeat it for channels, in order.")],
    label: Annotated[str, typer.Option(help="Label path column.")],
    site: Annotated[str, typer.Option(help="Site column.")] = "site",
    case: Annotated[str | None, typer.Option(help="Case name column; default: case, where there is one.")] = None,
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

    with counted(terminal(is_error=True), "converting") as progress:
        cases = prepare_lgg(folder, volumes or out.parent / "volumes", progress=progress)
    _write(out, cases, description="LGG segmentation data set (kaggle_3m)")


@prepare_app.command()
def fets(
    folder: Annotated[Path, typer.Argument(help="The folder that holds one folder a subject.")],
    partition: Annotated[Path, typer.Option(help="The challenge's table, e.g. partitioning_1.csv.")],
    out: Out,
    institutions: Annotated[
        str | None, typer.Option(help="Their numbers, e.g. 4,5,6; default: the paper's 4,5,6,7,11,16,20,21.")
    ] = None,
    skip_faulty: SkipFaulty = False,
) -> None:
    """BraTS / FeTS-2022 (t1, t1ce, t2, flair): sites by institution, the paper's split sizes."""
    from gcml_ray.data.adapters.fets import PUBLISHED, prepare_fets  # noqa: PLC0415 - only this command needs it

    chosen = tuple(PUBLISHED) if institutions is None else parse_numbers(institutions)
    with counted(terminal(is_error=True), "checking") as progress:
        cases = prepare_fets(folder, partition, institutions=chosen, skip_faulty=skip_faulty, progress=progress)
    _write(out, cases, description=f"FeTS-2022, institutions {', '.join(map(str, chosen))} of {partition.name}")


@prepare_app.command()
def panseg(
    folder: Annotated[Path, typer.Argument(help="The folder t1 or t2, which holds imagesTr and labelsTr.")],
    out: Out,
    sites: Annotated[
        str | None, typer.Option(help="Prefixes of the centres, e.g. NYU,MCF; default: NYU,MCF,NWU,AHN,MCA.")
    ] = None,
    skip_faulty: SkipFaulty = False,
) -> None:
    """PanSegData, pancreas MRI of five centres: sites by prefix, the paper's split sizes (of T1)."""
    from gcml_ray.data.adapters.panseg import PUBLISHED, prepare_panseg  # noqa: PLC0415 - only this command needs it

    chosen = tuple(PUBLISHED) if sites is None else parse_names(sites)
    with counted(terminal(is_error=True), "checking") as progress:
        cases = prepare_panseg(folder, sites=chosen, skip_faulty=skip_faulty, progress=progress)
    _write(out, cases, description=f"PanSegData, {folder.name}")


@prepare_app.command()
def hecktor(
    folder: Annotated[Path, typer.Argument(help="Holds <case>_ct.nii.gz, <case>_pt.nii.gz, <case>_gtvt.nii.gz.")],
    out: Out,
    boxes: Annotated[
        Path | None,
        typer.Option(help="hecktor2021_bbox_training.csv: crop to its boxes at 1 mm; else PET goes to the CT's grid."),
    ] = None,
    unseen: Annotated[
        str | None, typer.Option(help="Centres that do not train, e.g. CHMR,CHUP: to a second datalist, <out>_unseen.")
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(help="Where resampled volumes go; default: volumes/ beside the datalist.")
    ] = None,
    skip_faulty: SkipFaulty = False,
) -> None:
    """HECKTOR 2021 (CT, PET): both resampled to one grid, sites by centre."""
    from gcml_ray.data.adapters.hecktor import prepare_hecktor  # noqa: PLC0415 - only this command needs it

    with counted(terminal(is_error=True), "resampling") as progress:
        found = prepare_hecktor(
            folder,
            volumes or out.parent / "volumes",
            boxes=boxes,
            unseen=() if unseen is None else parse_names(unseen),
            skip_faulty=skip_faulty,
            progress=progress,
        )
    grid = "CT's grid" if boxes is None else f"1 mm in the boxes of {boxes.name}"
    _write(out, found.training, description=f"HECKTOR 2021, {grid}")
    if found.unseen:
        second = out.with_name(f"{out.stem}_unseen{out.suffix}")
        _write(second, found.unseen, description=f"HECKTOR 2021, {grid}, sites that do not train")


@prepare_app.command()
def nnunet(
    folder: Annotated[Path, typer.Argument(help="DatasetXXX_Name: dataset.json, imagesTr and labelsTr.")],
    out: Out,
    site_regex: Annotated[
        str | None, typer.Option(help="Searched in a case's name; its first group is the site: '^([A-Z]+)'.")
    ] = None,
    site_csv: Annotated[Path | None, typer.Option(help="Or a table with the columns case and site.")] = None,
    skip_faulty: SkipFaulty = False,
) -> None:
    """Any data set in nnU-Net's raw layout; also prints what it means for the configuration."""
    from gcml_ray.data.adapters.nnunet import config_lines, prepare_nnunet  # noqa: PLC0415 - only this command needs it

    with counted(terminal(is_error=True), "checking") as progress:
        found = prepare_nnunet(
            folder, site_regex=site_regex, site_csv=site_csv, skip_faulty=skip_faulty, progress=progress
        )
    _write(out, found.cases, description=f"nnU-Net data set {folder.name}")
    console = terminal()
    console.print("For the data section of the configuration:")
    for line in config_lines(found.meaning):
        console.print(f"  {line}")


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
        replaces=out,
    )
    _write(out, made, description=f"phantom sites, seed {seed}, {shape} voxels")


def parse_shape(text: str) -> tuple[int, ...]:
    """``40x40x20`` as numbers; typer shows what is wrong with anything else."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not a shape; write 40x40x20, or 64x64 for 2D", param_hint="--shape")
    return tuple(int(part) for part in parts)


def parse_numbers(text: str) -> tuple[int, ...]:
    """``4,5,11`` as numbers; typer shows what is wrong with anything else."""
    names = parse_names(text)
    if not all(name.isdigit() for name in names):
        raise typer.BadParameter(f"{text!r} is no list of whole numbers; write 4,5,11")
    return tuple(int(name) for name in names)


def parse_names(text: str) -> tuple[str, ...]:
    """``NYU, MCF`` as names."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise typer.BadParameter(f"{text!r} names nothing; write A,B,C")
    return names


def _write(out: Path, cases: Sequence[Case], *, description: str) -> None:
    """The datalist, and one line a site."""
    write_datalist(out, cases, description=description)
    console = terminal()
    sites = site_names(cases)
    for site in sites:
        own = cases_of_site(cases, site)
        console.print(f"{site}: {count(len(own), 'case')}{_split_note(own)}")
        problem = few_cases_problem(site, [case.name for case in own])
        if problem and any(case.split != "test" for case in own):  # sites held back are not trained
            console.print(problem, style="yellow")
    console.print(f"{count(len(cases), 'case')} of {count(len(sites), 'site')} -> {out}")


def _split_note(cases: Sequence[Case]) -> str:
    """``(32 train, 5 validation, 10 test)``, or nothing where the configuration decides."""
    counts = Counter(case.split for case in cases)
    shown = [f"{counts[split]} {split}" for split in SPLITS if counts[split]]
    return f" ({', '.join(shown)})" if shown else ""
