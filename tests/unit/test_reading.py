"""Files that are damaged or of another kind: each is named with what is wrong, none is read in part."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from gcml_ray.data.adapters.hecktor import prepare_hecktor
from gcml_ray.data.reading import read_header, read_volume
from gcml_ray.errors import DataError
from tests.public_layouts import make_hecktor

VOXELS = np.random.default_rng(0).integers(0, 2, (32, 32, 20)).astype(np.uint8)


def save_packed(path: Path, kind: Any = nibabel.Nifti1Image) -> Path:
    nibabel.save(kind(VOXELS, np.eye(4)), path)
    return path


def flip(path: Path, place: int) -> Path:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    return path


# --- compressed files


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.nii.gz", nibabel.Nifti1Image),
        ("X.NII.GZ", nibabel.Nifti1Image),
        ("x.nii.gz", nibabel.Nifti2Image),
        ("x.img.gz", nibabel.Nifti1Pair),
        ("x.mgz", nibabel.MGHImage),
    ],
)
def test_flipped_bit_of_a_packed_file_is_found(tmp_path: Path, name: str, kind: Any) -> None:
    path = save_packed(tmp_path / name, kind)
    np.testing.assert_array_equal(read_volume(str(path), spatial_dims=3).array[0], VOXELS)
    flip(path, -8)  # of the checksum: the voxels themselves unpack without an error
    with pytest.raises(DataError, match=rf"{name}: .*it is damaged \(BadGzipFile: CRC check failed"):
        read_volume(str(path), spatial_dims=3)


def test_no_flipped_bit_changes_a_voxel_in_silence(tmp_path: Path) -> None:
    whole = save_packed(tmp_path / "x.nii.gz")
    found = 0
    for place in range(300, whole.stat().st_size, 37):
        bad = flip(Path(shutil.copy(whole, tmp_path / "bad.nii.gz")), place)
        try:
            array = read_volume(str(bad), spatial_dims=3).array
        except DataError:
            found += 1
        else:
            np.testing.assert_array_equal(array[0], VOXELS)
    assert found > 50


def test_header_is_read_without_the_voxels_behind_it(tmp_path: Path) -> None:
    path = flip(save_packed(tmp_path / "x.nii.gz"), -8)
    assert read_header(str(path), spatial_dims=3).shape == (1, 32, 32, 20)


def test_hecktor_finds_a_damaged_image_that_it_resamples(tmp_path: Path) -> None:
    make_hecktor(tmp_path / "in", {"CHUM": 1}, shape=(16, 16, 8))
    flip(tmp_path / "in" / "CHUM001_pt.nii.gz", -8)
    with pytest.raises(DataError, match=r"pt cannot be resampled .*CHUM001_pt.nii.gz: cannot be read, it is damaged"):
        prepare_hecktor(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- other kinds of files


def test_picture_of_too_many_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "slide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    for read in (read_header, read_volume):
        with pytest.raises(DataError, match=r"slide.png: has more than 500 pixels.*; cut it into smaller pictures"):
            read(str(tmp_path / "slide.png"), spatial_dims=2)


def test_surface_is_named(tmp_path: Path) -> None:
    surface = nibabel.gifti.GiftiImage(darrays=[nibabel.gifti.GiftiDataArray(np.zeros((3, 3), np.float32))])
    nibabel.save(surface, tmp_path / "x.gii")
    for read in (read_header, read_volume):
        with pytest.raises(DataError, match=r"x.gii: is a GiftiImage, which has no voxels on a grid; NIfTI"):
            read(str(tmp_path / "x.gii"), spatial_dims=3)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of tags that it skips
@pytest.mark.parametrize("name", ["x.nii", "x.png", "x.tif", "x.bmp"])
def test_damaged_header_is_a_data_error_or_still_an_image(tmp_path: Path, name: str) -> None:
    """No exception of a library comes through, whichever byte is wrong."""
    path, random = tmp_path / name, np.random.default_rng(0)
    dims = 3 if name == "x.nii" else 2
    if dims == 2:
        Image.fromarray(random.integers(0, 255, (9, 8, 3)).astype(np.uint8)).save(path)
    else:
        nibabel.save(nibabel.Nifti1Image(VOXELS[:4], np.eye(4)), path)
    whole, refused = path.read_bytes(), 0
    for place in range(min(350, len(whole))):
        path.write_bytes(whole[:place] + bytes([random.integers(256)]) + whole[place + 1 :])
        try:
            read_volume(str(path), spatial_dims=dims)
        except DataError:
            refused += 1
    assert refused > 10


def test_header_that_asks_for_more_than_there_is_is_named(tmp_path: Path) -> None:
    """32767 voxels along each axis: three damaged numbers, 35 TB."""
    path = save_packed(tmp_path / "x.nii.gz")
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = b"\xff\x7f" * 3
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(DataError, match=r"x.nii.gz: cannot be read, its header asks for more memory than there is"):
        read_volume(str(path), spatial_dims=3)


@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_complex_numbers_are_refused(tmp_path: Path, kind: type[np.complexfloating[Any, Any]]) -> None:
    nibabel.save(nibabel.Nifti1Image(VOXELS.astype(kind), np.eye(4)), tmp_path / "x.nii.gz")
    for read in (read_header, read_volume):
        with pytest.raises(DataError, match=rf"x.nii.gz: holds complex numbers \({kind.__name__}\).* their magnitude"):
            read(str(tmp_path / "x.nii.gz"), spatial_dims=3)


def save_in_unit(path: Path, unit: int, kind: Any) -> str:
    image = kind(VOXELS, np.eye(4))
    image.header["xyzt_units"] = unit + 8  # and seconds
    nibabel.save(image, path)
    return str(path)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("unit", "name", "factor"), [(1, "metres", "1000"), (3, "microns", "0.001")])
def test_lengths_in_another_unit_are_refused(tmp_path: Path, kind: Any, unit: int, name: str, factor: str) -> None:
    path = save_in_unit(tmp_path / "x.nii", unit, kind)
    for read in (read_header, read_volume):
        with pytest.raises(DataError, match=rf"x.nii: .* lengths in {name} .*; multiply its affine by {factor} and"):
            read(path, spatial_dims=3)


@pytest.mark.parametrize("unit", [0, 2, 5], ids=["none", "mm", "undefined"])
def test_lengths_of_no_unit_are_mm(tmp_path: Path, unit: int) -> None:
    path = save_in_unit(tmp_path / "x.nii", unit, nibabel.Nifti1Image)
    assert read_header(path, spatial_dims=3).affine is not None
    assert read_volume(path, spatial_dims=3).array.shape == (1, 32, 32, 20)
