"""Pictures that Pillow reads otherwise than they are stored: palettes, few bits, many bits, other colours."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gcml_ray.data.case_checks import check_headers
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import load_sample
from gcml_ray.data.pictures import Role
from gcml_ray.data.reading import read_header, read_volume
from gcml_ray.errors import DataError
from tests.makers import make_config

PLACES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
GREY = [200, 200, 200, 10, 10, 10, 90, 90, 90, 255, 0, 0]  # the fourth colour is not used
COLOURED = [200, 0, 50, 10, 10, 10, 90, 90, 90]


def save_palette(path: Path, palette: list[int], places: NDArray[np.uint8] = PLACES, **options: bytes) -> Path:
    picture = Image.fromarray(places, mode="P")
    picture.putpalette(palette)
    picture.save(path, **options)
    return path


def save_png(path: Path, rows: list[bytes], *, width: int, bits: int, kind: int) -> Path:
    """A PNG as it would be written by others: Pillow does not write all that it reads."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    return path


def both(path: Path, *, role: Role = "image") -> Tensor:
    """The values, which have the shape that the header says."""
    array = read_volume(str(path), spatial_dims=2, role=role).array
    assert read_header(str(path), spatial_dims=2, role=role).shape == tuple(array.shape)
    return array


# --- palettes


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_image_with_a_palette_is_read_as_its_colours(tmp_path: Path, ending: str) -> None:
    grey = both(save_palette(tmp_path / f"grey.{ending}", GREY))
    assert grey.tolist() == [np.array([200, 10, 90])[PLACES].tolist()]
    coloured = both(save_palette(tmp_path / f"coloured.{ending}", COLOURED))
    assert coloured.shape == (3, 3, 4)
    assert coloured[:, 0, 0].tolist() == [200, 0, 50]


@pytest.mark.parametrize(("palette", "first"), [(GREY, [200, 7]), (COLOURED, [200, 0, 50, 7])])
def test_transparent_colour_gives_the_channel_that_other_pictures_have(
    tmp_path: Path, palette: list[int], first: list[int]
) -> None:
    path = save_palette(tmp_path / "x.png", palette, transparency=bytes([7, 255, 255]))
    assert both(path)[:, 0, 0].tolist() == first
    opaque = save_palette(tmp_path / "y.png", palette, transparency=bytes([255, 255, 255]))
    assert both(opaque)[:, 0, 0].tolist() == first[:-1]


def test_label_with_a_palette_keeps_its_places(tmp_path: Path) -> None:
    path = save_palette(tmp_path / "x.png", COLOURED)
    assert both(path, role="label").tolist() == [PLACES.tolist()]


def test_case_of_two_palettes_is_read_as_image_and_label(tmp_path: Path) -> None:
    data = make_config(tmp_path, spatial_dims=2, data={"channels": ["grey"], "normalise": "all"}).data
    places = np.zeros((16, 16), np.uint8)
    places[4:8, 4:8] = 1
    image = save_palette(tmp_path / "image.png", [200, 200, 200, 10, 10, 10], places)
    label = save_palette(tmp_path / "label.png", [0, 0, 0, 255, 0, 0], places)
    case = Case("A", "p", (str(image),), str(label), "train")
    assert check_headers(case, data)[1] == []
    sample = load_sample(case, data)
    assert sample.label.sum() == 16
    assert sample.image[0, 0, 0] > sample.image[0, 5, 5]  # the marked is dark


@pytest.mark.parametrize("name", ["8.png", "1.png", "1.tif", "1.bmp", "palette.png"])
def test_a_threshold_means_the_same_however_a_mask_is_stored(tmp_path: Path, name: str) -> None:
    """Black and white by 127, in one bit, in eight, or as two colours of a palette."""
    data = make_config(tmp_path, spatial_dims=2, data={"channels": ["grey"], "normalise": "all"}).data
    marked = np.zeros((16, 16), np.uint8)
    marked[4:8, 4:8] = 1
    label = tmp_path / name
    if name.startswith("palette"):
        save_palette(label, [0, 0, 0, 255, 255, 255], marked)
    else:
        grey = Image.fromarray(255 * marked)
        (grey.convert("1") if name.startswith("1") else grey).save(label)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)).save(tmp_path / "image.png")
    case = Case("A", "p", (str(tmp_path / "image.png"),), str(label), "train", label_threshold=127.0)
    assert check_headers(case, data)[1] == []
    assert load_sample(case, data).label[0].tolist() == marked.tolist()


def test_bmp_that_pillow_reads_wrongly_is_refused(tmp_path: Path) -> None:
    """Of eight bits and two colours, black and white: Pillow takes every byte for eight pixels."""
    path = save_palette(tmp_path / "x.bmp", [0, 0, 0, 255, 255, 255], PLACES % 2)
    with pytest.raises(DataError, match="is a BMP of 8 bits in black and white"):
        read_volume(str(path), spatial_dims=2)


def test_damaged_picture_with_a_palette_is_named(tmp_path: Path) -> None:
    path = save_palette(tmp_path / "x.bmp", COLOURED, np.random.default_rng(0).integers(0, 3, (99, 99), np.uint8))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"x.bmp: cannot be read"):
        read_header(str(path), spatial_dims=2)


# --- bits and colours


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_keeps_its_values(tmp_path: Path, bits: int) -> None:
    values = np.arange(8) % 2**bits
    packed = np.packbits(np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, -bits:].ravel())
    path = save_png(tmp_path / "x.png", [packed.tobytes()], width=8, bits=bits, kind=0)
    roles: tuple[Role, ...] = ("image", "label")
    for role in roles:
        assert both(path, role=role).tolist() == [[values.tolist()]]
    assert both(path, role="mask").tolist() == [[(values * (255 // (2**bits - 1))).tolist()]]  # as a viewer shows it


def test_grey_of_eight_and_of_sixteen_bits_is_read_as_stored(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 17, 255]], np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(np.array([[0, 17, 60000]], np.uint16)).save(tmp_path / "16.png")
    assert both(tmp_path / "8.png").tolist() == [[[0, 17, 255]]]
    assert both(tmp_path / "16.png").tolist() == [[[0, 17, 60000]]]
    assert both(tmp_path / "16.png").dtype == torch.float32


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
def test_sixteen_bits_in_several_channels_are_refused(tmp_path: Path, kind: int, channels: int) -> None:
    path = save_png(tmp_path / "x.png", [bytes(2 * channels)], width=1, bits=16, kind=kind)
    for read in (read_header, read_volume):
        with pytest.raises(DataError, match=r"x.png: .* of 16 bits, .*; convert it to 8 bits, or store one grey file"):
            read(str(path), spatial_dims=2)


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "x.jpg"), ("CMYK", "x.tif"), ("LAB", "x.tif")])
def test_channels_that_are_no_colours_are_refused(tmp_path: Path, mode: str, name: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / name)
    for read in (read_header, read_volume):
        with pytest.raises(DataError, match=rf"{name}: is a picture in {mode}; convert it to RGB or to grey"):
            read(str(tmp_path / name), spatial_dims=2)
