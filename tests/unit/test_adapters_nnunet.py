"""The adapter of nnU-Net's raw layout, on small files."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from gcml_ray.data.adapters.findings import label_problems_of_file
from gcml_ray.data.adapters.nnunet import config_lines, prepare_nnunet, read_meaning
from gcml_ray.errors import ConfigError, DataError
from tests.public_layouts import make_nnunet, save

V2 = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}


def test_nnunet_takes_channels_and_labels_from_its_description_and_sites_from_names(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"AB": 1, "C": 2}, description=V2)
    found = prepare_nnunet(tmp_path, site_regex="^([A-Z]+)")
    assert [(case.site, case.name, len(case.images)) for case in found.cases] == [
        ("AB", "AB_0", 2),
        ("C", "C_0", 2),
        ("C", "C_1", 2),
    ]
    assert list(config_lines(found.meaning)) == [
        'channels: ["T1", "FLAIR"]',
        'labels: {"background": 0, "lesion": 1}',
        "spatial_dims: 3",
    ]


def test_nnunet_slices_of_two_axes_are_read_in_2d(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"AB": 1, "C": 2}, description=V2)
    for path in tmp_path.glob("*/*.nii.gz"):
        volume = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(volume.dataobj)[..., 0], volume.affine), path)
    found = prepare_nnunet(tmp_path, site_regex="^([A-Z]+)")
    assert len(found.cases) == 3
    assert config_lines(found.meaning)[-1] == "spatial_dims: 2"
    Path(found.cases[0].images[0]).write_bytes(b"cut")
    rest = prepare_nnunet(tmp_path, site_regex="^([A-Z]+)", skip_faulty=True)
    assert (len(rest.cases), rest.meaning.spatial_dims) == (2, 2)


def test_nnunet_first_version_of_the_description_is_read_too(tmp_path: Path) -> None:
    old = {"modality": {"0": "MRI", "1": "MRI"}, "labels": {"0": "background", "2": "b", "1": "a"}}
    (tmp_path / "dataset.json").write_text(json.dumps(old))
    meaning = read_meaning(tmp_path)
    assert meaning.channels == ("MRI_0", "MRI_1")
    assert list(meaning.labels.items()) == [("background", 0), ("a", 1), ("b", 2)]


def test_nnunet_overlapping_labels_become_regions(tmp_path: Path) -> None:
    regions = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "kidney": [1, 2], "tumor": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(regions))
    meaning = read_meaning(tmp_path)
    assert meaning.labels == {"background": 0, "value_1": 1, "value_2": 2}
    assert meaning.regions == {"kidney": ("value_1", "value_2"), "tumor": ("value_2",)}
    assert 'regions: {"kidney": ["value_1", "value_2"], "tumor": ["value_2"]}' in config_lines(meaning)


def test_nnunet_site_table_must_name_every_case_and_no_other(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"A": 2}, description=V2)
    table = tmp_path / "sites.csv"
    table.write_text("case,site\nA_0,one\nA_9,two\n")
    with pytest.raises(DataError) as caught:
        prepare_nnunet(tmp_path, site_csv=table)
    assert "sites.csv lists case A_9, which has no file" in str(caught.value)
    assert "case A_1: belongs to no site" in str(caught.value)
    table.write_text("case,site\nA_0,one\nA_1,two\n")
    assert [case.site for case in prepare_nnunet(tmp_path, site_csv=table).cases] == ["one", "two"]


def test_nnunet_table_that_gives_a_case_two_sites_is_an_error(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"A": 1}, description=V2)
    (tmp_path / "sites.csv").write_text("case,site\nA_0,one\nA_0,two\n")
    with pytest.raises(DataError, match="line 3: case A_0 belongs to one and to two"):
        prepare_nnunet(tmp_path, site_csv=tmp_path / "sites.csv")


def test_nnunet_reports_all_problems_at_once(tmp_path: Path) -> None:
    make_nnunet(tmp_path, {"A": 3}, description=V2)
    (tmp_path / "imagesTr" / "A_0_0001.nii.gz").unlink()
    save(tmp_path / "imagesTr" / "A_1_0002.nii.gz", np.zeros((16, 16, 8), np.int16))
    save(tmp_path / "labelsTr" / "A_2.nii.gz", np.full((16, 16, 8), 0.5, np.float32))
    make_nnunet(tmp_path, {"a b": 1}, description=V2)
    with pytest.raises(DataError) as caught:
        prepare_nnunet(tmp_path, site_regex="^([^_]+)")
    for expected in (
        "case A_0: FLAIR is missing",
        "case A_1: A_1_0002.nii.gz is of no channel: there are 2, from _0000 on",
        "case A_2: label A_2.nii.gz holds the values 0.5; known are 0, 1",
        "case a b_0: site name 'a b' cannot name a folder",
    ):
        assert expected in str(caught.value)


def test_nnunet_picture_may_hold_all_channels(tmp_path: Path) -> None:
    names = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "v": 1}}
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(names | {"file_ending": ".png"}))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "imagesTr" / "A_1_0000.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "labelsTr" / "A_1.png")
    (case,) = prepare_nnunet(tmp_path, site_regex="^A").cases
    assert case.images == (str(tmp_path / "imagesTr" / "A_1_0000.png"),)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_the_opacity_of_a_label_is_no_class(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "label.png"
    Image.fromarray(np.ones((8, 8), np.uint8)).convert("RGB").convert(mode).save(path)
    assert np.unique(np.asarray(Image.open(path))[..., -1]).tolist() == [255]
    assert label_problems_of_file(path, {0, 1}, spatial_dims=2) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel_names": {"1": "T1"}}, "channel_names .or modality. is"),
        ({"labels": {"background": 0}}, "at least two names"),
        ({"labels": {"background": 0, "a": "x"}}, "must be a whole number"),
        ({"labels": {"background": 0, "a": 1.7}}, "must be a whole number"),
        ({"labels": {"0": "background", "\u00b2": "a"}}, "must be a whole number"),
        ({"labels": {"background": 0, "whole": [0, 1], "b": 2}}, "region 'whole' with the value 0 in it"),
        ({"labels": {"a": 1, "b": 2}}, "the background must be 0"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "`ignore`, which is not supported"),
        ({"file_ending": ".mha"}, "file_ending is '.mha'"),
        ({"dataset": {"x": {}}}, "`dataset` names files elsewhere"),
    ],
)
def test_nnunet_description_that_cannot_be_used_is_an_error(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(V2 | change))
    with pytest.raises(DataError, match=message):
        read_meaning(tmp_path)


def test_nnunet_needs_a_description_and_one_way_to_tell_sites(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset.json: cannot be read as JSON"):
        prepare_nnunet(tmp_path, site_regex="A")
    (tmp_path / "dataset.json").write_text(json.dumps(V2))
    with pytest.raises(ConfigError, match="either --site-regex or --site-csv"):
        prepare_nnunet(tmp_path)
    with pytest.raises(ConfigError, match="is no regular expression"):
        prepare_nnunet(tmp_path, site_regex="(")
