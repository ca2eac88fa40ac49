"""HECKTOR 2021 (head and neck tumours, CT and PET) with its centres as sites; CT and PET brought to one grid.

Layout: ``<folder>/.../<case>_{ct,pt,gtvt}.nii.gz``, e.g. ``hecktor_nii/CHUM001_ct.nii.gz``; the letters in front are
the centre (CHGJ, CHMR, CHUM, CHUP, CHUS in the 2021 training set; the test set adds CHUV and has no public masks).
A table ``hecktor2021_bbox_training.csv`` (``PatientID``, ``x1``, ``x2``, ``y1``, ``y2``, ``z1``, ``z2``) bounds the
region of interest in mm. Its axes are those of the challenge's own tool (ITK: x to the left, y to the back), while
NIfTI's point to the right and to the front. Later years lay their files out otherwise and are not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.processing import resample_from_to
from numpy.typing import NDArray

from gcml_ray.data.adapters.findings import (
    Findings,
    Progress,
    grid_problems_of_files,
    label_problems_of_file,
    read_rows,
)
from gcml_ray.data.adapters.made_files import Grid, is_current, origin_of, write_volume
from gcml_ray.data.datalist import Case
from gcml_ray.data.reading import read_volume
from gcml_ray.errors import DataError

KINDS = ("ct", "pt", "gtvt")
CHANNELS = KINDS[:2]
LABEL_VALUES = (0, 1)
FILE_NAME = re.compile(r"((?:[A-Za-z]+)[-_]?\d+)_(ct|pt|gtvt)\.nii(?:\.gz)?")
BOX_COLUMNS = ("x1", "x2", "y1", "y2", "z1", "z2")
OUTSIDE = {"ct": -1024.0, "pt": 0.0, "gtvt": 0.0}  # air, no uptake, no tumour
STORED = {"ct": np.int16, "pt": np.float32, "gtvt": np.uint8}
GRID_FOLDERS = ("ct_grid", "box_1mm")  # of resampled files: without boxes, with boxes


@dataclass(frozen=True)
class HecktorCases:
    """Cases of the sites that train (without splits), and of those held back (all of split ``test``)."""

    training: tuple[Case, ...]
    unseen: tuple[Case, ...]


def prepare_hecktor(
    folder: str | Path,
    out_dir: str | Path,
    *,
    boxes: str | Path | None = None,
    unseen: Sequence[str] = (),
    skip_faulty: bool = False,
    progress: Progress | None = None,
) -> HecktorCases:
    """Bring CT, PET and mask of every case to one grid.

    With ``boxes`` all three are cropped and resampled to 1 mm, as the challenge does; images linearly (the challenge:
    cubic splines, which overshoot at edges), masks by nearest neighbour. Without it only the PET is resampled, to the
    CT's grid, and the other two stay where they are. A file that exists is made again only where its source or its
    grid has changed; files appear whole or not at all.

    Args:
        folder: holds the files, at any depth.
        out_dir: gets ``box_1mm/<centre>/`` or ``ct_grid/<centre>/`` with the resampled files; may lie in ``folder``.
        boxes: the table of bounding boxes.
        unseen: centres that are held back: they do not train.
        skip_faulty: leave out cases with problems, with a warning each, instead of raising.
        progress: called after each case with (cases done, cases in all).

    Raises:
        DataError: missing or doubled files, a mask on another grid than its CT, unknown label values, cases without
            box, boxes without case, unseen centres without cases; all at once.
        OSError: a file cannot be written, as the disk is full; that is no fault of a case.
    """
    folder, out_dir = Path(os.path.abspath(folder)), Path(os.path.abspath(out_dir))
    findings = Findings(folder)
    files = _scan(folder, _written(folder, out_dir), findings)
    grids = None if boxes is None else _read_boxes(boxes, set(files), findings)
    cases: list[Case] = []
    for done, (name, own) in enumerate(sorted(files.items()), start=1):
        box = None if grids is None else grids.get(name)
        findings.about(name, _problems(own, box))
        case = _case(name, own, out_dir, with_boxes=boxes is not None)
        if name not in findings.by_case:
            findings.about(name, _resample(case, own, box))
        cases.append(case)
        if progress is not None:
            progress(done, len(files))
    findings.general += _unseen_problems({case.site for case in cases}, unseen)
    sound = findings.sound(cases, skip_faulty=skip_faulty)
    return HecktorCases(
        training=tuple(case for case in sound if case.site not in unseen),
        unseen=tuple(replace(case, split="test") for case in sound if case.site in unseen),
    )


def _unseen_problems(centres: set[str], unseen: Sequence[str]) -> list[str]:
    problems = [f"site {each} (--unseen) has no case" for each in unseen if each not in centres]
    return problems if centres - set(unseen) else [*problems, "every site is unseen: none is left to train"]


# --- what is there -----------------------------------------------------------------------------


def _written(folder: Path, out_dir: Path) -> tuple[Path, ...]:
    """Folders of files resampled earlier, to be left out of a scan unless ``folder`` is or lies in one of them."""
    homes = [(out_dir / grid).resolve() for grid in GRID_FOLDERS]
    return tuple(home for home in homes if not folder.resolve().is_relative_to(home))


def _scan(folder: Path, left_out: Sequence[Path], findings: Findings) -> dict[str, dict[str, Path]]:
    """Case -> kind -> file, without those below ``left_out``.

    A missing file gets the path where it should be, beside the case's others.
    """
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*.nii*")):
        match = FILE_NAME.fullmatch(path.name)
        if match is None or any(path.parent.resolve().is_relative_to(each) for each in left_out):
            continue
        name, kind = match.groups()
        twin = files.setdefault(name, {}).setdefault(kind, path)
        if twin != path:
            findings.about(name, [f"{kind} is there twice: {twin} and {path}; remove one"])
    if not files:
        raise DataError(
            f"{folder}: no file named <case>_ct.nii.gz (e.g. CHUM001_ct.nii.gz); give HECKTOR 2021's folder"
        )
    for name, own in files.items():
        home = next(iter(own.values())).parent
        files[name] = {kind: own.get(kind, home / f"{name}_{kind}.nii.gz") for kind in KINDS}
    return files


def _read_boxes(path: str | Path, names: set[str], findings: Findings) -> dict[str, Grid]:
    """Case -> grid of 1 mm over its box."""
    table = Path(path).name
    grids: dict[str, Grid] = {}
    for line, row in read_rows(path, ("PatientID", *BOX_COLUMNS)):
        name = row["PatientID"]
        if name in grids:
            findings.about(name, [f"is listed twice in {table}, again in line {line}"])
        try:
            grids[name] = _box_grid([float(row[column]) for column in BOX_COLUMNS])
        except ValueError as error:
            findings.about(name, [f"{table}, line {line}: not a box in mm ({error})"])
    for name in sorted(names - set(grids) - set(findings.by_case)):
        findings.about(name, [f"has no row in {table}"])
    for name in sorted(set(grids) - names):
        findings.general.append(f"{table} lists case {name}, which has no file")
    return grids


def _box_grid(numbers: Sequence[float]) -> Grid:
    """1 mm voxels from the box's first corner on; the table's x and y are ITK's, opposite to NIfTI's.

    Raises:
        ValueError: the box is empty or not finite.
    """
    first, last = np.array(numbers[0::2]), np.array(numbers[1::2])
    size = last - first
    if not np.isfinite(size).all() or (size < 1).any():
        raise ValueError(f"its sides are {size.tolist()} mm")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = first * (-1, -1, 1)
    return tuple(round(side) for side in size.tolist()), affine


def _problems(own: dict[str, Path], box: Grid | None) -> list[str]:
    """What is wrong with a case's files; CT and PET may lie on grids of their own."""
    problems = grid_problems_of_files({kind: own[kind] for kind in ("ct", "gtvt")}) + grid_problems_of_files(
        {"pt": own["pt"]}
    )
    problems += label_problems_of_file(own["gtvt"], LABEL_VALUES)
    if not problems and box is not None:
        problems += [f"its box lies outside the {kind}" for kind in CHANNELS if not _holds_centre(own[kind], box)]
    return problems


