from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from gcml_ray.config import DataConfig
from gcml_ray.prediction.label_files import (
    LONGEST_NOTED,
    label_map,
    output_paths,
    region_values,
    site_that_made,
    write_labels,
)

BRATS = {
    "labels": {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 4},
    "regions": {
        "WT": ["necrosis", "oedema", "enhancing"],
        "TC": ["necrosis", "enhancing"],
        "ET": ["enhancing"],
    },
}


def data(**changes: Any) -> DataConfig:
    values = {"datalist": "x.json", "channels": ("ct",), "spacing_is_real": True, "patch_size": (8, 8, 8)}
    return DataConfig(**(values | changes))


def test_classes_get_the_values_of_the_label_files() -> None:
    config = data(labels={"air": 3, "bone": 1000, "fat": -1})
    labels = label_map(np.array([[True, False, False], [False, True, False]]), config)
    assert labels is not None
    assert labels.tolist() == [1000, -1, 3]
    assert labels.dtype == np.int16


def test_more_classes_than_a_byte_tells_apart_are_refused() -> None:
    labels = {f"class{value}": value for value in range(257)}
    with pytest.raises(ValidationError, match="labels lists 257 classes; 256 at most"):
        data(labels=labels)
    data(labels=dict(list(labels.items())[:256]))


def test_innermost_region_wins_in_a_label_map() -> None:
    """The last voxel is ET alone: it becomes enhancing, so the map says WT and TC as well."""
    config = data(**BRATS)
    masks = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 1]], dtype=bool)
    labels = label_map(masks, config)
    assert labels is not None
    assert labels.tolist() == [2, 1, 4, 0, 4]


@pytest.mark.parametrize(
    "regions",
    [
        {"a": ["x", "y"], "b": ["y", "z"]},  # cross
        {"a": ["x", "y"], "b": ["y", "x"]},  # the same
        {"a": ["x", "y"], "b": ["x"], "c": ["y"]},  # nothing of a's own
        {"a": ["x", "y"]},  # two labels of its own
    ],
)
def test_regions_that_one_map_cannot_say_get_a_file_each(tmp_path: Path, regions: dict[str, list[str]]) -> None:
    config = data(labels={"background": 0, "x": 1, "y": 2, "z": 3}, regions=regions)
    assert region_values(config) is None
    assert label_map(np.zeros((len(regions), 2), dtype=bool), config) is None
    assert list(output_paths(tmp_path, "p", "p.nii", config)) == list(regions)


def test_regions_apart_share_one_label_map() -> None:
    config = data(labels={"background": 0, "left": 5, "right": 6}, regions={"l": ["left"], "r": ["right"]})
    assert region_values(config) == {"l": 5, "r": 6}


def test_a_png_says_whose_model_made_it(tmp_path: Path) -> None:
    labels = np.eye(4, dtype=np.uint8)
    write_labels(tmp_path / "p1.png", labels, like="p1.png", note="gcml-ray site Zürich round 7")
    assert site_that_made(tmp_path / "p1.png") == "Zürich"
    assert np.asarray(Image.open(tmp_path / "p1.png")).tolist() == labels.tolist()


def test_a_long_name_is_known_by_what_a_header_has_room_for(tmp_path: Path) -> None:
    """The note of a NIfTI has 79 characters."""
    path, site = tmp_path / "p1.nii.gz", "university-hospital-" * 4
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "image.nii.gz")
    note = f"gcml-ray site {site} round 7"
    write_labels(path, np.zeros((4, 4, 4), np.uint8), like=str(tmp_path / "image.nii.gz"), note=note)
    assert site_that_made(path) == site[:LONGEST_NOTED]


def test_a_label_file_holds_nothing_that_may_name_the_patient(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([2.0, 2.0, 3.0, 1.0]))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Name: Doe^John"))
    image.header["db_name"], image.header["aux_file"], image.header["data_type"] = b"doe", b"john", b"doe^john"
    image.header.set_intent("vector")
    nibabel.save(image, tmp_path / "image.nii")
    labels = np.ones((4, 4, 4), np.uint8)
    write_labels(tmp_path / "p1.nii.gz", labels, like=str(tmp_path / "image.nii"), note="gcml-ray site A round 3")
    content = gzip.decompress((tmp_path / "p1.nii.gz").read_bytes())
    assert not any(name in content.lower() for name in (b"doe", b"john"))
    written = nibabel.load(tmp_path / "p1.nii.gz")
    assert written.header.get_intent()[0] == "none"
    np.testing.assert_array_equal(written.affine, image.affine)
    np.testing.assert_array_equal(written.dataobj, labels)


def test_a_png_of_somebody_else_is_nobodys(tmp_path: Path) -> None:
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "p1.png")
    (tmp_path / "p2.png").write_bytes(b"no picture")
    assert [site_that_made(tmp_path / name) for name in ("p1.png", "p2.png")] == [None, None]
