"""The adapter of HECKTOR: CT, PET and mask on one grid, from small files in its layout."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from gcml_ray.data.adapters.hecktor import prepare_hecktor
from gcml_ray.errors import DataError
from tests.public_layouts import make_hecktor, rewrite, save

SMALL = (16, 16, 8)


def voxels(path: str) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_hecktor_without_boxes_brings_the_pet_to_the_ct_grid(tmp_path: Path) -> None:
    make_hecktor(tmp_path / "in", {"CHUM": 1}, shape=SMALL)
    (case,) = prepare_hecktor(tmp_path / "in", tmp_path / "out").training
    assert (case.site, case.name, case.split) == ("CHUM", "CHUM001", None)
    assert case.images[0] == str(tmp_path / "in" / "CHUM001_ct.nii.gz")
    assert case.images[1] == str(tmp_path / "out" / "ct_grid" / "CHUM" / "CHUM001_pt.nii.gz")
    pet = voxels(str(tmp_path / "in" / "CHUM001_pt.nii.gz"))
    moved = voxels(case.images[1])
    assert moved.shape == SMALL  # CT voxels of 1 x 1 x 2 mm, PET voxels of 2 mm: every second one coincides
    np.testing.assert_allclose(moved[::2, ::2], pet, rtol=1e-5)
    np.testing.assert_allclose(moved[5, 4], (pet[2, 2] + pet[3, 2]) / 2, rtol=1e-4, atol=1e-5)


def test_hecktor_box_is_read_in_itk_axes_and_gives_1_mm_voxels(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    ct = np.arange(10 * 8 * 6, dtype=np.int16).reshape(10, 8, 6)
    pet, mask = np.ones((10, 8, 6), np.float32), (ct % 2).astype(np.uint8)
    affine = np.eye(4)
    affine[:3, 3] = (100, 200, 300)
    for kind, array in {"ct": ct, "pt": pet, "gtvt": mask}.items():
        save(folder / f"CHUS009_{kind}.nii.gz", array, affine)
    # x of NIfTI 102..106 is -106..-102 of ITK: voxels 6, 5, 4, 3; y 201..204: voxels 4, 3, 2; z 301..303: voxels 1, 2.
    table = tmp_path / "boxes.csv"
    table.write_text("PatientID,x1,x2,y1,y2,z1,z2\nCHUS009,-106,-102,-204,-201,301,303\n")
    (case,) = prepare_hecktor(folder, tmp_path / "out", boxes=table).training
    expected = ct[[6, 5, 4, 3]][:, [4, 3, 2]][:, :, [1, 2]]
    np.testing.assert_array_equal(voxels(case.images[0]), expected)
    np.testing.assert_array_equal(voxels(case.label), expected % 2)
    image = nibabel.load(case.images[1])
    np.testing.assert_allclose(image.affine @ (0, 0, 0, 1), (106, 204, 301, 1))
    assert image.header.get_zooms() == (1.0, 1.0, 1.0)


def test_hecktor_outside_the_ct_is_air(tmp_path: Path) -> None:
    make_hecktor(tmp_path / "in", {"CHUM": 1}, shape=SMALL)
    table = tmp_path / "boxes.csv"
    table.write_text("PatientID,x1,x2,y1,y2,z1,z2\nCHUM001,-20,0,-15,0,0,14\n")
    (case,) = prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table).training
    assert voxels(case.images[0])[0].tolist() == np.full((15, 14), -1024).tolist()  # x = 20 mm, the CT ends at 15
    assert not voxels(case.images[1])[0].any()


def test_hecktor_mask_takes_the_nearest_voxel(tmp_path: Path) -> None:
    """One mask voxel of 4 mm, from 6 to 10 mm, is a cube of 64 voxels of 1 mm; interpolation would cut its corners."""
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[2, 2, 2] = 1
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    for kind, array in {"ct": mask.astype(np.int16), "pt": mask.astype(np.float32), "gtvt": mask}.items():
        save(tmp_path / "in" / f"CHUM001_{kind}.nii.gz", array, affine)
    table = tmp_path / "boxes.csv"
    table.write_text("PatientID,x1,x2,y1,y2,z1,z2\nCHUM001,-12.5,-2.5,-12.5,-2.5,3.5,13.5\n")
    (case,) = prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table).training
    assert int(voxels(case.label).sum()) == 64


def test_hecktor_unseen_sites_come_back_apart_as_test_cases(tmp_path: Path) -> None:
    make_hecktor(tmp_path / "in", {"CHUM": 2, "CHUP": 1}, shape=SMALL)
    found = prepare_hecktor(tmp_path / "in", tmp_path / "out", unseen=("CHUP",))
    assert [case.name for case in found.training] == ["CHUM001", "CHUM002"]
    assert [(case.name, case.split) for case in found.unseen] == [("CHUP001", "test")]


def test_hecktor_second_run_writes_nothing_again(tmp_path: Path) -> None:
    table = make_hecktor(tmp_path / "in", {"CHUM": 1}, shape=SMALL)
    calls: list[tuple[int, int]] = []
    first = prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table)
    before = Path(first.training[0].label).stat().st_mtime_ns
    again = prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table, progress=lambda *each: calls.append(each))
    assert again == first
    assert Path(first.training[0].label).stat().st_mtime_ns == before
    assert calls == [(1, 1)]


def test_hecktor_files_are_made_anew_where_their_source_or_their_box_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mask that a radiologist has corrected, also with an older time than the file made of it, and another box."""
    table = make_hecktor(tmp_path / "in", {"CHUM": 1}, shape=SMALL)
    (case,) = prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table).training
    assert voxels(case.label).any()
    mask = tmp_path / "in" / "CHUM001_gtvt.nii.gz"
    save(mask, np.zeros_like(voxels(str(mask))), nibabel.load(mask).affine)
    os.utime(mask, (1.0, 1.0))
    prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table)
    assert not voxels(case.label).any()
    assert caplog.messages[-1] == f"{case.label} is made anew: what it was made of has changed since"

    shape = voxels(case.images[0]).shape
    rows = table.read_text().split(",")
    rows[-1] = str(int(rows[-1]) - 2)  # z2
    table.write_text(",".join(rows))
    prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table)
    assert [voxels(path).shape for path in (*case.images, case.label)] == [(*shape[:2], shape[2] - 2)] * 3


