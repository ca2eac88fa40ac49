"""Files of a case that are stored on other axes are turned; what lies elsewhere is not taken for the same place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gcml_ray.data.case_checks import check_headers
from gcml_ray.data.loading import load_sample
from gcml_ray.data.one_grid import header_of, on_one_grid, turned, turned_header
from gcml_ray.data.reading import Header, Volume
from tests.loading_makers import block_label, case_3d, config, random_image

TILTED = np.array([[0.9, 0.2, 0.1, -20.0], [-0.2, 1.4, 0.3, 7.0], [-0.1, -0.3, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
HALF = np.sqrt(0.5)
DIAGONAL = np.array(  # turned by 45 degrees, rounded as NIfTI stores it
    [[HALF, -HALF, 0.0, 1.0], [HALF, HALF, 0.0, 2.0], [0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]], np.float32
)
SHAPE = (6, 5, 4)


def on_other_axes(
    array: NDArray[Any], affine: NDArray[np.float64]
) -> Iterator[tuple[NDArray[Any], NDArray[np.float64]]]:
    """The same voxels at the same places in all 48 orders and directions of the axes."""
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        orientation = np.column_stack([order, signs])
        back: Any = nibabel.orientations.inv_ornt_aff(orientation, array.shape)
        yield nibabel.apply_orientation(array, orientation), (affine @ back).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("affine", [np.eye(4), TILTED, DIAGONAL], ids=["straight", "tilted", "diagonal"])
def test_every_order_and_direction_of_the_axes_is_turned_back(affine: NDArray[np.float64]) -> None:
    array = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    onto = Header((1, *SHAPE), affine)
    for other, placed in on_other_axes(array, affine):
        volume = Volume(torch.from_numpy(np.ascontiguousarray(other)[None]), placed)
        found = turned(volume, onto)
        np.testing.assert_array_equal(found.array[0], array)
        assert turned_header(header_of(volume), onto).shape == (1, *SHAPE)
        assert on_one_grid(onto, header_of(found))


def test_what_lies_elsewhere_stays_as_it_is() -> None:
    """Moved by half a voxel, of another size, mirrored in place (another image), or without a usable affine."""
    onto = Header((1, *SHAPE), TILTED)
    moved = TILTED + np.array([[0, 0, 0, 0.5]] + [[0, 0, 0, 0]] * 3)
    mirrored = TILTED @ np.diag([-1.0, 1.0, 1.0, 1.0])
    for affine in (moved, TILTED @ np.diag([1.1, 1.0, 1.0, 1.0]), mirrored, TILTED * np.nan, np.zeros((4, 4))):
        volume = Volume(torch.zeros(1, *SHAPE), affine)
        assert turned(volume, onto) is volume
        assert not on_one_grid(onto, header_of(volume))


def test_rounding_of_a_header_is_no_difference() -> None:
    """A tenth of the smallest side of a voxel: 0.93 mm of these."""
    onto = Header((1, *SHAPE), TILTED)
    near, far = (TILTED + np.array([[0, 0, 0, shift]] + [[0, 0, 0, 0]] * 3) for shift in (0.09, 0.1))
    assert on_one_grid(onto, Header((1, *SHAPE), near))
    assert not on_one_grid(onto, Header((1, *SHAPE), far))
    assert on_one_grid(onto, Header((1, *SHAPE), None)), "a picture has no place"


def test_a_label_on_other_axes_is_that_of_its_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, label = random_image(*SHAPE), block_label(*SHAPE)
    expected = load_sample(case_3d(tmp_path, image, label), config())
    for other, placed in on_other_axes(label, np.eye(4)):
        case = case_3d(tmp_path, image, np.ascontiguousarray(other), label_affine=placed)
        assert check_headers(case, config())[1] == []
        assert torch.equal(load_sample(case, config()).label, expected.label)
    assert "another affine" not in caplog.text


@pytest.mark.parametrize("affine", [np.eye(4), TILTED, TILTED[:, [2, 0, 1, 3]]], ids=["straight", "tilted", "coronal"])
def test_slices_are_turned_within_their_plane_and_never_out_of_it(affine: NDArray[np.float64]) -> None:
    """Of the 48 orders and directions 16 leave the third axis the third one, two by two for one image of the plane."""
    array = np.arange(30, dtype=np.float32).reshape(6, 5, 1)
    onto, num_turned = Header((1, 6, 5), affine), 0
    for other, placed in on_other_axes(array, affine):
        if other.shape[2] != 1:
            continue
        flat = Volume(torch.from_numpy(np.ascontiguousarray(other)[None, ..., 0]), placed)
        np.testing.assert_array_equal(turned(flat, onto).array[0], array[..., 0])
        num_turned += 1
    assert num_turned == 16
    standing = Volume(torch.zeros(1, 6, 5), affine[:, [0, 2, 1, 3]])
    assert turned(standing, onto) is standing
