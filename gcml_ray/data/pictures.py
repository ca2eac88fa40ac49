"""Pictures by Pillow: what it would read otherwise than stored is decoded here, or refused.

Legend: H rows, W columns, C channels.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gcml_ray.errors import DataError

log = logging.getLogger(__name__)

# What a file is read as. Image: stored values, of a palette its colours. Label: stored values, of a palette the places
# in it. Mask, which a threshold divides: grey as a viewer shows it, so that 127 means the same with any number of bits.
Role = Literal["image", "label", "mask"]

EXIF_ORIENTATION, TIFF_BITS = 274, 258  # tags
PALETTES = ("P", "PA")
NO_CHANNELS = ("CMYK", "YCbCr", "LAB", "HSV")  # modes whose channels are neither grey, colours nor opacity
DEEP = ("I", "F")  # how the modes begin that hold more than 8 bits
OPAQUE = 255
_ROTATED: set[Path] = set()  # folders of pictures whose rotation was told


def label_role(threshold: float | None) -> Role:
    """What a case's label file is read as; ``threshold``: of its mask, where it has one."""
    return "label" if threshold is None else "mask"


def open_picture(path: str) -> Image.Image:
    """A picture whose pixels are not read yet.

    Raises:
        DataError: it has several pages, or channels that Pillow cuts or that mean nothing here.
    """
    picture: Image.Image = Image.open(path)
    pages = getattr(picture, "n_frames", 1)
    if pages != 1:
        raise DataError(f"{path}: has {pages} pages; store a volume as NIfTI, or one page a file")
    if picture.mode in NO_CHANNELS:
        raise DataError(f"{path}: is a picture in {picture.mode}; convert it to RGB or to grey")
    bits = _stored_bits(picture, path)
    if picture.format == "BMP" and picture.mode == "1" and bits != 1:
        raise DataError(
            f"{path}: is a BMP of {bits} bits in black and white, which would be read wrongly; save it as PNG"
        )
    if bits > 8 and not picture.mode.startswith(DEEP):
        raise DataError(
            f"{path}: is a picture of several channels of {bits} bits, of which 8 would be read; convert it to 8 bits, "
            f"or store one grey file of {bits} bits a channel"
        )
    if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
        _say_rotation(Path(path))
    return picture


def _say_rotation(path: Path) -> None:
    """Once for each folder."""
    if path.parent not in _ROTATED:
        _ROTATED.add(path.parent)
        log.warning(
            "%s, and perhaps others beside it: an EXIF tag asks for a rotation, which is not applied: check the "
            "pictures against their masks",
            path,
        )


def picture_shape(picture: Image.Image, *, role: Role) -> tuple[int, int, int]:
    """(H, W, C) as :func:`picture_values` gives it; pixels are read only where a palette's colours are wanted."""
    shown = picture if role == "label" else _without_palette(picture)
    return shown.height, shown.width, len(shown.getbands())


def picture_values(picture: Image.Image, path: str, *, role: Role) -> NDArray[Any]:
    """The values (H, W, C) that a picture has in its role, see :data:`Role`."""
    shown = picture if role == "label" else _without_palette(picture)
    array = np.asarray(shown.convert("L") if role == "mask" and shown.mode == "1" else shown)
    if role != "mask" and picture.mode == "L" and (bits := _stored_bits(picture, path)) in (2, 4):
        array = array // (OPAQUE // (2**bits - 1))  # Pillow stretches them to 0..255
    return array[..., None] if array.ndim == 2 else array


def _stored_bits(picture: Image.Image, path: str) -> int:
    """Bits a channel in the file, of the kinds that Pillow changes: PNG, TIFF and BMP (there bits a pixel)."""
    if picture.format == "TIFF":
        return int(max(picture.tag_v2.get(TIFF_BITS, (1,))))  # type: ignore[attr-defined]  # of Pillow's TIFF class
    if picture.format not in ("PNG", "BMP"):
        return 8
    with Path(path).open("rb") as file:
        head = file.read(30)
    if picture.format == "BMP":
        return int.from_bytes(head[28:30], "little") if picture.mode == "1" else 8
    return head[24] if head[12:16] == b"IHDR" else 8


def _without_palette(picture: Image.Image) -> Image.Image:
    """The colours behind a palette: grey where all that are used are grey, with opacity where one is transparent."""
    if picture.mode not in PALETTES:
        return picture
    coloured = picture.convert("RGBA")
    pixels = np.asarray(coloured)
    is_grey = bool((pixels[..., :3] == pixels[..., :1]).all())
    is_opaque = bool((pixels[..., 3] == OPAQUE).all())
    return coloured.convert(("L" if is_grey else "RGB") if is_opaque else ("LA" if is_grey else "RGBA"))
