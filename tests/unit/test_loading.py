import gzip
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gcml_ray.data import loading
from gcml_ray.data.case_checks import check_headers
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import load_sample, prepare_image, read_image
from gcml_ray.data.problems import CaseError
from gcml_ray.errors import DataError
from tests.loading_makers import block_label, case_3d, config, config_2d, random_image, save_nifti

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


@pytest.mark.parametrize("piece", [7, 2**24])
def test_crop_indices_are_flat_positions_of_label_and_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(loading, "PIECE", piece)
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


@pytest.mark.parametrize(("factor", "shown"), [(0.5, "0.5"), (0.1, "0.1, 0.2"), (1.0020001, "1.0020001, 2.0040002")])
def test_label_between_two_values_is_refused_with_all_its_digits(tmp_path: Path, factor: float, shown: str) -> None:
    label = block_label(6, 5, 4) * np.float32(factor)
    with pytest.raises(DataError, match=rf"holds {re.escape(shown)}; only whole numbers from 0 to 65535 are classes"):
        load_sample(case_3d(tmp_path, random_image(6, 5, 4), label), config())


@pytest.mark.parametrize("factor", [1.0000001, 0.9999])
def test_what_rounding_made_of_a_labels_whole_numbers_is_whole_again(tmp_path: Path, factor: float) -> None:
    label = block_label(6, 5, 4)
    sample = load_sample(case_3d(tmp_path, random_image(6, 5, 4), label * np.float32(factor)), config())
    np.testing.assert_array_equal(sample.label[0], label)


def test_a_mask_with_a_threshold_is_not_rounded(tmp_path: Path) -> None:
    mask = np.zeros((6, 5, 4), np.float32)
    mask[:3] = 0.0008
    case = replace(case_3d(tmp_path, random_image(6, 5, 4), mask), label_threshold=0.0005)
    sample = load_sample(case, config(labels={"background": 0, "a": 1}))
    np.testing.assert_array_equal(sample.label[0], mask > 0)


@pytest.mark.filterwarnings("error")
def test_what_float32_cannot_hold_is_refused_without_a_warning_of_numpy(tmp_path: Path) -> None:
    image, label = (array.astype(np.float64) for array in (random_image(6, 5, 4), block_label(6, 5, 4) + 0.1))
    image[0, 0, 0] = label[0, 0, 0] = 1e39
    with pytest.raises(DataError, match=r"img\.nii\.gz has 1 NaN or infinite value.*seg\.nii\.gz has NaN or infinite"):
        load_sample(case_3d(tmp_path, image, label), config())


def test_shape_mismatch_gives_both_shapes(tmp_path: Path) -> None:
    case = case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 3))
    with pytest.raises(DataError, match=r"label .*seg.nii.gz has the shape \(6, 5, 3\).*img.nii.gz has \(6, 5, 4\)"):
        load_sample(case, config())
    assert "has the shape (6, 5, 3)" in check_headers(case, config())[1][0]


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
    (problem,) = check_headers(case, config())[1]
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
    assert check_headers(case_3d(tmp_path, random_image(6, 5, 4), block_label(6, 5, 4)), config())[1] == []


def test_header_check_reads_no_voxels(tmp_path: Path) -> None:
    """A file cut in its voxels passes; only load_sample can see it."""
    case = case_3d(tmp_path, random_image(32, 32, 32), block_label(32, 32, 32))
    whole = Path(case.images[0]).read_bytes()
    Path(case.images[0]).write_bytes(whole[: len(whole) // 2])
    assert check_headers(case, config())[1] == []
