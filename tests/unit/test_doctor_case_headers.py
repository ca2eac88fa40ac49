"""What ``gcml doctor`` says of cases before it reads them: splits, headers, voxel sizes, orientation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import load_sample
from gcml_ray.data.reading import read_header
from gcml_ray.data.site_data import SiteData
from gcml_ray.doctor import case_headers
from gcml_ray.doctor.forecast import cache_bytes
from tests.tiny_federation import SHAPE, headers_of, make_config, make_federation, write_case, write_image


def test_few_training_cases_and_a_single_validation_case_warn() -> None:
    cases = [Case("A", f"c{i}", (), "", split) for i, split in enumerate(("train", "train", "validation", "test"))]
    check = case_headers.check_split("A", cases)
    assert check.verdict == "WARN"
    assert check.detail.startswith("2 train, 1 validation, 1 test: fewer than 3 training cases; a single validation")


def test_a_label_whose_pixels_are_damaged_ends_no_check_of_headers(tmp_path: Path) -> None:
    """Of a picture's palette the header is whole; its pixels are read later."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    label = Image.fromarray(np.zeros((8, 8), np.uint8), mode="P")
    label.putpalette([0, 0, 0, 255, 0, 0])
    label.save(tmp_path / "a_seg.bmp")
    whole = (tmp_path / "a_seg.bmp").read_bytes()
    (tmp_path / "a_seg.bmp").write_bytes(whole[:-40])
    case = Case("A", "a", (str(tmp_path / "a.png"),), str(tmp_path / "a_seg.bmp"), "train")
    data = {"spatial_dims": 2, "spacing_is_real": False, "patch_size": [8, 8]}
    check, _ = case_headers.check_all_headers([case], make_config(tmp_path, data=data).data)
    assert check.name == "headers"


def test_a_label_that_lies_elsewhere_warns(tmp_path: Path) -> None:
    write_case(tmp_path, "A0")
    write_image(tmp_path / "A0_seg.nii.gz", np.ones(SHAPE, dtype=np.uint8), spacing=1.5)
    config = make_config(tmp_path)
    check = case_headers.check_affines(headers_of(tmp_path, config, ["A0"]), config.data)
    assert check.verdict == "WARN"
    assert "case A0: A0_seg.nii.gz not where A0.nii.gz is" in check.detail


def test_orientations_that_differ_warn_only_if_nothing_turns_them(tmp_path: Path) -> None:
    write_case(tmp_path, "A0")
    write_case(tmp_path, "A1")
    for name in ("A1", "A1_seg"):
        image = nibabel.load(tmp_path / f"{name}.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([-1.0, 1, 1, 1])), tmp_path / f"{name}.nii.gz"
        )
    turned = make_config(tmp_path)
    left = make_config(tmp_path, data={"orientation": None})
    assert case_headers.check_affines(headers_of(tmp_path, turned, ["A0", "A1"]), turned.data).verdict == "PASS"
    check = case_headers.check_affines(headers_of(tmp_path, left, ["A0", "A1"]), left.data)
    assert check.verdict == "WARN"
    assert "LAS, RAS" in check.detail


def test_volumes_that_nothing_turns_warn_even_if_all_are_stored_alike(tmp_path: Path) -> None:
    write_case(tmp_path, "A0")
    config = make_config(tmp_path, data={"orientation": None})
    check = case_headers.check_affines(headers_of(tmp_path, config, ["A0"]), config.data)
    assert check.verdict == "WARN"
    assert "stored as RAS and not turned" in check.detail
    assert "set data.orientation: RAS" in check.remedy


