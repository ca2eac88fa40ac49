"""Image files to tensors: NIfTI by nibabel, pictures by Pillow, channels first, values as stored.

Legend: C channels, D H W voxels (2D: H rows, W columns).
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gcml_ray.errors import DataError

log = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
EXIF_ORIENTATION = 274
UNREADABLE = (OSError, EOFError, ValueError, TypeError, SyntaxError, zlib.error, ImageFileError)


@dataclass(frozen=True)
class Header:
    """What a file says about itself: (channels, *spatial) and its affine, None for pictures."""

    shape: tuple[int, ...]
    affine: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class Volume:
    """One file's content.

    Attributes:
        array: (C, *spatial), float32, values as stored (NIfTI scaling applied).
        affine: 4x4, voxel index to mm; None for pictures, which have none.
    """

    array: Tensor
    affine: NDArray[np.float64] | None


def is_picture(path: str) -> bool:
    """Whether Pillow reads this file: a 2D picture without physical voxel size."""
    return path.lower().endswith(PICTURES)


def read_header(path: str, *, spatial_dims: int) -> Header:
    """Shape and affine without reading the voxels.

    Raises:
        DataError: the file is missing, not an image, or of another number of axes.
    """
    image = _open(path)
    if isinstance(image, Image.Image):
        with image:
            shape: tuple[int, ...] = (image.height, image.width, len(image.getbands()))
        affine = None
    else:
        shape, affine = tuple(image.shape), _affine(image)
    return Header(_channel_first_shape(shape, spatial_dims, path), affine)


def read_volume(path: str, *, spatial_dims: int) -> Volume:
    """Read one file whole; further axes beyond the spatial ones become channels.

    Pictures keep their rows as the first axis; an alpha channel counts as a channel.

    Raises:
        DataError: the file is missing, corrupt, not an image, or of another number of axes.
    """
    image = _open(path)
    try:
        if isinstance(image, Image.Image):
            with image:
                array, affine = np.asarray(image), None
            array = array[..., None] if array.ndim == 2 else array
        else:
            array, affine = np.asanyarray(image.dataobj), _affine(image)
        array = array.astype(np.float32)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); copy or export the file again") from error
    shape = _channel_first_shape(array.shape, spatial_dims, path)
    spatial = array.reshape(*shape[1:], shape[0])
    return Volume(torch.from_numpy(np.ascontiguousarray(np.moveaxis(spatial, -1, 0))), affine)


def _open(path: str) -> Any:
    """A Pillow or nibabel image whose voxels are not read yet."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; check the datalist's paths")
    try:
        image = Image.open(path) if is_picture(path) else nibabel.load(path)
    except UNREADABLE as error:
        accepted = f"NIfTI (.nii, .nii.gz) and pictures ({', '.join(PICTURES)}) are read"
        raise DataError(f"{path}: not an image that can be opened ({_reason(error)}); {accepted}") from error
    if isinstance(image, Image.Image):
        pages = getattr(image, "n_frames", 1)
        if pages != 1:
            raise DataError(f"{path}: has {pages} pages; store a volume as NIfTI, or one page a file")
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            log.warning("%s: its EXIF tag asks for a rotation, which is not applied: check it against its mask", path)
    return image


def _affine(image: Any) -> NDArray[np.float64]:
    return np.asarray(image.affine, dtype=np.float64)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _channel_first_shape(shape: tuple[int, ...], spatial_dims: int, path: str) -> tuple[int, ...]:
    """(channels, *spatial) of a stored shape: (*spatial), (*spatial, C) or with axes of length 1 between."""
    spatial, further = shape[:spatial_dims], tuple(size for size in shape[spatial_dims:] if size != 1)
    if len(spatial) < spatial_dims or len(further) > 1 or (is_picture(path) and spatial_dims == 3):
        raise DataError(f"{path}: has the shape {shape}, data.spatial_dims is {spatial_dims}; change one of them")
    if 0 in shape:
        raise DataError(f"{path}: is empty, its shape is {shape}")
    return (*further, *spatial) if further else (1, *spatial)
