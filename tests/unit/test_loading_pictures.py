"""Pictures and slices: how they are read and resized, what makes a mask, how large a pixel is, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import load_sample, read_target
from gcml_ray.data.reading import read_header
from gcml_ray.errors import DataError
from tests.loading_makers import Array, block_label, case_3d, config, config_2d, random_image


def save_picture(path: Path, array: Array) -> str:
    Image.fromarray(array).save(path)
    return str(path)


def picture_case(tmp_path: Path, image: Array, mask: Array, *, threshold: float | None = None) -> Case:
    images = (save_picture(tmp_path / "img.png", image),)
    return Case("A", "eye", images, save_picture(tmp_path / "mask.png", mask), "train", threshold)


def random_picture(*shape: int) -> Array:
    return np.random.default_rng(1).integers(1, 255, shape).astype(np.uint8)


def test_picture_rows_are_the_first_axis(tmp_path: Path) -> None:
    image, mask = random_picture(6, 9, 3), np.zeros((6, 9), np.uint8)
    mask[1, 7] = 1
    sample = load_sample(picture_case(tmp_path, image, mask), config_2d())
    red = image[..., 0].astype(float)
    np.testing.assert_allclose(sample.image[0], (red - red.mean()) / red.std(), atol=1e-4)
    assert sample.label[0, 1, 7] == 1
    assert sample.label.sum() == 1


def test_threshold_makes_a_mask_of_a_grey_picture(tmp_path: Path) -> None:
    mask = np.array([[0, 127], [128, 255]], np.uint8)
    sample = load_sample(picture_case(tmp_path, random_picture(2, 2, 3), mask, threshold=127), config_2d())
    assert sample.label.tolist() == [[[0, 0], [1, 1]]]


def test_threshold_takes_any_colour_but_not_the_opacity(tmp_path: Path) -> None:
    mask = np.zeros((1, 3, 4), np.uint8)
    mask[..., 3] = 255
    mask[0, 1, 2] = 200
    sample = load_sample(picture_case(tmp_path, random_picture(1, 3, 3), mask, threshold=127), config_2d())
    assert sample.label.tolist() == [[[0, 1, 0]]]


def test_grey_mask_stored_as_three_equal_channels_is_read(tmp_path: Path) -> None:
    mask = np.zeros((4, 5, 3), np.uint8)
    mask[2, 3] = 1
    sample = load_sample(picture_case(tmp_path, random_picture(4, 5, 3), mask), config_2d())
    assert sample.label.nonzero().tolist() == [[0, 2, 3]]


def test_folder_and_file_of_another_user_are_said_to_be_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(DataError, match=r"folder.nii.gz: not a file; check the path"):
        read_header(str(tmp_path / "folder.nii.gz"), spatial_dims=3)
    closed = tmp_path / "closed.nii.gz"
    closed.write_bytes(b"x")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(DataError, match=r"closed.nii.gz: may not be read by this user; change its permissions"):
        read_header(str(closed), spatial_dims=3)


def test_resize_keeps_image_and_label_aligned(tmp_path: Path) -> None:
    """Each new pixel covers 4 x 4 old ones; the mask is where the image is bright, before and after."""
    coarse = np.random.default_rng(2).integers(0, 2, (8, 6)).astype(np.uint8)
    fine = np.kron(coarse, np.ones((4, 4), np.uint8))
    case = picture_case(tmp_path, np.repeat(fine[..., None] * 200, 3, axis=2), fine)
    sample = load_sample(case, config_2d(resize=(8, 6)))
    np.testing.assert_array_equal(sample.label[0], coarse)
    np.testing.assert_array_equal(sample.image[1] > 0, coarse == 1)


@pytest.mark.parametrize("size", [(60, 40), (59, 33), (70, 50)])
def test_small_change_of_size_leaves_every_pixel_in_its_place(tmp_path: Path, size: tuple[int, int]) -> None:
    """A ramp, normalised: 0 in the middle and, but for the rim, still a straight line."""
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[:, None], 45, axis=1)
    case = picture_case(tmp_path, np.repeat(ramp[..., None], 3, axis=2), np.zeros((64, 45), np.uint8))
    found = load_sample(case, config_2d(resize=size, normalise="all")).image[0, :, 5].numpy()
    places = (np.arange(size[0]) + 0.5) * 64 / size[0] - 32
    slope = found[-3] / places[-3]
    np.testing.assert_allclose(found[2:-2] / slope, places[2:-2], atol=0.02)


def test_resized_label_takes_the_centre_of_each_new_pixel(tmp_path: Path) -> None:
    """Factor 3: only the middle one of 3 x 3 pixels is marked; a corner would miss it, a majority drop it."""
    mask = np.zeros((6, 9), np.uint8)
    mask[4, 7] = 1
    sample = load_sample(picture_case(tmp_path, random_picture(6, 9, 3), mask), config_2d(resize=(2, 3)))
    assert sample.label.tolist() == [[[0, 0, 0], [0, 0, 1]]]


def test_resize_of_a_volume_scales_its_real_spacing(tmp_path: Path) -> None:
    """6 x 5 x 4 voxels of 1 mm on a grid of 3 x 5 x 8: 2, 1 and 0.5 mm."""
    case = case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 4))
    sample = load_sample(case, config(resize=(3, 5, 8)))
    assert sample.image.shape == sample.label.shape == (1, 3, 5, 8)
    assert sample.spacing == pytest.approx((2.0, 1.0, 0.5))


def test_2d_nifti_with_real_spacing_is_resampled(tmp_path: Path) -> None:
    case = case_3d(tmp_path, random_image(8, 6), block_label(8, 6), affine=np.diag([2.0, 1.0, 1.0, 1.0]))
    sample = load_sample(case, config(spatial_dims=2, patch_size=(4, 4), target_spacing_mm=(2.0, 2.0)))
    assert sample.spacing == (2.0, 2.0)
    assert sample.image.shape == sample.label.shape
    assert sample.image.shape[1] == 8 > 2 * sample.image.shape[2] - 2 > 2


SLICES = {
    "coronal": np.array([[2.0, 0, 0, 7], [0, 0, 5, 8], [0, 3.0, 0, 9], [0, 0, 0, 1]]),
    "sagittal": np.array([[0, 0, 5.0, 7], [2.0, 0, 0, 8], [0, 3.0, 0, 9], [0, 0, 0, 1]]),
    "axial, turned": np.array([[0, 3.0, 0, 7], [-2.0, 0, 0, 8], [0, 0, 5, 9], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("affine", SLICES.values(), ids=SLICES)
def test_2d_spacing_is_that_of_the_slice_wherever_it_lies(tmp_path: Path, affine: Array) -> None:
    """Pixels of 2 x 3 mm, 6 x 5 of them."""
    case = case_3d(tmp_path, random_image(6, 5, 1), block_label(6, 5, 1), affine=affine)
    data = config(spatial_dims=2, patch_size=(4, 4))
    assert load_sample(case, data).spacing == pytest.approx((2.0, 3.0))
    assert read_target(case, data)[1] == pytest.approx((2.0, 3.0))
    fine = load_sample(case, config(spatial_dims=2, patch_size=(4, 4), target_spacing_mm=(1.0, 1.0)))
    assert fine.spacing == (1.0, 1.0)
    assert fine.image.shape == fine.label.shape == (1, 11, 13)


def test_several_pages_are_refused_and_an_exif_rotation_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = Image.fromarray(random_picture(4, 5, 3))
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    exif = Image.Exif()
    exif[274] = 6
    page.save(tmp_path / "turned.jpg", exif=exif)
    case = Case("A", "p", (str(tmp_path / "turned.jpg"),), str(tmp_path / "pages.tif"), None)
    with pytest.raises(DataError, match=r"pages.tif: has 2 pages"):
        load_sample(case, config_2d())
    assert "turned.jpg, and perhaps others beside it: an EXIF tag asks for a rotation" in caplog.text


def test_picture_with_real_spacing_is_refused(tmp_path: Path) -> None:
    case = picture_case(tmp_path, random_picture(4, 4, 3), np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"stores no voxel size; set data.spacing_is_real: false"):
        load_sample(case, config_2d(spacing_is_real=True))


def test_alpha_channel_is_suspected(tmp_path: Path) -> None:
    case = picture_case(tmp_path, random_picture(4, 4, 4), np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"4 channel\(s\) in 1 file\(s\), data.channels lists 3 .*alpha"):
        load_sample(case, config_2d())
