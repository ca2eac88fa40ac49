"""The deterministic part of the data: one case from its files to a normalised image and class indices.

Legend: C channels, K classes, R regions, D H W voxels (2D: H rows, W columns), N voxels.
Order of the steps: read, check, orient (3D), resample or resize, normalise. Padding waits until a patch is
cut, so evaluation sees the unpadded grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.intensity.array import NormalizeIntensity
from monai.transforms.spatial.array import Orientation, Resize, Spacing
from monai.utils.type_conversion import convert_to_tensor
from numpy.typing import NDArray
from torch import Tensor

from gcml_ray.config import DataConfig
from gcml_ray.config.data import AXIS_CODES
from gcml_ray.data.case_checks import (
    affine_problems,
    channel_problems,
    grid_problems,
    intensity_problems,
    label_problems,
    warn_affines,
    without_alpha,
)
from gcml_ray.data.datalist import Case
from gcml_ray.data.one_grid import header_of, turned
from gcml_ray.data.pictures import label_role
from gcml_ray.data.problems import CaseError
from gcml_ray.data.reading import Volume, read_volume
from gcml_ray.errors import DataError

PIECE = 2**24  # voxels: how many are looked at together where that needs more memory than they take
NOISE = 1e-5  # of a channel's largest magnitude: what is smaller after resampling is rounding, no image


@dataclass(frozen=True, eq=False)
class Sample:
    """One preprocessed case.

    Attributes:
        case: the case's name.
        image: (C, *spatial), float32, normalised a channel.
        label: (1, *spatial) class indices, uint8 (softmax), or (R, *spatial) float32 in {0, 1} (regions).
        spacing: voxel size on this grid, in mm where ``data.spacing_is_real``, else ones (voxels).
        foreground: flat int32 indices over ``spatial`` of labelled voxels; empty outside training cases.
        background: the same for all others.
    """

    case: str
    image: Tensor
    label: Tensor
    spacing: tuple[float, ...]
    foreground: Tensor
    background: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(part.nbytes for part in (self.image, self.label, self.foreground, self.background))


@dataclass(frozen=True, eq=False)
class Grid:
    """(*spatial) and the affine from voxel index to mm, float64; unit for pictures, voxel sizes alone in 2D."""

    shape: tuple[int, ...]
    affine: Tensor


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A preprocessed image and the way back to its file.

    Attributes:
        image: (C, *spatial), float32, normalised a channel, as a network sees it.
        spacing: voxel size on this grid; see :class:`Sample`.
        source: the grid of the file.
        oriented: the same voxels after turning to ``data.orientation``.
        grid: after resampling; the grid of ``image``.
    """

    image: Tensor
    spacing: tuple[float, ...]
    source: Grid
    oriented: Grid
    grid: Grid


def load_sample(case: Case, data: DataConfig) -> Sample:
    """Read, check and preprocess one case; every file is read once.

    Raises:
        CaseError: names site, case and every problem of its files.
    """
    images, label = _read_case(case, data)
    affine = images[0].affine
    indices = _class_indices(label.array, case, data)
    image = torch.cat([volume.array for volume in images]) if len(images) > 1 else images[0].array
    del images, label  # they may be many times as large as what is left of them
    prepared = prepare_image(image, affine, data)
    del image
    label_on_grid = _to_grid(indices, affine, data, is_label=True)
    target = _target(convert_to_tensor(label_on_grid, dtype=torch.uint8, track_meta=False), data)
    foreground, background = _crop_indices(target, case)
    return Sample(
        case=case.name,
        image=prepared.image,
        label=target,
        spacing=prepared.spacing,
        foreground=foreground,
        background=background,
    )


def case_findings(case: Case, data: DataConfig) -> tuple[list[str], list[str]]:
    """What reading a case's files whole shows.

    Returns:
        Every problem, none where :func:`load_sample` would take the case; and the channels that look like CT: whole
        numbers, of which some are below 0.
    """
    volumes, problems = _read_and_check(case, data)
    channels = [] if problems else [channel for volume in volumes[:-1] for channel in volume.array]
    named = zip(data.channels, channels, strict=False)
    return problems, [name for name, values in named if values.min() < 0 and torch.equal(values, values.round())]


def prepare_image(array: Tensor, affine: NDArray[np.float64] | None, data: DataConfig) -> PreparedImage:
    """Orient, resample and normalise an image: the one way from a file's voxels to a network's input.

    Args:
        array: (C, *spatial), float32, values as stored, checked.
        affine: 4x4, voxel index to mm; None for pictures.
        data: says how.
    """
    source = with_affine(array, affine)
    oriented = _orient(source, data)
    grid = _resample(oriented, data, is_label=False)
    if data.normalise == "nonzero" and (data.target_spacing_mm is not None or data.resize is not None):
        grid = without_noise(grid)
    normalise = NormalizeIntensity(nonzero=data.normalise == "nonzero", channel_wise=True)
    flat = normalise(convert_to_tensor(grid, track_meta=False).flatten(1))  # MONAI notes 8 bytes a voxel for each axis
    return PreparedImage(
        image=convert_to_tensor(flat, dtype=torch.float32, track_meta=False).reshape(grid.shape).contiguous(),
        spacing=_spacing(grid, data),
        source=_grid_of(source),
        oriented=_grid_of(oriented),
        grid=_grid_of(grid),
    )


