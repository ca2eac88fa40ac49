"""What can be wrong with the files of one case, as its headers or its voxels show it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcml_ray.config import DataConfig
from gcml_ray.data.datalist import Case
from gcml_ray.data.one_grid import header_of, on_one_grid, turned_header
from gcml_ray.data.pictures import label_role
from gcml_ray.data.reading import Header, Volume, affine_problem, is_picture, read_header, values_text
from gcml_ray.errors import DataError

log = logging.getLogger(__name__)

MAX_LABEL = 65535  # atlases number their structures into the thousands
WITH_ALPHA = (2, 4)  # channels of a picture whose last one is its opacity
VOLUME_IN_2D = 3  # axes, one of them for channels
NOT_FINITE = "has NaN or infinite values; write it again with whole numbers"  # of a label
MAX_INTENSITY = 1e18  # float32 cannot hold the square of more, of which a standard deviation is made
MANY_VOXELS = 10_000


def check_headers(case: Case, data: DataConfig) -> tuple[list[Header], list[str]]:
    """Headers of a case's images and its label, and what they show to be wrong, without reading voxels.

    Returns:
        The headers of the files that can be read, the label's last; the problems, none where all is in order.
    """
    headers: list[Header] = []
    problems: list[str] = []
    for path in (*case.images, case.label):
        try:
            role = label_role(case.label_threshold) if path == case.label else "image"
            headers.append(read_header(path, spatial_dims=data.spatial_dims, role=role))
        except DataError as error:
            problems.append(str(error))
    if not problems:
        shapes = [turned_header(header, headers[0]).shape for header in headers]
        problems = channel_problems(case, shapes[:-1], data)
        problems += grid_problems(case, (*case.images, case.label), shapes)
        problems += affine_problems(case, headers[0].affine, data)
    return headers, problems


def channel_problems(case: Case, shapes: Sequence[tuple[int, ...]], data: DataConfig) -> list[str]:
    """``shapes``: (channels, *spatial) of each image file."""
    num_channels = sum(shape[0] for shape in shapes)
    if num_channels == len(data.channels):
        return []
    several = [(path, shape) for path, shape in zip(case.images, shapes, strict=True) if shape[0] > 1]
    volume = next((problem for path, shape in several if (problem := volume_problem(path, shape))), None)
    if volume is not None:
        return [volume]
    hints = "".join(f"; {path} alone has {shape[0]}, its shape is {_stored(shape)}" for path, shape in several[:1])
    if any(is_picture(path) and shape[0] in WITH_ALPHA for path, shape in several):
        hints += "; is one an alpha channel?"
    return [
        f"the image has {num_channels} channel(s) in {len(case.images)} file(s), data.channels lists "
        f"{len(data.channels)} ({', '.join(data.channels)}){hints}; change data.channels or the files"
    ]


def volume_problem(path: str, shape: tuple[int, ...]) -> str | None:
    """Whether a file read in 2D is a volume whose slices became channels; ``shape``: (channels, *spatial)."""
    if is_picture(path) or len(shape) != VOLUME_IN_2D or shape[0] == 1:
        return None
    stored = _stored(shape)
    if 1 in stored:
        return f"{path} is a slice of the shape {stored}: store its axis of length 1 as the last one"
    return f"{path} is a volume of the shape {stored}, data.spatial_dims is 2; set it to 3, or store one slice a file"


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Channels last, as files have them."""
    return (*shape[1:], shape[0])


