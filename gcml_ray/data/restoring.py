"""From a network's voxel grid back to the grid of the file: the inverse of :func:`gcml_ray.data.loading.prepare_image`.

Legend: C classes or regions, *grid = what the network saw, *source = the file's own (D, H, W or H, W).
"""

from __future__ import annotations

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.spatial.array import SpatialResample
from torch import Tensor
from torch.nn.functional import interpolate

from gcml_ray.config import DataConfig
from gcml_ray.data.loading import Grid, PreparedImage


def is_resampled(prepared: PreparedImage) -> bool:
    """Whether voxels were interpolated, so that scores have to be as well."""
    same = torch.allclose(prepared.grid.affine, prepared.oriented.affine, atol=1e-6)
    return prepared.grid.shape != prepared.oriented.shape or not same


def restore(scores: Tensor, prepared: PreparedImage, data: DataConfig) -> Tensor:
    """Scores of a network on the grid of the image's file.

    Resampled images go back linearly: probabilities are interpolated and decided afterwards, which is smoother
    than the nearest label. Axes then go back to the file's order and direction, which is exact.

    Args:
        scores: (C, *grid), float.
        prepared: the image they are about.
        data: says how the image was resampled.

    Returns:
        (C, *source), float32.
    """
    if is_resampled(prepared):
        scores = _resample_back(scores, prepared, by_size=data.resize is not None)
    return _orient_back(scores, prepared.source, prepared.oriented)


def _resample_back(scores: Tensor, prepared: PreparedImage, *, by_size: bool) -> Tensor:
    """(C, *grid) to (C, *oriented), voxel centres aligned as they were on the way in."""
    target = prepared.oriented
    if by_size:
        mode = "bilinear" if len(target.shape) == 2 else "trilinear"
        return interpolate(scores[None].float(), size=target.shape, mode=mode, align_corners=False)[0]
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=np.float32)
    moved = resample(
        MetaTensor(scores.float(), affine=prepared.grid.affine), dst_affine=target.affine, spatial_size=target.shape
    )
    assert isinstance(moved, MetaTensor)
    return moved.as_tensor()


def _orient_back(scores: Tensor, source: Grid, oriented: Grid) -> Tensor:
    """(C, *oriented) to (C, *source): the two affines differ by swapped and flipped axes alone."""
    num_axes = len(source.shape)
    step = torch.linalg.solve(source.affine, oriented.affine)[:num_axes, :num_axes].round()
    places = step.abs().argmax(dim=1)  # source axis -> the oriented axis that runs along it
    flips = [1 + axis for axis in range(num_axes) if step[axis, places[axis]] < 0]
    moved = scores.permute(0, *(1 + int(place) for place in places)).flip(flips)
    assert tuple(moved.shape[1:]) == source.shape, (tuple(moved.shape), source.shape)
    return moved