def read_image(case: Case, data: DataConfig) -> Volume:
    """The channels of a case without its label, (C, *spatial) in the order of ``data.channels``, checked.

    Raises:
        DataError: names every problem of its files, also that there is nothing on them.
    """
    volumes, problems = _read_files(case, case.images, data)
    if not problems:
        shapes = [tuple(volume.array.shape) for volume in volumes]
        problems = channel_problems(case, shapes, data) + grid_problems(case, case.images, shapes)
        problems += affine_problems(case, volumes[0].affine, data) + intensity_problems(case, volumes, data)
    if not problems and all(channel.min() == channel.max() for volume in volumes for channel in volume.array):
        problems = [f"image {case.images[0]} has one value everywhere: it is empty; export it again"]
    if problems:
        raise DataError("; ".join(problems))
    warn_affines(case, case.images, volumes)
    return Volume(torch.cat([volume.array for volume in volumes]), volumes[0].affine)


def read_target(case: Case, data: DataConfig) -> tuple[Tensor, tuple[float, ...], NDArray[np.float64] | None]:
    """The label of a case on its own grid, neither turned nor resampled.

    Returns:
        The target, (1, *spatial) class indices or (R, *spatial) regions as in :class:`Sample`; the voxel
        size, ones where spacing is not real; and the affine, None for pictures.

    Raises:
        DataError: names every problem of the file.
    """
    volumes, problems = _read_files(case, (case.label,), data)
    problems = problems or label_problems(case, volumes[0].array, data)
    if problems:
        raise DataError("; ".join(problems))
    array, affine = volumes[0].array, volumes[0].affine
    target = _target(_class_indices(array, case, data), data)
    return target, _spacing(with_affine(array, affine), data), affine


# --- reading -------------------------------------------------------------------------------------


def _read_case(case: Case, data: DataConfig) -> tuple[list[Volume], Volume]:
    """All files of a case, checked; every problem that can be seen is in the one error."""
    volumes, problems = _read_and_check(case, data)
    if problems:
        raise CaseError(case, problems)
    warn_affines(case, (*case.images, case.label), volumes)
    return volumes[:-1], volumes[-1]


def _read_and_check(case: Case, data: DataConfig) -> tuple[list[Volume], list[str]]:
    """The files of a case that can be read, the label last, and every problem."""
    volumes, problems = _read_files(case, (*case.images, case.label), data)
    if not problems:
        shapes = [tuple(volume.array.shape) for volume in volumes]
        problems = channel_problems(case, shapes[:-1], data)
        problems += grid_problems(case, (*case.images, case.label), shapes)
        problems += affine_problems(case, volumes[0].affine, data)
        problems += intensity_problems(case, volumes[:-1], data)
        problems += label_problems(case, volumes[-1].array, data)
    return volumes, problems


def _read_files(case: Case, paths: Sequence[str], data: DataConfig) -> tuple[list[Volume], list[str]]:
    """Those of a case's files that can be read, on the axes of the first, and a problem for each one that cannot."""
    volumes: list[Volume] = []
    problems: list[str] = []
    for path in paths:
        role = label_role(case.label_threshold) if path == case.label else "image"
        try:
            volume = read_volume(path, spatial_dims=data.spatial_dims, role=role)
            volumes.append(turned(volume, header_of(volumes[0])) if volumes else volume)
        except DataError as error:
            problems.append(str(error))
    return volumes, problems


# --- preprocessing -------------------------------------------------------------------------------


def _class_indices(label: Tensor, case: Case, data: DataConfig) -> Tensor:
    """(1, *spatial) uint8: the place of each value in ``data.labels``; a thresholded mask gives 0 and 1.

    Of a coloured mask any colour above the threshold is foreground.
    """
    label = without_alpha(label, case.label)
    if case.label_threshold is not None:
        return (label > case.label_threshold).any(dim=0, keepdim=True).to(torch.uint8)
    indices = torch.zeros_like(label[:1], dtype=torch.uint8)
    for index, value in enumerate(data.labels.values()):
        indices[label[:1] == value] = index
    return indices


def _to_grid(array: Tensor, affine: NDArray[np.float64] | None, data: DataConfig, *, is_label: bool) -> MetaTensor:
    """Orient and resample (C, *spatial); the result keeps its affine.

    Images that shrink to half or less are averaged over each new voxel (``area``). It averages whole old voxels, which
    would shift an image that shrinks less: such images are interpolated linearly. Labels take the nearest
    voxel's centre (``nearest-exact``, which stays aligned with the image; ``nearest`` shifts it by half a
    voxel): it keeps the share of thin structures, which a majority vote would erase.
    """
    return _resample(_orient(with_affine(array, affine), data), data, is_label=is_label)


