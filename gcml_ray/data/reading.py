"""Image files to tensors: NIfTI by nibabel, pictures by Pillow, channels first, values as stored.

Legend: C channels, D H W voxels (2D: H rows, W columns).
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, SpatialImage
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gcml_ray.data.pictures import Role, open_picture, picture_shape, picture_values
from gcml_ray.errors import DataError

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, SyntaxError, LookupError, OverflowError, MemoryError),
    *(zlib.error, struct.error, ImageFileError, HeaderDataError, HeaderTypeError, Image.DecompressionBombError),
)
CHUNK = 1 << 20  # bytes
OTHER_UNITS = {1: ("metres", "1000"), 3: ("microns", "0.001")}  # NIfTI's codes; of 2 and of no unit lengths are mm
LABEL_ROUNDING = 1e-3  # how far a label's value may be from the whole number that it stands for
MIN_ANGLE = 1e-3  # between an axis and the plane of the others, roughly and in radians


@dataclass(frozen=True)
class Header:
    """What a file says about itself: (channels, *spatial) and its affine, None for pictures."""

    shape: tuple[int, ...]
    affine: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class Volume:
    """One file's content.

    Attributes:
        array: (C, *spatial), of a file read float32, values as stored (NIfTI scaling applied).
        affine: 4x4, voxel index to mm; None for pictures, which have none.
    """

    array: Tensor
    affine: NDArray[np.float64] | None


def is_picture(path: str) -> bool:
    """Whether Pillow reads this file: a 2D picture without physical voxel size."""
    return path.lower().endswith(PICTURES)


def spatial_dims_of(path: str) -> int:
    """2 for pictures and for NIfTI files of two axes, else 3."""
    if is_picture(path):
        return 2
    try:
        read_header(path, spatial_dims=3)
    except DataError:
        try:
            read_header(path, spatial_dims=2)
        except DataError:
            return 3
        return 2
    return 3


def read_header(path: str, *, spatial_dims: int, role: Role = "image") -> Header:
    """Shape and affine without reading the voxels, so damage further on in the file is not seen.

    Args:
        path: the file.
        spatial_dims: 2 or 3.
        role: what a picture is read as; means nothing for volumes.

    Raises:
        DataError: the file is missing, not an image, or of another number of axes.
    """
    image = _open(path)
    if isinstance(image, Image.Image):
        try:
            with image:
                shape: tuple[int, ...] = picture_shape(image, role=role)
        except UNREADABLE as error:
            raise _not_read(path, error) from error
        affine = None
    else:
        shape, affine = tuple(image.shape), _affine(image)
    return Header(_channel_first_shape(shape, spatial_dims, path), affine)


def read_volume(path: str, *, spatial_dims: int, role: Role = "image") -> Volume:
    """Read one file whole; further axes beyond the spatial ones become channels.

    Pictures keep their rows as the first axis; an alpha channel counts as a channel. Compressed volumes are read to
    their end, where the checksum is. Of labels what rounding made of whole numbers, such as 1.0000001, is whole again.

    Args:
        path: the file.
        spatial_dims: 2 or 3.
        role: what a picture is read as; a label's values are rounded, in volumes too.

    Raises:
        DataError: the file is missing, corrupt, not an image, or of another number of axes.
    """
    image = _open(path)
    try:
        if isinstance(image, Image.Image):
            with image:
                array, affine = picture_values(image, path, role=role), None
        else:
            array, affine = _voxels(image), _affine(image)
        is_rounded = role == "label" and array.dtype.kind == "f"
        with np.errstate(over="ignore"):  # beyond float32 values become infinite, and are refused as such
            array = array.astype(np.float32)
        array = _whole(array) if is_rounded else array
    except UNREADABLE as error:
        raise _not_read(path, error) from error
    shape = _channel_first_shape(array.shape, spatial_dims, path)
    spatial = array.reshape(*shape[1:], shape[0])
    return Volume(torch.from_numpy(np.ascontiguousarray(np.moveaxis(spatial, -1, 0))), affine)


def affine_problem(path: str, affine: NDArray[np.float64] | None, *, spatial_dims: int) -> str | None:
    """Why voxels cannot be placed by an affine, or None; pictures have none, which is no problem here."""
    if affine is None:
        return None
    axes = affine[:3, :spatial_dims]
    sizes = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or (sizes <= 0).any():
        return f"{path} has an unusable affine (voxel sizes {sizes.tolist()}); write its header again"
    rank = int(np.linalg.matrix_rank(axes / sizes, tol=MIN_ANGLE))
    if rank < spatial_dims == 3:
        shown = affine[:3, :3].round(4).tolist()
        return f"{path} has an unusable affine (its axes span {rank} of 3 directions: {shown}); write its header again"
    return None


def values_text(values: Sequence[float]) -> str:
    """Up to ten values of float32 files, each with as many digits as tell it from every other number."""
    shown = ", ".join(np.format_float_positional(np.float32(value), trim="-") for value in values[:10])
    return shown + (", ..." if len(values) > 10 else "")


# --- files ---------------------------------------------------------------------------------------


def _open(path: str) -> Any:
    """A Pillow or nibabel image; of volumes, the voxels are not read yet.

    Raises:
        DataError: the file is missing, may not be read, is not an image, has several pages or too many pixels.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}; check the path")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: may not be read by this user; change its permissions")
    try:
        return open_picture(path) if is_picture(path) else _open_volume(path)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(
            f"{path}: has more than {limit} pixels, or its header is damaged{_reason(error)}; cut it into smaller "
            "pictures, or export it again"
        ) from error
    except UNREADABLE as error:
        raise DataError(f"{path}: not an image that can be opened{_reason(error)}; {_accepted()}") from error