def grid_problems(case: Case, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """``shapes``: (channels, *spatial) of each of the ``paths``, the first image first."""
    problems = []
    first = shapes[0][1:]
    for path, shape in zip(paths, shapes, strict=True):
        if shape[1:] != first:
            kind = "label" if path == case.label else "image"
            problems.append(
                f"{kind} {path} has the shape {shape[1:]}, image {case.images[0]} has {first}; they must be on one grid"
            )
    return problems


def affine_problems(case: Case, affine: NDArray[np.float64] | None, data: DataConfig) -> list[str]:
    """``affine``: of the first image, which places the voxels of all files of the case."""
    path = case.images[0]
    if affine is None and data.spacing_is_real:
        return [f"{path} is a picture and stores no voxel size; set data.spacing_is_real: false"]
    return [problem] if (problem := affine_problem(path, affine, spatial_dims=data.spatial_dims)) is not None else []


def intensity_problems(case: Case, images: Sequence[Volume], data: DataConfig) -> list[str]:
    """NaN, infinity and values that overflow; channels of one value, or ruled by one voxel, are a warning."""
    problems = []
    extremes = [volume.array.flatten(1).aminmax(dim=1) for volume in images]
    for path, volume, (low, high) in zip(case.images, images, extremes, strict=True):
        num_bad = int((~torch.isfinite(volume.array)).sum())
        if problem := value_problem(num_bad, float(torch.maximum(high, -low).max())):
            problems.append(f"image {path} {problem}")
    lows, highs = (torch.cat(part).tolist() for part in zip(*extremes, strict=True))
    for name, low, high in zip(data.channels, lows, highs, strict=False):
        if low == high and math.isfinite(low):
            log.warning("site %s, case %s: channel %s is %g everywhere", case.site, case.name, name, low)
    if not problems:
        channels = [channel.flatten() for volume in images for channel in volume.array]
        for name, values, low, high in zip(data.channels, channels, lows, highs, strict=False):
            _warn_outlier(case, name, values, low=low, high=high)
    return problems


def _warn_outlier(case: Case, name: str, values: Tensor, *, low: float, high: float) -> None:
    """Warns where one voxel of a channel, (N,), holds a quarter of all squared distances from the median."""
    if len(values) < MANY_VOXELS:
        return
    median = float(values[:: len(values) // MANY_VOXELS].median())
    apart = values - median
    farthest = high if high - median > median - low else low
    if (farthest - median) ** 2 > float(torch.dot(apart, apart)) / 4:
        words = "site %s, case %s: one voxel of channel %s is %g, the median %g: normalised, the others look alike"
        log.warning(words, case.site, case.name, name, farthest, median)


def value_problem(num_bad: int, largest: float) -> str:
    """What is wrong with an image of so many values that are not finite, and of this largest magnitude; or nothing."""
    if num_bad:
        return f"has {num_bad} NaN or infinite value(s); replace them, e.g. by 0"
    if largest > MAX_INTENSITY:
        return f"holds {largest:.3g}: no intensity, and its square overflows; replace it"
    return ""


def label_problems(case: Case, label: Tensor, data: DataConfig) -> list[str]:
    """Values that are no class of ``data.labels``, and channels that differ."""
    if not torch.isfinite(label).all():
        return [f"label {case.label} {NOT_FINITE}"]
    if case.label_threshold is not None:
        if len(data.labels) == 2:
            return []
        return [
            f"label_threshold makes a mask of two classes, data.labels lists {len(data.labels)} "
            f"({', '.join(data.labels)}); remove the threshold or the further classes"
        ]
    label = without_alpha(label, case.label)
    if not (label == label[:1]).all():
        several = (
            f"label {case.label} has {label.shape[0]} differing channels; store one channel of label values, "
            "or set label_threshold"
        )
        return [volume_problem(case.label, tuple(label.shape)) or several]
    known = torch.zeros_like(label[0], dtype=torch.bool)
    for value in data.labels.values():
        known |= label[0] == value
    foreign = [] if known.all() else sorted(torch.unique(label[0][~known]).tolist())
    return [_value_problem(case, foreign, data)] if foreign else []


def _value_problem(case: Case, foreign: Sequence[float], data: DataConfig) -> str:
    """``foreign``: values of the label that ``data.labels`` does not have."""
    no_class = [value for value in foreign if not (0 <= value <= MAX_LABEL and value % 1 == 0)]
    if no_class:
        return (
            f"label {case.label} holds {values_text(no_class)}; only whole numbers from 0 to {MAX_LABEL} are classes: "
            "write it again without interpolation, or set label_threshold for a grey mask"
        )
    return (
        f"label {case.label} holds the values {values_text(foreign)}, data.labels allows {dict(data.labels)}; "
        "add them there if they are classes of their own, set label_threshold for a grey mask, or write the file again "
        "if a class has another value here than elsewhere"
    )


def warn_affines(case: Case, paths: Sequence[str], volumes: Sequence[Volume]) -> None:
    """Files of one case are matched voxel by voxel; say so where their headers disagree."""
    first = header_of(volumes[0])
    for path, volume in zip(paths, volumes, strict=True):
        if not on_one_grid(first, header_of(volume)):
            log.warning(
                "site %s, case %s: %s has another affine than %s; voxels are matched by index and the latter is used",
                case.site,
                case.name,
                path,
                case.images[0],
            )


def without_alpha(label: Tensor, path: str) -> Tensor:
    """A picture's second or fourth channel is its opacity, not a label."""
    return label[:-1] if is_picture(path) and label.shape[0] in WITH_ALPHA else label