def with_affine(array: Tensor, affine: NDArray[np.float64] | None) -> MetaTensor:
    """(C, *spatial) with its affine, in 2D reduced to the voxel sizes.

    Of a 2D grid MONAI keeps the affine's upper left 2 x 2 block, which is wrong unless the slice is axial.
    """
    affine = np.eye(4) if affine is None else affine
    if array.ndim == 3:
        affine = np.diag([*np.linalg.norm(affine[:3, :2], axis=0), 1.0, 1.0])
    return MetaTensor(array, affine=torch.as_tensor(affine))


def _orient(grid: MetaTensor, data: DataConfig) -> MetaTensor:
    """Swapped and flipped axes, in 3D."""
    if data.spatial_dims == 2 or data.orientation is None:
        return grid
    return _checked(Orientation(axcodes=data.orientation, labels=AXIS_CODES)(grid))


def _resample(oriented: MetaTensor, data: DataConfig, *, is_label: bool) -> MetaTensor:
    """Another voxel size or number of voxels; see :func:`_to_grid`."""
    grid: Tensor = oriented
    if data.target_spacing_mm is not None:
        grid = respaced(oriented, data.target_spacing_mm, mode="nearest" if is_label else "bilinear")
    if data.resize is not None and tuple(grid.shape[1:]) != tuple(data.resize):
        pairs = zip(data.resize, grid.shape[1:], strict=True)
        shrinks = all(new == old or 2 * new <= old for new, old in pairs)
        linear = "bilinear" if data.spatial_dims == 2 else "trilinear"
        mode = "nearest-exact" if is_label else "area" if shrinks else linear
        grid = Resize(data.resize, mode=mode, anti_aliasing=mode == linear)(grid)
    return _checked(grid)


def respaced(oriented: MetaTensor, spacing_mm: Sequence[float], **options: Any) -> MetaTensor:
    """Other voxel sizes along the axes that the voxels have: the first voxel stays where it is.

    Tilt and shear are put aside meanwhile. With them MONAI's ``Spacing`` gives the same grid, but for the rounding of a
    tilted affine that was stored in float32, as NIfTI does: then one that is shifted by up to half a voxel.

    Args:
        oriented: (C, *spatial) with its affine.
        spacing_mm: the size of the new voxels, one number for each axis.
        options: of ``Spacing``.
    """
    affine = torch.as_tensor(oriented.affine, dtype=torch.float64)
    sizes = torch.diag(torch.cat([affine[:3, :3].norm(dim=0), torch.ones(1, dtype=torch.float64)]))
    grid = _checked(Spacing(spacing_mm, **options)(MetaTensor(oriented.as_tensor(), affine=sizes)))
    if not options.get("lazy"):
        grid.affine = affine @ torch.linalg.inv(sizes) @ torch.as_tensor(grid.affine, dtype=torch.float64)
    return grid


def without_noise(grid: MetaTensor) -> MetaTensor:
    """Sets to 0 what the rounding of interpolation has left where there was nothing: (C, *spatial).

    Between two zeros and beside a voxel of 1000 it leaves 1e-12, or 1e-3 where the affine was stored in float32. As
    "not 0" such a rim would count as image, and its voxels would be the darkest ones after normalising.
    """
    largest = grid.abs().amax(dim=tuple(range(1, grid.ndim)), keepdim=True)
    return _checked(grid.masked_fill(grid.abs() <= NOISE * largest, 0))


def _checked(grid: Tensor) -> MetaTensor:
    assert isinstance(grid, MetaTensor), "monai.data.set_track_meta(False) was called: affines are lost"
    return grid


def _grid_of(grid: MetaTensor) -> Grid:
    return Grid(tuple(grid.shape[1:]), torch.as_tensor(grid.affine, dtype=torch.float64))


def _target(indices: Tensor, data: DataConfig) -> Tensor:
    """(1, *spatial) uint8 class indices as they are, or (R, *spatial) float32 regions."""
    if data.regions is None:
        return indices.contiguous()
    names = list(data.labels)
    members = [
        torch.tensor([names.index(part) for part in parts], dtype=torch.uint8) for parts in data.regions.values()
    ]
    return torch.cat([torch.isin(indices, member) for member in members]).to(torch.float32)


def _crop_indices(target: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Where patches of a training case may be centred: places of foreground and background in the flattened grid.

    As MONAI's ``map_binary_to_indices``, but int32 and piece by piece: that one takes 16 bytes for each voxel.
    """
    if case.split not in (None, "train"):
        return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    mask = (target > 0).any(dim=0).flatten()
    return _places(mask), _places(~mask)


def _places(mask: Tensor) -> Tensor:
    """Where a flat mask is true, int32."""
    pieces = [
        (mask[start : start + PIECE].nonzero()[:, 0] + start).to(torch.int32) for start in range(0, len(mask), PIECE)
    ]
    return torch.cat(pieces)


def _spacing(grid: MetaTensor, data: DataConfig) -> tuple[float, ...]:
    if not data.spacing_is_real:
        return (1.0,) * data.spatial_dims
    return tuple(float(size) for size in grid.pixdim[: data.spatial_dims])
