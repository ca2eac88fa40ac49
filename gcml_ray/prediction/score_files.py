"""Scores prediction files against reference labels, each on the grid of its file.

Legend: K foreground classes or regions, *source = the grid of the files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gcml_ray.config import Config, DataConfig
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import read_target
from gcml_ray.data.one_grid import header_of, on_one_grid, turned
from gcml_ray.data.reading import Header, Volume, read_volume
from gcml_ray.errors import DataError
from gcml_ray.prediction.metrics import score_case
from gcml_ray.records import CaseScore

log = logging.getLogger(__name__)

ENDINGS = (".nii.gz", ".nii", ".png")
PREDICTED = "predicted"  # the model's name in the tables


@dataclass(frozen=True)
class ScoredFiles:
    """Scores, one line for each case that could not be scored, and the cases without a prediction."""

    scores: tuple[CaseScore, ...]
    problems: tuple[str, ...]
    missing: tuple[Case, ...]


def score_files(
    cases: Sequence[Case], folder: Path, config: Config, *, on_progress: Callable[[int, int], None]
) -> ScoredFiles:
    """Scores every case that has a prediction in a folder.

    Args:
        cases: with labels and splits.
        folder: holds ``<site>/<case>.nii.gz`` or ``<case>.nii.gz`` (also ``.nii``, ``.png``), or a file a region,
            ``<case>_<region>.nii.gz``.
        config: of the run.
        on_progress: told (cases done, cases in all).

    Raises:
        DataError: a file in the folder itself would be taken for cases of several sites.
    """
    found = [find_prediction(case, folder, config.data) for case in cases]
    _check_one_site_a_file(cases, found)
    scores: list[CaseScore] = []
    problems: list[str] = []
    missing: list[Case] = []
    for done, (case, files) in enumerate(zip(cases, found, strict=True), start=1):
        try:
            if files:
                scores.extend(_score(case, files, config))
            else:
                missing.append(case)
        except DataError as error:
            problems.append(f"{case.name} (site {case.site}): {error}")
        on_progress(done, len(cases))
    return ScoredFiles(tuple(scores), tuple(problems), tuple(missing))


def find_prediction(case: Case, folder: Path, data: DataConfig) -> tuple[Path, ...]:
    """The prediction of a case: one label map, or a file for each region; empty where there is none."""
    for place in (folder / case.site, folder):
        for ending in ENDINGS:
            whole = place / f"{case.name}{ending}"
            if whole.is_file():
                return (whole,)
            parts = tuple(place / f"{case.name}_{name}{ending}" for name in data.foreground_names)
            if data.is_sigmoid and all(part.is_file() for part in parts):
                return parts
    return ()


def _check_one_site_a_file(cases: Sequence[Case], found: Sequence[tuple[Path, ...]]) -> None:
    """Refuses files that cases of the same name at several sites would share."""
    sites: dict[Path, list[str]] = {}
    for case, files in zip(cases, found, strict=True):
        for file in files:
            sites.setdefault(file, []).append(case.site)
    shared = [(file, names) for file, names in sites.items() if len(names) > 1]
    if shared:
        file, names = shared[0]
        more = f" ({len(shared) - 1} more likewise)" if len(shared) > 1 else ""
        raise DataError(
            f"{file} would be scored as the prediction of the sites {', '.join(names)}{more}, which all have a case "
            f"of that name; say whose it is with --site, or put each site's files into a folder of its own, "
            f"{file.parent}/<site>/{file.name}"
        )


def _score(case: Case, files: Sequence[Path], config: Config) -> tuple[CaseScore, ...]:
    """All scores of one case."""
    data = config.data
    reference, spacing, affine = read_target(case, data)
    place = header_of(Volume(reference, affine))
    prediction, is_placed = _read_prediction(case, files, data, place)
    if prediction.shape != reference.shape:
        raise DataError(
            f"{files[0]} has the shape {tuple(prediction.shape[1:])}, its reference {case.label} has "
            f"{tuple(reference.shape[1:])}; they must be on one grid"
        )
    if not is_placed:
        log.warning("%s has another affine than %s; voxels are matched by index", files[0], case.label)
    return score_case(
        prediction,
        reference,
        spacing=spacing,
        tolerance=config.evaluation.surface_tolerance,
        class_names=data.foreground_names,
        sigmoid=data.is_sigmoid,
        site=case.site,
        case=case.name,
        split=case.split or "test",
        model=PREDICTED,
    )


def _read_prediction(case: Case, files: Sequence[Path], data: DataConfig, place: Header) -> tuple[Tensor, bool]:
    """A prediction in the form of a target, on the axes of its reference, and whether it lies where that does."""
    if not data.is_sigmoid or (len(files) == 1 and files[0].name.startswith(f"{case.name}.")):
        target, _, affine = read_target(Case(case.site, case.name, (), str(files[0]), None), data)
        volumes = [turned(Volume(target, affine), place)]
    else:
        read = (read_volume(str(file), spatial_dims=data.spatial_dims, role="label") for file in files)
        volumes = [turned(Volume((volume.array[:1] > 0).float(), volume.affine), place) for volume in read]
    shapes = {tuple(volume.array.shape[1:]) for volume in volumes}
    if len(shapes) > 1:
        raise DataError(f"{files[0]} and its other regions have the shapes {sorted(shapes)}; they must be on one grid")
    is_placed = all(on_one_grid(place, header_of(volume)) for volume in volumes)
    return torch.cat([volume.array for volume in volumes]), is_placed
