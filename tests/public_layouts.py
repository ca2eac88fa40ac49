"""Phantom volumes laid out as public data sets are: FeTS, PanSeg, HECKTOR and nnU-Net, small."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gcml_ray.data.phantom_case import make_case
from gcml_ray.data.phantom_sites import style_of
from gcml_ray.seeding import numpy_generator

SHAPE = (40, 40, 20)
Array = NDArray[Any]


def phantom_case(site: int, index: int, shape: Sequence[int] = SHAPE) -> tuple[Array, Array, Array]:
    """t1, flair and the lesion (0 and 1) of one made-up case."""
    rng = numpy_generator(0, "layout", site, index)
    (t1, flair), lesion = make_case(style_of(f"site{site + 1}", 0), rng, shape=tuple(shape))
    return np.round(t1).astype(np.int16), np.round(flair).astype(np.int16), lesion.astype(np.uint8)


def save(path: Path, voxels: Array, affine: Array | None = None) -> None:
    """One NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)


def make_fets(folder: Path, cases: Mapping[int, int], *, shape: Sequence[int] = SHAPE) -> Path:
    """``cases``: institution -> number. Returns the partition table, which lies in the folder.

    The lesion's rim is oedema (2), below it enhancing tumour (4), its middle necrosis (1).
    """
    rows = ["Partition_ID,Subject_ID"]
    for place, (institution, number) in enumerate(cases.items()):
        for index in range(number):
            subject = f"FeTS2022_{institution:02d}{index:03d}"
            rows.append(f"{institution},{subject}")
            t1, flair, lesion = phantom_case(place, index, shape)
            depth = ndimage.distance_transform_edt(lesion)
            seg = np.select([depth > 2.5, depth > 1.5, depth > 0], [1, 4, 2], 0).astype(np.uint8)
            volumes = {"t1": t1, "t1ce": t1 + 400 * (seg == 4).astype(np.int16), "t2": flair // 2, "flair": flair}
            for kind, voxels in {**volumes, "seg": seg}.items():
                save(folder / subject / f"{subject}_{kind}.nii.gz", voxels)
    table = folder / "partitioning_1.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def make_panseg(folder: Path, cases: Mapping[str, int], *, shape: Sequence[int] = SHAPE) -> Path:
    """``cases``: centre -> number. Returns the folder."""
    for place, (centre, number) in enumerate(cases.items()):
        for index in range(number):
            t1, _, lesion = phantom_case(place, index, shape)
            save(folder / "imagesTr" / f"{centre}_{index + 1:04d}_0000.nii.gz", t1)
            save(folder / "labelsTr" / f"{centre}_{index + 1:04d}.nii.gz", lesion)
    return folder


def make_nnunet(folder: Path, cases: Mapping[str, int], *, description: Mapping[str, Any]) -> Path:
    """Two channels; ``description`` is the content of ``dataset.json``. Returns the folder."""
    for place, (site, number) in enumerate(cases.items()):
        for index in range(number):
            t1, flair, lesion = phantom_case(place, index, (16, 16, 8))
            save(folder / "imagesTr" / f"{site}_{index}_0000.nii.gz", t1)
            save(folder / "imagesTr" / f"{site}_{index}_0001.nii.gz", flair)
            save(folder / "labelsTr" / f"{site}_{index}.nii.gz", lesion)
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def make_hecktor(folder: Path, cases: Mapping[str, int], *, shape: Sequence[int] = SHAPE) -> Path:
    """``cases``: centre -> number. CT and mask on a grid of 1 x 1 x 2 mm, PET on one of 2 x 2 x 2 mm.

    Returns the table of boxes: the volume without its outermost 4 mm, in ITK's axes.
    """
    rows = ["PatientID,x1,x2,y1,y2,z1,z2"]
    ct_affine, pt_affine = np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([2.0, 2.0, 2.0, 1.0])
    for place, (centre, number) in enumerate(cases.items()):
        for index in range(number):
            name = f"{centre}{index + 1:03d}"
            t1, flair, lesion = phantom_case(place, index, shape)
            save(folder / f"{name}_ct.nii.gz", t1 - 1000, ct_affine)
            save(folder / f"{name}_pt.nii.gz", (flair[::2, ::2] / 100).astype(np.float32), pt_affine)
            save(folder / f"{name}_gtvt.nii.gz", lesion, ct_affine)
            x, y, z = shape[0], shape[1], 2 * shape[2]
            rows.append(f"{name},{4 - x},-4,{4 - y},-4,4,{z - 4}")
    table = folder / "hecktor2021_bbox_training.csv"
    table.write_text("\n".join(rows) + "\n")
    return table


def rewrite(path: Path, voxels: np.ndarray | None = None, *, affine: np.ndarray | None = None) -> None:
    """The same file with other voxels or another affine."""
    image = nibabel.load(path)
    save(path, np.asarray(image.dataobj) if voxels is None else voxels, image.affine if affine is None else affine)