def test_hecktor_a_full_disk_is_no_fault_of_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_hecktor(tmp_path / "in", {"CHUM": 2}, shape=SMALL)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full)
    with pytest.raises(OSError, match=r"No space left on device.*CHUM001_ct\.nii\.gz"):
        prepare_hecktor(tmp_path / "in", tmp_path / "out", boxes=table, skip_faulty=True)


def test_hecktor_output_may_lie_below_the_input(tmp_path: Path) -> None:
    table = make_hecktor(tmp_path, {"CHUM": 1}, shape=SMALL)
    first = [prepare_hecktor(tmp_path, tmp_path / "volumes", boxes=boxes) for boxes in (None, table)]
    assert [prepare_hecktor(tmp_path, tmp_path / "volumes", boxes=boxes) for boxes in (None, table)] == first


def test_hecktor_reports_all_problems_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    table = make_hecktor(folder, {"CHUM": 6, "CHUS": 1}, shape=SMALL)
    lines = table.read_text().splitlines()
    boxes = [line for line in lines if not line.startswith(("CHUM002", "CHUM005", "CHUM006"))]
    far, flat = "CHUM005,900,910,0,10,0,10", "CHUM006,0,10,5,5,0,10"
    table.write_text("\n".join([*boxes, far, flat, "CHUX001,0,1,0,1,0,1"]) + "\n")
    (folder / "CHUM001_pt.nii.gz").unlink()
    rewrite(folder / "CHUM003_gtvt.nii.gz", np.full((16, 16, 7), 2, np.uint8))
    make_hecktor(folder / "copy", {"CHUM": 4}, shape=SMALL)
    for path in folder.glob("copy/CHUM00[123]*"):
        path.unlink()
    with pytest.raises(DataError) as caught:
        prepare_hecktor(folder, tmp_path / "out", boxes=table, unseen=("CHGJ",))
    for expected in (
        "hecktor2021_bbox_training.csv lists case CHUX001, which has no file",
        "site CHGJ (--unseen) has no case",
        "case CHUM001: pt is missing",
        "case CHUM002: has no row in hecktor2021_bbox_training.csv",
        "gtvt (CHUM003_gtvt.nii.gz) has the shape (16, 16, 7), not (16, 16, 8) as ct",
        "case CHUM003: label CHUM003_gtvt.nii.gz holds the values 2; known are 0, 1",
        "case CHUM004: ct is there twice",
        "case CHUM005: its box lies outside the ct",
        "case CHUM006: hecktor2021_bbox_training.csv, line 7: not a box in mm (its sides are [10.0, 0.0, 10.0] mm)",
    ):
        assert expected in str(caught.value)
    assert [path.name for path in (tmp_path / "out" / "box_1mm").iterdir()] == ["CHUS"]


def test_hecktor_all_sites_unseen_or_no_file_at_all_is_an_error(tmp_path: Path) -> None:
    make_hecktor(tmp_path / "in", {"CHUM": 1}, shape=SMALL)
    with pytest.raises(DataError, match="none is left to train"):
        prepare_hecktor(tmp_path / "in", tmp_path / "out", unseen=("CHUM",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file named <case>_ct"):
        prepare_hecktor(tmp_path / "empty", tmp_path / "out")
