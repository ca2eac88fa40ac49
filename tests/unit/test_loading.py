import gzip
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from gcml_ray.config import DataConfig
from gcml_ray.data.case_checks import check_headers
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import load_sample, prepare_image, read_image, read_target
from gcml_ray.data.problems import CaseError
from gcml_ray.data.reading import read_header
from gcml_ray.errors import DataError

Array = NDArray[Any]


def save_nifti(path: Path, array: Array, affine: Array | None = None) -> str:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def save_picture(path: Path, array: Array) -> str:
    Image.fromarray(array).save(path)
    return str(path)


def config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "datalist": "x.json",
        "channels": ("mr",),
        "labels": {"background": 0, "a": 1, "b": 2},
        "spacing_is_real": True,
        "patch_size": (4, 4, 4),
    }
    return DataConfig(**(values | changes))


def config_2d(**changes: Any) -> DataConfig:
    values = {
        "channels": ("r", "g", "b"),
        "labels": {"background": 0, "vessel": 1},
        "spacing_is_real": False,
        "spatial_dims": 2,
        "patch_size": (4, 4),
        "normalise": "all",
    }
    return config(**(values | changes))


def case_3d(
    tmp_path: Path, image: Array, label: Array, *, affine: Array | None = None, label_affine: Array | None = None
) -> Case:
    images = (save_nifti(tmp_path / "img.nii.gz", image, affine),)
    return Case(
        "A",
        "p1",
        images,
        save_nifti(tmp_path / "seg.nii.gz", label, affine if label_affine is None else label_affine),
        "train",
    )


def random_image(*shape: int) -> Array:
    return np.random.default_rng(0).normal(10, 2, shape).astype(np.float32)


def block_label(*shape: int) -> Array:
    label = np.zeros(shape, np.uint8)
    label[1:3, 1:3] = 1
    label[3, 3] = 2
    return label


# --- what comes out


def test_image_is_normalised_and_label_keeps_its_place(tmp_path: Path) -> None:
    image, label = random_image(6, 5, 4), block_label(6, 5, 4)
    sample = load_sample(case_3d(tmp_path, image, label), config())
    np.testing.assert_allclose(sample.image[0], (image - image.mean()) / image.std(), atol=1e-4)
    np.testing.assert_array_equal(sample.label[0], label)
    assert sample.image.dtype == torch.float32
    assert type(sample.image) is torch.Tensor
    assert type(sample.label) is torch.Tensor
    assert sample.spacing == (1.0, 1.0, 1.0)


def test_nonzero_normalisation_leaves_zeros_out(tmp_path: Path) -> None:
    image = random_image(6, 5, 4)
    image[:3] = 0
    sample = load_sample(case_3d(tmp_path, image, block_label(6, 5, 4)), config())
    inside = image[3:]
    np.testing.assert_allclose(sample.image[0, 3:], (inside - inside.mean()) / inside.std(), atol=1e-4)
    assert (sample.image[0, :3] == 0).all()


def test_crop_indices_are_flat_positions_of_label_and_rest(tmp_path: Path) -> None:
    label = block_label(6, 5, 4)
    sample = load_sample(case_3d(tmp_path, random_image(6, 5, 4), label), config())
    np.testing.assert_array_equal(sample.foreground, np.flatnonzero(label))
    np.testing.assert_array_equal(sample.background, np.flatnonzero(label == 0))


def test_label_values_become_their_place_in_the_config(tmp_path: Path) -> None:
    label = block_label(6, 5, 4).astype(np.float32) * 2.0
    sample = load_sample(
        case_3d(tmp_path, random_image(6, 5, 4), label), config(labels={"background": 0, "b": 4, "a": 2})
    )
    expected = np.array([0, 0, 2, 0, 1])[label.astype(int)]
    np.testing.assert_array_equal(sample.label[0], expected)


def test_regions_are_nested_channels_of_zeros_and_ones(tmp_path: Path) -> None:
    label = block_label(6, 5, 4)
    data = config(regions={"whole": ("a", "b"), "core": ("b",)})
    sample = load_sample(case_3d(tmp_path, random_image(6, 5, 4), label), data)
    np.testing.assert_array_equal(sample.label, np.stack([label > 0, label == 2]).astype(np.float32))
    assert sample.label.dtype == torch.float32
    np.testing.assert_array_equal(sample.foreground, np.flatnonzero(label))


def test_channel_files_and_one_file_with_channels_agree(tmp_path: Path) -> None:
    image, label = random_image(6, 5, 4, 2), block_label(6, 5, 4)
    whole = case_3d(tmp_path, image, label)
    parts = tuple(save_nifti(tmp_path / f"c{i}.nii", image[..., i]) for i in range(2))
    data = config(channels=("t1", "flair"))
    one, several = load_sample(whole, data), load_sample(Case("A", "p1", parts, whole.label, "train"), data)
    assert one.image.shape == (2, 6, 5, 4)
    torch.testing.assert_close(one.image, several.image)


