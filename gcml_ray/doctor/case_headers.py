"""The pre-flight's look at cases without their voxels: splits, files, shapes, voxel sizes, orientation.

Each function looks at one thing and gives its line of the report; none raises for what a user can mend.
Legend: D H W voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import Orientation
from numpy.typing import NDArray

from gcml_ray.config import DataConfig
from gcml_ray.config.data import AXIS_CODES
from gcml_ray.data.case_checks import check_headers
from gcml_ray.data.datalist import Case, check_files, listed
from gcml_ray.data.loading import respaced, with_affine
from gcml_ray.data.one_grid import on_one_grid, turned_header
from gcml_ray.data.problems import CaseProblem, grouped
from gcml_ray.data.reading import Header
from gcml_ray.doctor.forecast_costs import SiteCases
from gcml_ray.doctor.machine import Check
from gcml_ray.errors import DataError
from gcml_ray.records import Split

FEW_TRAIN = 3
SPACING_TOLERANCE = 0.02  # relative: less than this is rounding in a header
MEND_DATA = "change the key that is named, or mend or leave out the files; then run the check again"


@dataclass(frozen=True)
class CaseHeader:
    """A case whose headers are in order.

    ``grid`` is its size as it will be trained on, ``spacing_mm`` its stored voxel size (None where unreal),
    ``axes`` its stored orientation such as ``RAS`` (empty for pictures), ``displaced`` which of its
    files lie elsewhere than the first image, by their affine.
    """

    case: Case
    grid: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    axes: str
    displaced: tuple[str, ...]


def check_split(site: str, cases: Sequence[Case]) -> Check:
    """Number of cases of each split; warns where training or choosing a model rests on almost nothing."""
    counts = {split: sum(case.split == split for case in cases) for split in ("train", "validation", "test")}
    detail = ", ".join(f"{count} {split}" for split, count in counts.items())
    few = []
    if counts["train"] < FEW_TRAIN:
        few.append(f"fewer than {FEW_TRAIN} training cases")
    if counts["validation"] == 1:
        few.append("a single validation case decides which model is kept")
    if few:
        remedy = "add cases, change `split` in the datalist or data.split, or leave the site out with federation.sites"
        return Check(f"cases {site}", "WARN", f"{detail}: {'; '.join(few)}", remedy)
    return Check(f"cases {site}", "PASS", detail)


def check_files_exist(cases: Sequence[Case]) -> Check:
    """Whether every image and label is there."""
    try:
        check_files(cases)
    except DataError as error:
        return Check("files", "FAIL", str(error), "copy the files there, or mend the paths in the datalist")
    num_files = sum(len(case.images) + 1 for case in cases)
    return Check("files", "PASS", f"all {num_files} files of {len(cases)} cases exist")


def check_all_headers(cases: Sequence[Case], data: DataConfig) -> tuple[Check, tuple[CaseHeader, ...]]:
    """Shapes, channels and affines of every case, and the cases that are in order."""
    problems: list[CaseProblem] = []
    headers: list[CaseHeader] = []
    for case in cases:
        own, wrong = check_headers(case, data)
        problems += [(case, problem) for problem in wrong]
        if not wrong:
            headers.append(_case_header(case, own, data))
    if problems:
        num_bad = len(cases) - len(headers)
        detail = f"{num_bad} of {len(cases)} cases are bad:{listed(grouped(problems, len(cases)))}"
        return Check("headers", "FAIL", detail, MEND_DATA), tuple(headers)
    detail = f"{len(cases)} cases with {len(data.channels)} channel(s), images and labels on one grid"
    return Check("headers", "PASS", detail), tuple(headers)


def _case_header(case: Case, headers: Sequence[Header], data: DataConfig) -> CaseHeader:
    files = (*case.images, case.label)
    first = headers[0].affine
    spacing, axes = None, ""
    if first is not None:
        axes = "".join(str(code) for code in nibabel.aff2axcodes(first))  # type: ignore[no-untyped-call]
        if data.spacing_is_real:
            affine = _oriented(headers[0].shape[1:], first, data).peek_pending_affine()
            spacing = tuple(float(size) for size in np.linalg.norm(affine[:3, :3], axis=0)[: data.spatial_dims])
    placed = zip(files, headers, strict=True)
    displaced = tuple(
        Path(file).name for file, header in placed if not on_one_grid(headers[0], turned_header(header, headers[0]))
    )
    return CaseHeader(case, training_grid(headers[0], data), spacing, axes, displaced)


def training_grid(header: Header, data: DataConfig) -> tuple[int, ...]:
    """The size, (D, H, W) or (H, W), that a case has after orientation and resampling.

    MONAI's transforms work it out lazily, on a tensor of a single value: no voxel is read or moved.
    """
    if data.resize is not None:
        return tuple(data.resize)
    shape = header.shape[1:]
    if header.affine is None:
        return shape
    grid = _oriented(shape, header.affine, data)
    if data.target_spacing_mm is not None:
        turned = torch.zeros(1).expand(1, *grid.peek_pending_shape())
        grid = respaced(MetaTensor(turned, affine=grid.peek_pending_affine()), data.target_spacing_mm, lazy=True)
    return tuple(int(length) for length in grid.peek_pending_shape())


def _oriented(shape: Sequence[int], affine: NDArray[np.float64], data: DataConfig) -> Any:
    """A tensor of a single value whose pending shape and affine are those of an image after orientation."""
    grid: Any = with_affine(torch.zeros(1).expand(1, *shape), affine)
    if data.spatial_dims == 3 and data.orientation is not None:
        grid = Orientation(axcodes=data.orientation, labels=AXIS_CODES, lazy=True)(grid)
    return grid


def check_voxel_sizes(headers: Sequence[CaseHeader], data: DataConfig) -> Check:
    """Whether all cases have one voxel size, or will be resampled to one."""
    name = "voxel size"
    if not data.spacing_is_real:
        return Check(name, "PASS", "not real by the configuration: nothing is resampled by it")
    if not headers:
        return Check(name, "PASS", "no case to look at")
    if data.target_spacing_mm is not None:
        return Check(name, "PASS", f"all cases are resampled to {_lengths(data.target_spacing_mm)}")
    ranges = {site: _spacing_range(own) for site, own in _by_site(headers).items()}
    mixed = [f"site {site}: {_lengths(low)} to {_lengths(high)}" for site, (low, high) in ranges.items() if low != high]
    low, high = _spacing_range([header for header in headers if header.spacing_mm is not None])
    if not mixed and low != high:
        mixed = [f"site {site}: {_lengths(size)}" for site, (size, _) in ranges.items()]
    if mixed:
        detail = f"cases differ in voxel size and are not resampled:{listed(mixed)}"
        remedy = "set data.target_spacing_mm, so that a voxel means the same in every case (or data.resize)"
        return Check(name, "WARN", detail, remedy)
    return Check(name, "PASS", f"{_lengths(low)} in every case")


def check_affines(headers: Sequence[CaseHeader], data: DataConfig) -> Check:
    """Whether images and labels lie in the same place, and all cases point the same way."""
    if not headers:
        return Check("affines", "WARN", "not checked: the headers of no case are in order", MEND_DATA)
    apart = [
        f"site {h.case.site}, case {h.case.name}: {', '.join(h.displaced)} not where {Path(h.case.images[0]).name} is"
        for h in headers
        if h.displaced
    ]
    if apart:
        detail = f"in {len(apart)} cases headers disagree on position; voxels are matched by index"
        remedy = "look at these files together in a viewer; resample what is shifted onto the first image's grid"
        return Check("affines", "WARN", f"{detail}:{listed(apart)}", remedy)
    axes = sorted({header.axes for header in headers if header.axes})
    if len(axes) > 1 and (data.spatial_dims == 2 or data.orientation is None):
        remedy = "set data.orientation: RAS" if data.spatial_dims == 3 else "export all images in one orientation"
        return Check("affines", "WARN", f"cases are stored as {', '.join(axes)} and will not be turned", remedy)
    if axes and data.spatial_dims == 3 and data.orientation is None:
        detail = (
            f"stored as {axes[0]} and not turned: an image on other axes would be segmented wrongly without a warning"
        )
        remedy = "set data.orientation: RAS, or store every image, also of new patients, on these axes"
        return Check("affines", "WARN", detail, remedy)
    turned = f", turned to {data.orientation}" if axes and data.spatial_dims == 3 and data.orientation else ""
    return Check("affines", "PASS", f"images and labels agree; stored as {', '.join(axes) or 'pictures'}{turned}")


def _by_site(headers: Iterable[CaseHeader]) -> dict[str, list[CaseHeader]]:
    sites: dict[str, list[CaseHeader]] = {}
    for header in headers:
        if header.spacing_mm is not None:
            sites.setdefault(header.case.site, []).append(header)
    return sites


def _spacing_range(headers: Sequence[CaseHeader]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Smallest and largest voxel size along each axis, equal where they differ by rounding only."""
    sizes = np.array([header.spacing_mm for header in headers])
    low, high = sizes.min(axis=0), sizes.max(axis=0)
    if np.all(high <= low * (1 + SPACING_TOLERANCE)):
        high = low
    return tuple(np.round(low, 3).tolist()), tuple(np.round(high, 3).tolist())


def _lengths(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes) + " mm"


def site_cases(headers: Sequence[CaseHeader]) -> tuple[SiteCases, ...]:
    """The cases of every site in the form of the forecast, by the sites' names."""
    sites: dict[str, list[tuple[Split, tuple[int, ...]]]] = {}
    for header in headers:
        sites.setdefault(header.case.site, []).append((header.case.split or "train", header.grid))
    return tuple(SiteCases(site, tuple(grids)) for site, grids in sorted(sites.items()))
