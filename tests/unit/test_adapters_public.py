"""Adapters of public data sets, on small files made in the same layouts."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from actors.listener import NullListener
from actors.run import run_federation
from gcml_ray.cli.prepare import prepare_app
from gcml_ray.config.file import load_config
from gcml_ray.console.summary import site_dice
from gcml_ray.data.adapters import fets, panseg
from gcml_ray.data.adapters.published_split import SplitSizes, published_split
from gcml_ray.data.datalist import Case, cases_of_site, read_datalist
from gcml_ray.errors import DataError
from gcml_ray.networks.registry import check_sizes
from gcml_ray.records import PERSONALISED
from tests.public_layouts import make_fets, make_hecktor, make_nnunet, make_panseg, rewrite, save

ROOT = Path(__file__).parents[2]
SMALL = (16, 16, 8)
V2 = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}


def ids(numbers: dict[str, int]) -> list[Case]:
    return [
        Case(site=site, name=f"{site}_{index:04d}", images=("i",), label="l", split=None)
        for site, number in numbers.items()
        for index in range(number)
    ]


def counts(cases: tuple[Case, ...]) -> dict[str | None, int]:
    return dict(Counter(case.split for case in cases))


# --- published splits


def test_fets_sites_of_published_size_give_the_published_split() -> None:
    sizes = {fets.site_name(number): size for number, size in fets.PUBLISHED.items()}
    numbers = {"inst04": 47, "inst05": 22, "inst06": 34, "inst07": 12, "inst11": 14, "inst16": 30, "inst20": 33}
    cases = published_split(ids(numbers | {"inst21": 35}), sizes)
    assert counts(cases) == {"train": 152, "validation": 27, "test": 48}
    assert counts(cases_of_site(cases, "inst21")) == {"train": 23, "validation": 4, "test": 8}


def test_panseg_sites_of_published_size_give_the_published_split() -> None:
    cases = published_split(ids({"NYU": 161, "MCF": 151, "NWU": 30, "AHN": 17, "MCA": 25}), panseg.PUBLISHED)
    assert counts(cases) == {"train": 269, "validation": 39, "test": 76}
    assert counts(cases_of_site(cases, "AHN")) == {"train": 12, "validation": 2, "test": 3}


def test_published_split_does_not_depend_on_the_order_of_cases_or_on_other_sites() -> None:
    sizes = {"A": SplitSizes(3, 1, 2), "B": SplitSizes(1, 1, 1)}
    alone = published_split(ids({"A": 6}), sizes)
    both = published_split(ids({"B": 3, "A": 6})[::-1], sizes)
    assert {case for case in both if case.site == "A"} == set(alone)


def test_site_of_another_size_is_left_to_the_configuration_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cases = published_split(ids({"A": 7}), {"A": SplitSizes(3, 1, 2)})
    assert counts(cases) == {None: 7}
    assert "site A has 7 cases, the published split is of 6" in caplog.text


# --- FeTS


def test_fets_gives_the_chosen_institutions_with_four_channels(tmp_path: Path) -> None:
    table = make_fets(tmp_path, {1: 1, 4: 2, 11: 1}, shape=SMALL)
    cases = fets.prepare_fets(tmp_path, table, institutions=(4, 11))
    assert [(case.site, case.name) for case in cases] == [
        ("inst04", "FeTS2022_04000"),
        ("inst04", "FeTS2022_04001"),
        ("inst11", "FeTS2022_11000"),
    ]
    home = tmp_path / "FeTS2022_04000"
    kinds = ("t1", "t1ce", "t2", "flair")
    assert cases[0].images == tuple(str(home / f"FeTS2022_04000_{kind}.nii.gz") for kind in kinds)
    assert cases[0].label == str(home / "FeTS2022_04000_seg.nii.gz")


def test_fets_reports_all_problems_at_once(tmp_path: Path) -> None:
    table = make_fets(tmp_path, {4: 5}, shape=SMALL)
    lines = ["4,FeTS2022_gone", "4,FeTS2022_04003", "x,FeTS2022_04009", "16,FeTS2022_away"]
    table.write_text(table.read_text() + "\n".join(lines) + "\n")
    (tmp_path / "FeTS2022_04000" / "FeTS2022_04000_t2.nii.gz").unlink()
    rewrite(tmp_path / "FeTS2022_04001" / "FeTS2022_04001_t2.nii.gz", np.zeros((16, 16, 7), np.int16))
    rewrite(tmp_path / "FeTS2022_04001" / "FeTS2022_04001_seg.nii.gz", np.full(SMALL, 3, np.uint8))
    rewrite(tmp_path / "FeTS2022_04002" / "FeTS2022_04002_flair.nii.gz", affine=np.diag([1.0, 1.0, 2.0, 1.0]))
    (tmp_path / "FeTS2022_04004" / "FeTS2022_04004_t1.nii.gz").write_bytes(b"no image")
    (tmp_path / "FeTS2022_new").mkdir()
    with pytest.raises(DataError) as caught:
        fets.prepare_fets(tmp_path, table, institutions=(4, 7))
    text = str(caught.value)
    for expected in (
        "line 9: Partition_ID 'x' and Subject_ID 'FeTS2022_04009'",
        "folder FeTS2022_new has no row in partitioning_1.csv",
        "subject FeTS2022_gone (inst04) of partitioning_1.csv has no folder",
        "site inst07 has no case",
        "case FeTS2022_04000: t2 is missing: no file",
        "t2 (FeTS2022_04001_t2.nii.gz) has the shape (16, 16, 7), not (16, 16, 8) as t1 (FeTS2022_04001_t1.nii.gz)",
        "label FeTS2022_04001_seg.nii.gz holds the values 3; known are 0, 1, 2, 4",
        "flair (FeTS2022_04002_flair.nii.gz) has another affine (off by up to 7 mm) than t1",
        "case FeTS2022_04003: is listed twice in partitioning_1.csv, again in line 8",
        "FeTS2022_04004_t1.nii.gz: not an image that can be opened",
        "leave these cases out with --skip-faulty",
    ):
        assert expected in text
    assert "FeTS2022_away" not in text  # its institution was not asked for


def test_faulty_cases_are_left_out_with_a_warning_where_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = make_fets(tmp_path, {4: 2}, shape=SMALL)
    (tmp_path / "FeTS2022_04000" / "FeTS2022_04000_t2.nii.gz").unlink()
    (case,) = fets.prepare_fets(tmp_path, table, institutions=(4,), skip_faulty=True)
    assert case.name == "FeTS2022_04001"
    assert "left out: case FeTS2022_04000: t2 is missing" in caplog.text


def test_nothing_left_is_an_error_even_where_faulty_cases_may_be_left_out(tmp_path: Path) -> None:
    table = make_fets(tmp_path, {4: 1}, shape=SMALL)
    (tmp_path / "FeTS2022_04000" / "FeTS2022_04000_t2.nii.gz").unlink()
    with pytest.raises(DataError, match="t2 is missing"):
        fets.prepare_fets(tmp_path, table, institutions=(4,), skip_faulty=True)


def test_rounding_in_a_header_is_no_fault(tmp_path: Path) -> None:
    table = make_fets(tmp_path, {4: 1}, shape=SMALL)
    affine = np.eye(4)
    affine[0, 3] = 0.05
    rewrite(tmp_path / "FeTS2022_04000" / "FeTS2022_04000_seg.nii.gz", affine=affine)
    assert len(fets.prepare_fets(tmp_path, table, institutions=(4,))) == 1


def test_fets_table_without_its_columns_or_lines_is_an_error(tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("id,subject\n1,a\n")
    with pytest.raises(DataError, match="has no column Partition_ID, Subject_ID; its columns are id, subject"):
        fets.prepare_fets(tmp_path, table)
    table.write_text("Partition_ID,Subject_ID\n")
    with pytest.raises(DataError, match="no line below it"):
        fets.prepare_fets(tmp_path, table)
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        fets.prepare_fets(tmp_path, tmp_path / "none.csv")
    with pytest.raises(DataError, match="no such folder"):
        fets.prepare_fets(tmp_path / "none", table)


# --- PanSeg


def test_panseg_site_is_the_prefix(tmp_path: Path) -> None:
    make_panseg(tmp_path, {"NYU": 2, "MCA": 1}, shape=SMALL)
    cases = panseg.prepare_panseg(tmp_path, sites=("NYU", "MCA"))
    assert [(case.site, case.name) for case in cases] == [
        ("MCA", "MCA_0001"),
        ("NYU", "NYU_0001"),
        ("NYU", "NYU_0002"),
    ]
    assert cases[0].images == (str(tmp_path / "imagesTr" / "MCA_0001_0000.nii.gz"),)


def test_panseg_reports_all_problems_at_once(tmp_path: Path) -> None:
    make_panseg(tmp_path, {"NYU": 5, "XYZ": 1}, shape=SMALL)
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    (images / "NYU_0001_0000.nii.gz").unlink()
    (labels / "NYU_0002.nii.gz").unlink()
    rewrite(labels / "NYU_0003.nii.gz", np.full(SMALL, 7, np.uint8))
    save(labels / "NYU_0004.nii", np.zeros(SMALL, np.uint8))
    save(images / "nyu_0005_0000.nii.gz", np.zeros(SMALL, np.int16))
    save(images / "0006_0000.nii.gz", np.zeros(SMALL, np.int16))
    save(images / "scan.nii.gz", np.zeros(SMALL, np.int16))
    with pytest.raises(DataError) as caught:
        panseg.prepare_panseg(tmp_path, sites=("NYU", "AHN"))
    for expected in (
        "imagesTr/scan.nii.gz is not named <case>_<four digits>.nii.gz",
        "site AHN has no case",
        "case NYU_0001: mri is missing",
        "case NYU_0002: label is missing",
        "case NYU_0003: label NYU_0003.nii.gz holds the values 7; known are 0, 1",
        "case NYU_0004: labelsTr/NYU_0004 is there twice, with two endings",
        "case nyu_0005: imagesTr has nyu_0005_0000 and NYU_0005_0000: one case, spelt in two ways?",
        "case 0006: belongs to no site",
        "case XYZ_0001: its centre XYZ is none of NYU, AHN",
    ):
        assert expected in str(caught.value)


def test_panseg_folder_without_its_subfolders_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nnU-Net's raw layout has imagesTr and labelsTr"):
        panseg.prepare_panseg(tmp_path)


# --- command line


def invoke(*words: object) -> str:
    result = CliRunner().invoke(prepare_app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_command_fets_writes_a_datalist(tmp_path: Path) -> None:
    table = make_fets(tmp_path / "in", {7: 12}, shape=SMALL)
    out = tmp_path / "x.json"
    shown = invoke("fets", tmp_path / "in", "--partition", table, "--out", out, "--institutions", "7")
    assert "inst07: 12 cases (7 train, 2 validation, 3 test)" in shown
    assert counts(read_datalist(out)) == {"train": 7, "validation": 2, "test": 3}


def test_command_panseg_writes_a_datalist(tmp_path: Path) -> None:
    make_panseg(tmp_path / "t1", {"MCA": 3}, shape=SMALL)
    invoke("panseg", tmp_path / "t1", "--out", tmp_path / "x.json", "--sites", "MCA")
    assert [case.site for case in read_datalist(tmp_path / "x.json")] == ["MCA"] * 3


def test_command_hecktor_writes_a_second_datalist_for_unseen_sites(tmp_path: Path) -> None:
    table = make_hecktor(tmp_path / "in", {"CHUM": 1, "CHUP": 1}, shape=SMALL)
    invoke("hecktor", tmp_path / "in", "--out", tmp_path / "x.json", "--boxes", table, "--unseen", "CHUP")
    assert [case.site for case in read_datalist(tmp_path / "x.json")] == ["CHUM"]
    assert [case.split for case in read_datalist(tmp_path / "x_unseen.json")] == ["test"]
    assert (tmp_path / "volumes" / "box_1mm" / "CHUM" / "CHUM001_pt.nii.gz").is_file()


def test_command_nnunet_prints_what_the_configuration_needs(tmp_path: Path) -> None:
    make_nnunet(tmp_path / "in", {"A": 1}, description=V2)
    shown = invoke("nnunet", tmp_path / "in", "--out", tmp_path / "x.json", "--site-regex", "^([A-Z]+)")
    assert 'channels: ["T1", "FLAIR"]' in shown
    assert [case.site for case in read_datalist(tmp_path / "x.json")] == ["A"]


# --- configurations


@pytest.mark.parametrize("name", ["brats", "brats_small", "panseg", "panseg_small", "hecktor", "hecktor_small"])
def test_patch_of_a_public_configuration_fits_its_network(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    check_sizes(config.network, config.data)
    assert config.loss.head_weights is not None
    assert len(config.loss.head_weights) == 4


def test_small_brats_configuration_trains_on_data_in_the_fets_layout(tmp_path: Path) -> None:
    table = make_fets(tmp_path / "in", {4: 3, 5: 3}, shape=(16, 16, 16))
    invoke("fets", tmp_path / "in", "--partition", table, "--out", tmp_path / "x.json", "--institutions", "4,5")
    changes = [f"data.datalist={tmp_path / 'x.json'}", f"output.folder={tmp_path / 'run'}", "output.num_overlays=0"]
    changes += ["data.resize=null", "data.patch_size=[16, 16, 16]", "evaluation.window_size=null"]
    changes += ["federation.rounds=2", "federation.local_steps=1", "resources.pool=local", "tracking.enabled=false"]
    config = load_config(ROOT / "configs" / "brats_small.yaml", changes)
    summary = run_federation(config, listener=NullListener(), stop=threading.Event())
    assert summary.status == "finished"
    assert sorted(site_dice(summary.evaluations, PERSONALISED)) == ["inst04", "inst05"]