def test_orientation_turns_image_and_label_alike(tmp_path: Path) -> None:
    """Axes stored as L, P, S are turned to R, A, S: both first axes are reversed."""
    image, label = random_image(6, 5, 4), block_label(6, 5, 4)
    lps = np.diag([-1.0, -1.0, 2.0, 1.0])
    sample = load_sample(case_3d(tmp_path, image, label, affine=lps), config())
    np.testing.assert_array_equal(sample.label[0], label[::-1, ::-1])
    np.testing.assert_allclose(sample.image[0], (image[::-1, ::-1] - image.mean()) / image.std(), atol=1e-4)
    assert sample.spacing == (1.0, 1.0, 2.0)


def test_target_spacing_resamples_and_is_reported(tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    case = case_3d(tmp_path, random_image(8, 8, 8), block_label(8, 8, 8), affine=affine)
    sample = load_sample(case, config(target_spacing_mm=(1.0, 2.0, 4.0)))
    assert sample.image.shape == sample.label.shape
    assert sample.image.shape[2] == 8
    assert sample.image.shape[1] > 8 > sample.image.shape[3]
    assert sample.spacing == (1.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("sizes_mm", "target_mm"),
    [((1.0, 1.0, 3.0), (1.0, 1.0, 1.0)), ((1.0, 1.0, 2.0), (1.0, 1.0, 1.0)), ((0.9, 1.2, 3.0), (1.0, 1.0, 1.0))],
)
def test_what_was_0_stays_0_where_voxels_are_interpolated(
    sizes_mm: tuple[float, ...], target_mm: tuple[float, ...]
) -> None:
    """A block of 1000 in zeros: linear interpolation reaches less than one old voxel beyond it, and no further."""
    image = torch.zeros(1, 20, 20, 12)
    image[:, 6:14, 6:14, 4:8] = 1000.0
    affine = np.diag([*sizes_mm, 1.0]).astype(np.float32).astype(np.float64)  # as NIfTI stores it
    seen = prepare_image(image, affine, config(target_spacing_mm=target_mm, normalise="nonzero")).image[0]
    inside = torch.ones_like(seen, dtype=torch.bool)
    for axis, (first, last) in enumerate([(6, 13), (6, 13), (4, 7)]):
        places = torch.arange(seen.shape[axis]) * target_mm[axis] / sizes_mm[axis]
        reached = (places > first - 1 + 1e-4) & (places < last + 1 - 1e-4)
        inside &= reached.reshape([-1 if each == axis else 1 for each in range(3)])
    assert (seen[~inside] == 0).all()
    assert seen[inside].mean().abs() < 1e-4
    assert seen[inside].std(correction=0) == pytest.approx(1.0, abs=1e-4)


def test_unreal_spacing_is_ones(tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 1.0, 1.0])
    case = case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 4), affine=affine)
    assert load_sample(case, config(spacing_is_real=False)).spacing == (1.0, 1.0, 1.0)


def test_validation_case_has_no_crop_indices(tmp_path: Path) -> None:
    case = case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 4))
    sample = load_sample(Case("A", "p1", case.images, case.label, "validation"), config())
    assert sample.foreground.numel() == sample.background.numel() == 0


# --- pictures


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
    assert "turned.jpg: its EXIF tag asks for a rotation" in caplog.text


def test_picture_with_real_spacing_is_refused(tmp_path: Path) -> None:
    case = picture_case(tmp_path, random_picture(4, 4, 3), np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"stores no voxel size; set data.spacing_is_real: false"):
        load_sample(case, config_2d(spacing_is_real=True))


def test_alpha_channel_is_suspected(tmp_path: Path) -> None:
    case = picture_case(tmp_path, random_picture(4, 4, 4), np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match=r"4 channel\(s\) in 1 file\(s\), data.channels lists 3 .*alpha"):
        load_sample(case, config_2d())


# --- what is refused


def test_value_whose_square_overflows_is_refused(tmp_path: Path) -> None:
    image = random_image(6, 5, 4)
    image[0, 0, 0] = 1e25
    with pytest.raises(DataError, match=r"img.nii.gz holds 1e\+25: no intensity"):
        load_sample(case_3d(tmp_path, image, block_label(6, 5, 4)), config())


def test_several_problems_of_a_case_are_in_one_error(tmp_path: Path) -> None:
    image, label = random_image(6, 5, 4), block_label(6, 5, 4)
    image[0, 0, 0], label[0, 0, 0] = np.nan, 7
    with pytest.raises(DataError) as caught:
        load_sample(case_3d(tmp_path, image, label), config())
    message = str(caught.value)
    assert message.startswith("site A, case p1: image ")
    assert "img.nii.gz has 1 NaN or infinite" in message
    assert "seg.nii.gz holds the values 7, data.labels allows {'background': 0, 'a': 1, 'b': 2}" in message