def _holds_centre(path: Path, box: Grid) -> bool:
    """Whether the middle of a box lies inside an image."""
    shape, affine = box
    image: Any = nibabel.load(path)
    middle = affine @ np.append((np.array(shape) - 1) / 2, 1.0)
    place = (np.linalg.inv(image.affine) @ middle)[:3]
    return bool((place >= 0).all() and (place <= np.array(image.shape[:3]) - 1).all())


# --- resampling --------------------------------------------------------------------------------


def _case(name: str, own: dict[str, Path], out_dir: Path, *, with_boxes: bool) -> Case:
    site = re.match(r"[A-Za-z]+", name).group().upper()  # type: ignore[union-attr]  # FILE_NAME demands letters
    home = out_dir / GRID_FOLDERS[with_boxes] / site
    kept = () if with_boxes else ("ct", "gtvt")
    ct, pt, gtvt = (str(own[kind] if kind in kept else home / f"{name}_{kind}.nii.gz") for kind in KINDS)
    return Case(site=site, name=name, images=(ct, pt), label=gtvt, split=None)


def _resample(case: Case, own: dict[str, Path], box: Grid | None) -> list[str]:
    """Write the files of a case that are not there yet, or not any more as they should be; returns what went wrong."""
    problems = []
    for kind, target in zip(KINDS, map(Path, (*case.images, case.label)), strict=True):
        if target == own[kind]:
            continue
        try:
            grid = box if box is not None else _grid_of(own["ct"])
            origin = origin_of([own[kind]])
            if is_current(target, origin=origin, grid=grid):
                continue
            values = _on_grid(own[kind], grid, kind)
        except (DataError, OSError, ValueError) as error:
            problems.append(f"{kind} cannot be resampled ({type(error).__name__}: {error})")
        else:
            write_volume(target, values, grid[1], origin=origin)
    return problems


def _grid_of(path: Path) -> Grid:
    image: Any = nibabel.load(path)
    return tuple(image.shape[:3]), np.asarray(image.affine, dtype=np.float64)


def _on_grid(path: Path, grid: Grid, kind: str) -> NDArray[Any]:
    volume = read_volume(str(path), spatial_dims=3)
    if len(volume.array) > 1:
        raise DataError(f"{path}: holds {len(volume.array)} volumes; one was expected")
    source = nibabel.Nifti1Image(volume.array[0].numpy(), volume.affine)  # type: ignore[no-untyped-call]  # nibabel's
    order = 0 if kind == "gtvt" else 1
    moved = resample_from_to(source, grid, order=order, cval=OUTSIDE[kind])  # type: ignore[no-untyped-call]
    values = np.asarray(moved.dataobj)
    return (values if kind == "pt" else np.round(values)).astype(STORED[kind])