def _open_volume(path: str) -> Any:
    image: Any = nibabel.load(path)
    if not isinstance(image, SpatialImage):
        raise DataError(f"{path}: is a {type(image).__name__}, which has no voxels on a grid; {_accepted()}")
    problem = _number_problem(image) or _unit_problem(image)
    if problem:
        raise DataError(f"{path}: {problem}")
    return image


def _number_problem(image: Any) -> str | None:
    kind = np.dtype(image.get_data_dtype())
    if kind.names:
        return f"holds colours ({', '.join(kind.names)}) in each voxel; store one channel of numbers for each"
    if kind.kind != "c":
        return None
    return (
        f"holds complex numbers ({kind.name}), of which only the real part would be read; store their magnitude, or "
        "real and imaginary part as two channels"
    )


def _unit_problem(image: Any) -> str | None:
    if not isinstance(image.header, nibabel.Nifti1Header):
        return None
    name, factor = OTHER_UNITS.get(int(image.header["xyzt_units"]) & 7, ("", ""))
    return name and (
        f"its header gives lengths in {name} (xyzt_units), which would be read as mm; multiply its affine by {factor} "
        "and set the unit to mm, or set the unit alone if the numbers are mm"
    )


def _accepted() -> str:
    return f"NIfTI (.nii, .nii.gz) and pictures ({', '.join(PICTURES)}) are read"


def _voxels(image: Any) -> NDArray[Any]:
    """The voxels of a volume. Of compressed files the rest is read too, as the checksum comes after the voxels.

    Raises:
        OSError, EOFError, zlib.error: a file is damaged.
    """
    with ExitStack() as stack:
        streams = {
            part: stack.enter_context(ImageOpener(holder.filename)).fobj
            for part, holder in image.file_map.items()
            if _is_compressed(holder.filename)
        }
        if not streams:
            return np.asanyarray(image.dataobj)
        held = {part: FileHolder(fileobj=stream) for part, stream in streams.items()}
        array: NDArray[Any] = np.asanyarray(type(image).from_file_map(image.file_map | held).dataobj)
        for stream in streams.values():
            while stream.read(CHUNK):
                pass
    return array


def _whole(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values with those that lie next to a whole number moved onto it."""
    nearest = np.rint(values)
    if np.array_equal(values, nearest):
        return values
    with np.errstate(invalid="ignore"):  # infinity less itself
        np.copyto(values, nearest, where=np.abs(values - nearest) <= LABEL_ROUNDING)
    return values


def _is_compressed(name: str | None) -> bool:
    """Whether nibabel unpacks this file; some formats name one that need not exist."""
    return name is not None and Path(name).suffix.lower() in ImageOpener.compress_ext_map and Path(name).is_file()


def _affine(image: Any) -> NDArray[np.float64]:
    return np.asarray(image.affine, dtype=np.float64)


def _not_read(path: str, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read{_reason(error)}; copy or export the file again")


def _reason(error: BaseException) -> str:
    """What the library said, and that the file is damaged where that is sure."""
    if isinstance(error, MemoryError):
        return ", its header asks for more memory than there is: is it damaged?"
    damage = ", it is damaged" if isinstance(error, DAMAGED) else ""
    words = " ".join(str(error).split()).removesuffix(" - could the file be damaged?")
    return f"{damage} ({type(error).__name__}: {words})"


def _channel_first_shape(shape: tuple[int, ...], spatial_dims: int, path: str) -> tuple[int, ...]:
    """(channels, *spatial) of a stored shape: (*spatial), (*spatial, C) or with axes of length 1 between."""
    spatial, further = shape[:spatial_dims], tuple(size for size in shape[spatial_dims:] if size != 1)
    if len(spatial) < spatial_dims or len(further) > 1 or (is_picture(path) and spatial_dims == 3):
        raise DataError(f"{path}: has the shape {shape}, data.spatial_dims is {spatial_dims}; change one of them")
    if 0 in shape:
        raise DataError(f"{path}: is empty, its shape is {shape}")
    return (*further, *spatial) if further else (1, *spatial)