@pytest.mark.parametrize(("factor", "shown"), [(0.5, "0.5"), (0.1, "0.1, 0.2"), (1.0000001, "1.0000001, 2.0000002")])
def test_label_between_two_values_is_refused_with_all_its_digits(tmp_path: Path, factor: float, shown: str) -> None:
    label = block_label(6, 5, 4) * np.float32(factor)
    with pytest.raises(DataError, match=rf"holds {re.escape(shown)}; only whole numbers from 0 to 65535 are classes"):
        load_sample(case_3d(tmp_path, random_image(6, 5, 4), label), config())


def test_shape_mismatch_gives_both_shapes(tmp_path: Path) -> None:
    case = case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 3))
    with pytest.raises(DataError, match=r"label .*seg.nii.gz has the shape \(6, 5, 3\).*img.nii.gz has \(6, 5, 4\)"):
        load_sample(case, config())
    assert "has the shape (6, 5, 3)" in check_headers(case, config())[0]


def test_missing_and_corrupt_files_are_both_named(tmp_path: Path) -> None:
    whole = Path(save_nifti(tmp_path / "x.nii.gz", random_image(16, 16, 16))).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    case = Case("A", "p1", (str(tmp_path / "cut.nii.gz"),), str(tmp_path / "none.nii.gz"), None)
    with pytest.raises(DataError, match=r"(?s)cut.nii.gz: cannot be read.*none.nii.gz: no such file"):
        load_sample(case, config())


@pytest.mark.parametrize("name", ["x.nii.gz", "x.nii", "x.png", "x.dcm"])
def test_file_that_is_no_image_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"hello") if name.endswith("gz") else b"hello" * 100)
    case = Case("A", "p1", (str(tmp_path / name),), save_nifti(tmp_path / "s.nii", block_label(6, 5, 4)), None)
    with pytest.raises(DataError, match=f"{name}: not an image"):
        load_sample(case, config())


def test_affine_of_axes_in_one_plane_is_refused(tmp_path: Path) -> None:
    flat = np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    case = case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 4), affine=flat)
    expected = r"img.nii.gz has an unusable affine \(its axes span 2 of 3 directions.*; write its header again"
    with pytest.raises(DataError, match=rf"(?s)site A, case p1.*{expected}"):
        load_sample(case, config())
    with pytest.raises(DataError, match=expected):
        read_image(case, config())
    (problem,) = check_headers(case, config())
    assert "unusable affine" in problem


def test_wrong_number_of_axes_is_named(tmp_path: Path) -> None:
    flat = Case("A", "p", (save_nifti(tmp_path / "i.nii", random_image(6, 5)),) * 1, str(tmp_path / "i.nii"), None)
    with pytest.raises(DataError, match=r"shape \(6, 5\), data.spatial_dims is 3"):
        load_sample(flat, config())


def test_volumes_in_a_2d_config_are_named_as_such(tmp_path: Path) -> None:
    label = block_label(6, 5, 4)
    label[..., 0] = 0
    with pytest.raises(CaseError) as caught:
        load_sample(case_3d(tmp_path, random_image(6, 5, 4), label), config_2d())
    words = r"nii\.gz is a volume of the shape \(6, 5, 4\), data\.spatial_dims is 2; set it to 3"
    assert [bool(re.search(words, problem)) for problem in caught.value.problems] == [True, True]


def test_threshold_with_three_classes_is_refused(tmp_path: Path) -> None:
    case = case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 4))
    with pytest.raises(DataError, match=r"label_threshold makes a mask of two classes, data.labels lists 3"):
        load_sample(Case("A", "p", case.images, case.label, None, 0.5), config())


def test_constant_channel_and_other_affine_only_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = np.diag([1.0, 1.0, 3.0, 1.0])
    case = case_3d(tmp_path, np.zeros((6, 5, 4), np.float32), block_label(6, 5, 4), label_affine=other)
    sample = load_sample(case, config())
    assert "channel mr is 0 everywhere" in caplog.text
    assert "has another affine" in caplog.text
    assert sample.spacing == (1.0, 1.0, 1.0)
    assert torch.isfinite(sample.image).all()


def test_headers_of_a_good_case_show_no_problem(tmp_path: Path) -> None:
    assert check_headers(case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 4)), config()) == []


def test_header_check_reads_no_voxels(tmp_path: Path) -> None:
    """A file cut in its voxels passes; only load_sample can see it."""
    case = case_3d(tmp_path, random_image(32, 32, 32), block_label(32, 32, 32))
    whole = Path(case.images[0]).read_bytes()
    Path(case.images[0]).write_bytes(whole[: len(whole) // 2])
    assert check_headers(case, config()) == []
