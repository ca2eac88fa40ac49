"""What ``gcml doctor`` says of voxel sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from gcml_ray.doctor import case_headers
from tests.tiny_federation import make_config, write_case
from tests.unit.test_doctor_config import headers


def test_voxel_sizes_that_differ_within_a_site_warn(tmp_path: Path) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "A1", spacing=2.5)
    config = make_config(tmp_path)
    check = case_headers.check_voxel_sizes(headers(tmp_path, config, ["A0", "A1"]), config.data)
    assert check.verdict == "WARN"
    assert "site A: 1 x 1 x 1 mm to 2.5 x 2.5 x 2.5 mm" in check.detail
    assert "target_spacing_mm" in check.remedy


def test_voxel_sizes_that_differ_between_sites_warn(tmp_path: Path) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "B0", spacing=2.0)
    config = make_config(tmp_path)
    assert case_headers.check_voxel_sizes(headers(tmp_path, config, ["A0", "B0"]), config.data).verdict == "WARN"


@pytest.mark.parametrize("section", [{"target_spacing_mm": [1.0, 1.0, 1.0]}, {"spacing_is_real": False}])
def test_voxel_sizes_that_do_not_matter_pass(tmp_path: Path, section: dict[str, Any]) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "A1", spacing=2.0)
    config = make_config(tmp_path, data=section)
    assert case_headers.check_voxel_sizes(headers(tmp_path, config, ["A0", "A1"]), config.data).verdict == "PASS"


def test_rounding_in_a_header_is_no_difference(tmp_path: Path) -> None:
    write_case(tmp_path, "A0", spacing=1.0)
    write_case(tmp_path, "B0", spacing=1.001)
    config = make_config(tmp_path)
    assert case_headers.check_voxel_sizes(headers(tmp_path, config, ["A0", "B0"]), config.data).verdict == "PASS"


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
    check = case_headers.check_voxel_sizes(headers(tmp_path, turned, ["A0", "A1"]), turned.data)
    assert (check.verdict, check.detail) == ("PASS", "1 x 1 x 3 mm in every case")
    assert case_headers.check_voxel_sizes(headers(tmp_path, left, ["A0", "A1"]), left.data).verdict == "WARN"
