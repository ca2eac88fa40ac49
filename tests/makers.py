"""Tiny federations that all tests share: a few small volumes or pictures on disk, and a config over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from PIL import Image

from gcml_ray.config import Config

SITES = ("A", "B", "C", "D", "E", "F", "G", "H")
SHAPE = {2: (16, 16), 3: (12, 12, 8)}
PATCH = {2: (8, 8), 3: (8, 8, 8)}


def make_config(folder: Path, *, num_sites: int = 2, spatial_dims: int = 3, **sections: Any) -> Config:
    """A federation of sites A, B, ... with 3, 4, ... training, one validation and one test case each; files included.

    Two image channels, one foreground class (a bright box), a UNet of two levels. ``sections`` change it: a
    mapping is merged into the section's values (``federation={"rounds": 5}``), but ``method`` and ``network``
    are replaced whole.
    """
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "datalist": str(make_datalist(folder, num_sites=num_sites, spatial_dims=spatial_dims)),
            "channels": ["t1", "t2"],
            "labels": {"background": 0, "box": 1},
            "spatial_dims": spatial_dims,
            "spacing_is_real": spatial_dims == 3,
            "patch_size": PATCH[spatial_dims],
            "batch_size": 2,
        },
        "network": {"name": "unet", "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1}},
        "optimiser": {"name": "adamw", "learning_rate": 1e-2},
        "method": {"name": "gcml", "topology": {"name": "push_k", "k": 1}},
        "federation": {"rounds": 3, "local_steps": 2, "warmup_rounds": 1, "cooldown_rounds": 0, "seed": 7},
        "resources": {"pool": "local"},
        "defence": {"weights": False, "validation": False},  # made-up pushes are part of many tests
        "tracking": {"enabled": False},
        "output": {"folder": str(folder / "run"), "num_overlays": 0},
    }
    for name, value in sections.items():
        merges = isinstance(value, Mapping) and name not in ("method", "network")
        values[name] = {**values.get(name, {}), **value} if merges else value
    return Config.model_validate(values)


def make_datalist(folder: Path, *, num_sites: int = 2, spatial_dims: int = 3) -> Path:
    """Writes the cases of :func:`make_config` and their datalist; returns the latter's path."""
    entries = []
    for index, site in enumerate(SITES[:num_sites]):
        splits = ["train"] * (3 + index) + ["validation", "test"]
        for number, split in enumerate(splits):
            entries.append(_write_case(folder / "cases", site, number, spatial_dims) | {"split": split})
    path = folder / "datalist.json"
    path.write_text(json.dumps({"cases": entries}))
    return path


def _write_case(folder: Path, site: str, number: int, spatial_dims: int) -> dict[str, Any]:
    """Two image files and a label file; returns the datalist entry."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([SITES.index(site), number])
    shape = SHAPE[spatial_dims]
    corner = random.integers(1, 4, spatial_dims)
    label = np.zeros(shape, dtype=np.float32)
    label[tuple(slice(start, start + 4) for start in corner)] = 1
    ending = "png" if spatial_dims == 2 else "nii"
    images = []
    for channel in ("t1", "t2"):
        images.append(f"cases/{site}{number}_{channel}.{ending}")
        _write_volume(folder.parent / images[-1], 60 + 100 * label + random.normal(0, 20, shape))
    _write_volume(folder / f"{site}{number}.{ending}", label)
    return {"site": site, "case": f"c{number}", "image": images, "label": f"cases/{site}{number}.{ending}"}


def _write_volume(path: Path, values: npt.NDArray[Any]) -> None:
    """A picture for two axes, a NIfTI volume for three."""
    stored = np.clip(values, 0, 255).astype(np.uint8)
    if stored.ndim == 2:
        Image.fromarray(stored).save(path)
    else:
        nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), path)