@pytest.mark.parametrize(
    "section", [{}, {"target_spacing_mm": [1.0, 2.0, 1.5]}, {"resize": [12, 10, 9]}, {"orientation": None}]
)
def test_the_grid_by_the_header_is_the_grid_that_is_loaded(tmp_path: Path, section: dict[str, Any]) -> None:
    """Axes stored as (S, L, P) with 2, 1 and 3 mm."""
    affine = np.array([[0, -1.0, 0, 0], [0, 0, -3.0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    for name in ("A0", "A0_seg"):
        array = np.ones((6, 9, 7), dtype=np.uint8 if "seg" in name else np.float32)
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    data = make_config(tmp_path, data=section).data
    case = Case("A", "A0", (str(tmp_path / "A0.nii.gz"),), str(tmp_path / "A0_seg.nii.gz"), "train")
    grid = case_headers.training_grid(read_header(case.images[0], spatial_dims=3), data)
    assert grid == tuple(load_sample(case, data).image.shape[1:])


def test_the_grid_of_a_coronal_slice_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    """Pixels of 2 x 3 mm in the plane of x and z, to 1 mm."""
    affine = np.array([[2.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 3.0, 0, 0], [0, 0, 0, 1]])
    for name in ("A0", "A0_seg"):
        array = np.ones((6, 5, 1), dtype=np.uint8 if "seg" in name else np.float32)
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    section = {"spatial_dims": 2, "target_spacing_mm": [1.0, 1.0], "patch_size": [4, 4]}
    data = make_config(tmp_path, data=section).data
    case = Case("A", "A0", (str(tmp_path / "A0.nii.gz"),), str(tmp_path / "A0_seg.nii.gz"), "train")
    grid = case_headers.training_grid(read_header(case.images[0], spatial_dims=2), data)
    assert grid == tuple(load_sample(case, data).image.shape[1:])


def test_cached_bytes_by_the_headers_are_the_bytes_that_are_loaded(tmp_path: Path) -> None:
    config = make_federation(tmp_path)
    names = ["A0", "A1"]
    found = headers_of(tmp_path, config, names)
    data = SiteData("A", [header.case for header in found], config.data, seed=0)
    data.load()
    assert cache_bytes(case_headers.site_cases(found)[0], config.data) == data.num_bytes


# --- voxel sizes ---------------------------------------------------------------------------------


def test_voxel_sizes_that_differ_within_a_site_warn(tmp_path: Path) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "A1", spacing=2.5)
    config = make_config(tmp_path)
    check = case_headers.check_voxel_sizes(headers_of(tmp_path, config, ["A0", "A1"]), config.data)
    assert check.verdict == "WARN"
    assert "site A: 1 x 1 x 1 mm to 2.5 x 2.5 x 2.5 mm" in check.detail
    assert "target_spacing_mm" in check.remedy


def test_voxel_sizes_that_differ_between_sites_warn(tmp_path: Path) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "B0", spacing=2.0)
    config = make_config(tmp_path)
    assert case_headers.check_voxel_sizes(headers_of(tmp_path, config, ["A0", "B0"]), config.data).verdict == "WARN"


@pytest.mark.parametrize("section", [{"target_spacing_mm": [1.0, 1.0, 1.0]}, {"spacing_is_real": False}])
def test_voxel_sizes_that_do_not_matter_pass(tmp_path: Path, section: dict[str, Any]) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "A1", spacing=2.0)
    config = make_config(tmp_path, data=section)
    assert case_headers.check_voxel_sizes(headers_of(tmp_path, config, ["A0", "A1"]), config.data).verdict == "PASS"


def test_rounding_in_a_header_is_no_difference(tmp_path: Path) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "B0", spacing=1.001)
    config = make_config(tmp_path)
    assert case_headers.check_voxel_sizes(headers_of(tmp_path, config, ["A0", "B0"]), config.data).verdict == "PASS"


def test_voxel_sizes_are_compared_after_orientation(tmp_path: Path) -> None:
    """1 x 1 x 3 mm, once with the long side along the first stored axis."""
    write_case(tmp_path, "A0")
    write_case(tmp_path, "A1")
    affines = {
        "A0": np.diag([1.0, 1, 3, 1]),
        "A1": np.array([[0, 1.0, 0, 0], [0, 0, 1, 0], [3, 0, 0, 0], [0, 0, 0, 1]]),
    }
    for name, stored in affines.items():
        for file in (f"{name}.nii.gz", f"{name}_seg.nii.gz"):
            voxels = np.asarray(nibabel.load(tmp_path / file).dataobj)
            nibabel.save(nibabel.Nifti1Image(voxels, stored), tmp_path / file)
    turned, left = make_config(tmp_path), make_config(tmp_path, data={"orientation": None})
    check = case_headers.check_voxel_sizes(headers_of(tmp_path, turned, ["A0", "A1"]), turned.data)
    assert (check.verdict, check.detail) == ("PASS", "1 x 1 x 3 mm in every case")
    assert case_headers.check_voxel_sizes(headers_of(tmp_path, left, ["A0", "A1"]), left.data).verdict == "WARN"
