"""The public "LGG segmentation dataset" (TCGA lower-grade glioma, masks of Buda et al. 2019) to NIfTI volumes.

Its layout is ``kaggle_3m/<case>/<case>_<slice>.tif`` (RGB = pre-contrast, FLAIR, post-contrast) beside
``<case>_<slice>_mask.tif``. A case is named TCGA_<institution>_<patient>_<date>; the institution is the site.
The publishers filled missing sequences with FLAIR. Voxel sizes are not stored: set ``spacing_is_real: false``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gcml_ray.data.adapters.made_files import is_current, origin_of, write_volume
from gcml_ray.data.datalist import Case, listed
from gcml_ray.data.reading import UNREADABLE
from gcml_ray.errors import DataError

log = logging.getLogger(__name__)

CHANNELS = ("t1", "flair", "t1ce")
CASE_NAME = re.compile(r"TCGA_([A-Z0-9]{2})_[A-Z0-9]+_\d{8}")


@dataclass(frozen=True)
class _Source:
    """One case's folder: site, name and its slices (number -> picture)."""

    site: str
    name: str
    slices: dict[int, Path]


def prepare_lgg(
    folder: str | Path, out_dir: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> tuple[Case, ...]:
    """Convert every case to ``out_dir/<site>/<case>/<case>_{t1,flair,t1ce,seg}.nii.gz``, uint8, seg in {0, 1}.

    Axes: column and row of the picture, slice number. A case whose four files exist is converted again only where its
    slices have changed; files appear whole or not at all, so an interrupted run can be started again.

    Args:
        folder: ``kaggle_3m`` or the folder that holds it.
        out_dir: where the volumes go.
        progress: called after each case with (cases done, cases in all).

    Returns:
        The cases, channels in the order t1, flair, t1ce, without splits.

    Raises:
        DataError: no cases, missing masks, gaps in slice numbers, slices of another size or unreadable; all at once.
    """
    folder, out_dir = Path(os.path.abspath(folder)), Path(os.path.abspath(out_dir))
    sources = _scan(folder / "kaggle_3m" if (folder / "kaggle_3m").is_dir() else folder, out_dir)
    cases: list[Case] = []
    problems: list[str] = []
    for done, source in enumerate(sources, start=1):
        case = _case(source, out_dir)
        cases.append(case)
        problems += [f"case {source.name}: {problem}" for problem in _convert(source, case)]
        if progress is not None:
            progress(done, len(sources))
    if problems:
        raise DataError(f"{folder}: {len(problems)} problem(s) in the LGG set:{listed(problems)}")
    return tuple(cases)


def _scan(folder: Path, out_dir: Path) -> list[_Source]:
    """All case folders; ``out_dir``, which this adapter writes, is left out if it lies among them."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [path for path in entries if path.is_dir() and path.resolve() != out_dir.resolve()]
    sources = []
    for path in folders:
        match = CASE_NAME.fullmatch(path.name)
        if match is None:
            log.warning("%s: not named like a case (TCGA_<institution>_<patient>_<date>), left out", path)
        else:
            sources.append(_Source(match.group(1), path.name, _numbered_slices(path)))
    if not sources:
        raise DataError(f"{folder}: no case folder (TCGA_<institution>_<patient>_<date>); give the folder kaggle_3m")
    return sources


def _numbered_slices(folder: Path) -> dict[int, Path]:
    """Slice number -> picture, in numeric order: ``_10`` comes after ``_9``."""
    pattern = re.compile(re.escape(folder.name) + r"_(\d+)\.tif")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()]
    return dict(sorted((int(match.group(1)), path) for match, path in matches if match is not None))


def _name_problems(source: _Source) -> list[str]:
    """What the file names of a case show to be wrong."""
    slices = source.slices
    if not slices:
        return [f"no slice {source.name}_<number>.tif in its folder; unpack the set again"]
    gaps = [str(number) for number in range(min(slices), max(slices) + 1) if number not in slices]
    problems = [f"slice(s) {', '.join(gaps)} are missing; unpack the set again"] if gaps else []
    unmasked = [str(number) for number, path in slices.items() if not _mask_of(path).is_file()]
    if unmasked:
        problems.append(f"no mask for slice(s) {', '.join(unmasked)}; unpack the set again")
    return problems


def _mask_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_mask.tif")


def _case(source: _Source, out_dir: Path) -> Case:
    stem = out_dir / source.site / source.name / source.name
    images = tuple(f"{stem}_{channel}.nii.gz" for channel in CHANNELS)
    return Case(site=source.site, name=source.name, images=images, label=f"{stem}_seg.nii.gz", split=None)


def _convert(source: _Source, case: Case) -> list[str]:
    """Read a case's slices and, where all are well, write its volumes that are not there; returns what is wrong."""
    problems = _name_problems(source)
    masks_of = [_mask_of(path) for path in source.slices.values()]
    origin = "" if problems else origin_of([*source.slices.values(), *masks_of])
    if not problems and all(is_current(Path(path), origin=origin) for path in (*case.images, case.label)):
        return []
    pictures = _read_slices(list(source.slices.values()), "RGB", problems)
    masks = _read_slices(masks_of, "L", problems)
    sizes = {array.shape[:2] for array in (*pictures, *masks)}
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        problems.append(f"slices and masks have several sizes (rows x columns): {shown}; unpack the set again")
    if not problems:
        volume = np.stack(pictures, axis=-1).transpose(1, 0, 3, 2)
        for index, path in enumerate(case.images):
            write_volume(Path(path), volume[..., index], np.eye(4), origin=origin)
        label = (np.stack(masks, axis=-1) > 127).astype(np.uint8).transpose(1, 0, 2)
        write_volume(Path(case.label), label, np.eye(4), origin=origin)
    return problems


def _read_slices(paths: Sequence[Path], mode: str, problems: list[str]) -> list[NDArray[np.uint8]]:
    """(rows, columns[, 3]) of each slice; what cannot be read is added to ``problems``, a missing one is left out."""
    arrays = []
    for path in filter(Path.is_file, paths):
        try:
            with Image.open(path) as picture:
                if picture.mode != mode:
                    problems.append(f"{path.name} is of mode {picture.mode}, expected {mode}")
                arrays.append(np.asarray(picture.convert(mode), dtype=np.uint8))
        except UNREADABLE as error:
            problems.append(f"{path.name} cannot be read ({error}); unpack the set again")
    return arrays
