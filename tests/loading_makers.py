"""Cases as files, with known axes and voxel sizes, and data sections that load them."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from gcml_ray.config import DataConfig
from gcml_ray.data.datalist import Case

Array = NDArray[Any]


def save_nifti(path: Path, array: Array, affine: Array | None = None) -> str:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
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
