"""Whether the files of a case lie on one grid, and the turn of those that are stored on other axes.

Programs may store the same voxels with swapped or mirrored axes, and say so in the affine. Such a file is turned onto
the axes of the case's first one before voxels are matched by index.
"""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from gcml_ray.data.reading import Header, Volume

MAX_SHIFT = 0.1  # of a voxel: headers of one case may differ by rounding, not by more


def shift_mm(first: Header, other: Header) -> float:
    """How far apart two files of one shape place a corner voxel, at most; 0 where one has no affine."""
    if first.affine is None or other.affine is None:
        return 0.0
    shape = first.shape[1:]
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(len(shape), -1)
    places = np.vstack([np.pad(corners, ((0, 3 - len(shape)), (0, 0))), np.ones(corners.shape[1])])
    return float(np.linalg.norm(((first.affine - other.affine) @ places)[:3], axis=0).max())


def on_one_grid(first: Header, other: Header) -> bool:
    """Whether two files have one shape and place their voxels alike, to a tenth of the smallest side of a voxel."""
    if first.shape[1:] != other.shape[1:]:
        return False
    if first.affine is None or other.affine is None:
        return True
    voxel = float(np.linalg.norm(first.affine[:3, :3], axis=0)[: len(first.shape) - 1].min())
    shift = shift_mm(first, other)
    return bool(np.isfinite(shift) and shift <= MAX_SHIFT * voxel)


def turned_header(header: Header, onto: Header) -> Header:
    """A file's header after the turn of :func:`turned`."""
    found = _turn(header, onto)
    return header if found is None else found[1]


def turned(volume: Volume, onto: Header) -> Volume:
    """A volume or slice whose axes are swapped or mirrored against another one, on the axes of that; else as it is."""
    found = _turn(header_of(volume), onto)
    if found is None:
        return volume
    orientation, header = found
    voxels: Any = nibabel.apply_orientation(np.moveaxis(volume.array.numpy(), 0, -1), orientation)  # type: ignore[no-untyped-call]
    return Volume(torch.from_numpy(np.ascontiguousarray(np.moveaxis(voxels, -1, 0))), header.affine)


def header_of(volume: Volume) -> Header:
    """Shape and affine of a volume that was read."""
    return Header(tuple(volume.array.shape), volume.affine)


def _turn(header: Header, onto: Header) -> tuple[NDArray[Any], Header] | None:
    """The orientation, as nibabel has it, that brings one file onto another's axes, and the header then; or None."""
    own, wanted, dims = header.affine, onto.affine, len(header.shape) - 1
    if own is None or wanted is None or len(onto.shape) - 1 != dims or on_one_grid(onto, header):
        return None
    if not (np.isfinite(own).all() and np.isfinite(wanted).all()):
        return None
    if abs(np.linalg.det(wanted[:3, :3])) < np.finfo(np.float64).tiny:
        return None
    between = np.linalg.inv(wanted) @ own  # from one's voxels to the other's: swaps and signs where a turn does
    orientation: Any = nibabel.io_orientation(between)  # type: ignore[no-untyped-call]
    if np.isnan(orientation).any() or sorted(orientation[:dims, 0]) != list(range(dims)):  # of slices: out of the plane
        return None
    sizes = (*header.shape[1:], 1)[:3]
    back: Any = nibabel.orientations.inv_ornt_aff(orientation, sizes)  # type: ignore[no-untyped-call]
    shape = tuple(header.shape[1:][int(place)] for place in np.argsort(orientation[:dims, 0]))
    found = Header((header.shape[0], *shape), own @ back)
    return (orientation[:dims], found) if on_one_grid(onto, found) else None
