"""A federation of two sites with tiny cases on disk, for tests of what looks at files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from gcml_ray.config import Config
from gcml_ray.data.datalist import Case
from gcml_ray.doctor.case_headers import CaseHeader, check_all_headers

SHAPE = (8, 8, 8)


def write_image(path: Path, array: Any, *, spacing: float = 1.0) -> None:
    """A NIfTI file with cubic voxels."""
    nibabel.save(nibabel.Nifti1Image(array, np.diag([spacing] * 3 + [1.0])), path)


def write_case(
    folder: Path, name: str, *, shape: tuple[int, ...] = SHAPE, spacing: float = 1.0, value: int = 1
) -> None:
    """Noise with a cube of the given label value in the middle."""
    label = np.zeros(shape, dtype=np.uint8)
    label[2:5, 2:5, 2:5] = value
    image = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
    write_image(folder / f"{name}.nii.gz", image, spacing=spacing)
    write_image(folder / f"{name}_seg.nii.gz", label, spacing=spacing)


def make_federation(folder: Path, *, cases_per_site: int = 6, **sections: Any) -> Config:
    """Sites A and B with cases of 8 x 8 x 8 voxels; two of six validate, one tests."""
    splits = ["train"] * (cases_per_site - 3) + ["validation", "validation", "test"]
    entries = []
    for site in ("A", "B"):
        for index, split in enumerate(splits):
            name = f"{site}{index}"
            write_case(folder, name)
            entries.append({"site": site, "image": f"{name}.nii.gz", "label": f"{name}_seg.nii.gz", "split": split})
            entries[-1]["case"] = name
    (folder / "data.json").write_text(json.dumps({"cases": entries}))
    return make_config(folder, **sections)


def make_config(folder: Path, **sections: Any) -> Config:
    """The configuration of such a federation; ``sections`` are merged into its own, ``method`` is replaced whole."""
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "datalist": str(folder / "data.json"),
            "channels": ["ct"],
            "labels": {"background": 0, "lesion": 1},
            "spacing_is_real": True,
            "patch_size": [8, 8, 8],
        },
        "network": {"name": "unet", "options": {"channels": [2, 4], "strides": [2], "num_res_units": 0}},
        "optimiser": {"learning_rate": 1e-3},
        "method": {"name": "gcml", "topology": {"name": "ring"}},
        "federation": {"rounds": 4, "local_steps": 2},
        "resources": {"pool": "local"},
        "tracking": {"enabled": False},
        "output": {"folder": str(folder / "run")},
    }
    for name, section in sections.items():
        values[name] = section if name == "method" else values.get(name, {}) | section
    return Config.model_validate(values)


def edit_datalist(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Applies a function to every entry; None drops the entry."""
    entries = json.loads((folder / "data.json").read_text())["cases"]
    kept = [entry for entry in (change(dict(entry)) for entry in entries) if entry is not None]
    (folder / "data.json").write_text(json.dumps({"cases": kept}))


def headers_of(folder: Path, config: Config, names: list[str]) -> tuple[CaseHeader, ...]:
    """What ``gcml doctor`` finds in the headers of such cases, all for training."""
    cases = [Case(n[0], n, (str(folder / f"{n}.nii.gz"),), str(folder / f"{n}_seg.nii.gz"), "train") for n in names]
    return check_all_headers(cases, config.data)[1]
