"""Scans whose axes are not those of the scanner: the voxels are resampled along their own axes, whatever the tilt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from gcml_ray.data.loading import prepare_image
from gcml_ray.data.reading import Header
from gcml_ray.doctor.case_headers import training_grid
from tests.loading_makers import config, random_image

SIZES_MM, TARGET_MM = (1.0, 1.5, 4.0), (1.5, 1.5, 3.0)


def affine_of(degrees: tuple[float, float, float], *, dtype: type = np.float32) -> NDArray[np.float64]:
    """Voxel index to mm of a tilted scan, as precise as NIfTI stores it."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(SIZES_MM)
    affine[:3, 3] = (-31.5, 12.25, 7.0)
    return affine.astype(dtype).astype(np.float64)


@pytest.mark.parametrize("degrees", [(0.01, 0, 0), (1, 0, 0), (20, -15, 12), (30, 0, 20)])
def test_tilt_changes_no_voxel_of_what_a_network_sees(degrees: tuple[float, float, float]) -> None:
    image, data = torch.from_numpy(random_image(26, 22, 10))[None], config(target_spacing_mm=TARGET_MM)
    straight = prepare_image(image, affine_of((0, 0, 0)), data)
    tilted = prepare_image(image, affine_of(degrees), data)
    assert tilted.image.shape == (1, 18, 22, 13)  # 25 x 1.0 / 1.5, 21 x 1.5 / 1.5, 9 x 4.0 / 3.0, and the first voxel
    torch.testing.assert_close(tilted.image, straight.image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, -15, 12)])
def test_new_voxels_lie_on_the_old_axes_from_the_first_voxel_on(degrees: tuple[float, float, float]) -> None:
    affine = affine_of(degrees)
    prepared = prepare_image(
        torch.from_numpy(random_image(26, 22, 10))[None], affine, config(target_spacing_mm=TARGET_MM)
    )
    expected = affine @ np.diag([1.5, 1.0, 0.75, 1.0])  # new sizes over old ones
    np.testing.assert_allclose(prepared.grid.affine, expected, atol=1e-5)
    assert prepared.spacing == pytest.approx(TARGET_MM, abs=1e-5)


def test_doctor_knows_the_grid_of_a_tilted_scan() -> None:
    header = Header((1, 26, 22, 10), affine_of((20, -15, 12)))
    assert training_grid(header, config(target_spacing_mm=TARGET_MM)) == (18, 22, 13)
