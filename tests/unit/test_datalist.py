import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gcml_ray.config import DataConfig, SplitConfig
from gcml_ray.data.contract import data_contract
from gcml_ray.data.datalist import (
    Case,
    assign_splits,
    cases_of_site,
    check_files,
    listed,
    read_datalist,
    site_names,
    write_datalist,
)
from gcml_ray.errors import DataError


def write_json(folder: Path, content: Any) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(content))
    return path


def make_cases(site: str, count: int) -> tuple[Case, ...]:
    return tuple(
        Case(site, f"c{i:02d}", (f"/d/{site}{i}.nii.gz",), f"/d/{site}{i}_seg.nii.gz", None) for i in range(count)
    )


def num_by_split(cases: tuple[Case, ...]) -> dict[str | None, int]:
    return {split: sum(case.split == split for case in cases) for split in ("train", "validation", "test")}


# --- reading and writing


def test_list_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """As Windows editors write it."""
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"cases": [{"site": "A", "image": "a.nii", "label": "b.nii"}]}), encoding="utf-8-sig")
    assert site_names(read_datalist(path)) == ("A",)


def test_paths_are_relative_to_the_datalists_folder(tmp_path: Path) -> None:
    path = write_json(tmp_path, {"cases": [{"site": "A", "image": "i/x.nii.gz", "label": "../s/x_seg.nii.gz"}]})
    (case,) = read_datalist(path)
    assert case.images == (str(tmp_path / "i" / "x.nii.gz"),)
    assert case.label == str(tmp_path.parent / "s" / "x_seg.nii.gz")


@pytest.mark.parametrize("image", ["seg.nii", ["t1.nii", "./seg.nii"]])
def test_an_image_that_is_its_own_label_is_refused(tmp_path: Path, image: object) -> None:
    path = write_json(tmp_path, {"cases": [{"site": "A", "image": image, "label": "seg.nii"}]})
    with pytest.raises(DataError, match=r"entry 0: its image and its label are one file, 'seg\.nii'"):
        read_datalist(path)


def test_case_name_defaults_to_the_labels_file_name(tmp_path: Path) -> None:
    entries = [{"site": "A", "image": label[2], "label": label} for label in ("l/p.01.nii.gz", "l/q.png")]
    assert [case.name for case in read_datalist(write_json(tmp_path, {"cases": entries}))] == ["p.01", "q"]


def test_decathlon_key_training_is_accepted(tmp_path: Path) -> None:
    path = write_json(tmp_path, {"name": "x", "training": [{"site": "A", "image": ["a", "b"], "label": "l"}]})
    assert len(read_datalist(path)[0].images) == 2


def test_all_wrong_entries_are_reported_at_once_with_index(tmp_path: Path) -> None:
    good = {"site": "A", "image": "x", "label": "l"}
    entries = [
        {"image": "x", "label": "l"},
        good,
        {**good, "lable": "m"},
        {**good, "split": "val"},
        {**good, "image": []},
        {**good, "label_threshold": "127"},
        "text",
        {**good, "site": "a/b"},
    ]
    with pytest.raises(DataError) as caught:
        read_datalist(write_json(tmp_path, {"cases": entries}))
    message = str(caught.value)
    assert "list.json" in message
    for expected in (
        "entry 0: `site` is missing",
        "entry 2: unknown key 'lable'",
        "entry 3: `split` must be one of train, validation, test, got 'val'",
        "entry 4: `image` must be one path or a list",
        "entry 5: `label_threshold` must be a number",
        "entry 6: is 'text'",
        "entry 7: `site` is 'a/b'",
    ):
        assert expected in message
    assert "entry 1:" not in message


def test_duplicate_case_in_a_site_is_an_error_but_not_across_sites(tmp_path: Path) -> None:
    entry = {"site": "A", "case": "p1", "image": "x", "label": "l"}
    assert len(read_datalist(write_json(tmp_path, {"cases": [entry, {**entry, "site": "B", "image": "y"}]}))) == 2
    with pytest.raises(DataError, match=r"site A: case p1 is listed 2 times \(entry 0, entry 1\)"):
        read_datalist(write_json(tmp_path, {"cases": [entry, entry]}))


@pytest.mark.parametrize("splits", [(None, None), ("train", "test"), ("test", None)])
def test_image_of_two_cases_that_could_train_and_test_is_an_error(tmp_path: Path, splits: tuple[Any, Any]) -> None:
    """A slip of copy and paste: the second case lists the first one's image, which any copy of its path finds."""
    paths = ("x.nii", f"../{tmp_path.name}/./x.nii")
    cases = [
        {"site": site, "case": site, "image": path, "label": "l"} | ({"split": split} if split else {})
        for site, path, split in zip("AB", paths, splits, strict=True)
    ]
    with pytest.raises(DataError, match=r"x.nii is an image of 2 cases \(A/A, B/B\): one may be trained on"):
        read_datalist(write_json(tmp_path, {"cases": cases}))


def test_image_of_two_cases_by_a_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "here")
    cases = [{"site": site, "image": f"{place}/x.nii", "label": "l"} for site, place in (("A", "here"), ("B", "there"))]
    with pytest.raises(DataError, match=r"here/x.nii is an image of 2 cases"):
        read_datalist(write_json(tmp_path, {"cases": cases}))


def test_image_with_the_labels_of_two_readers_may_be_trained_on_twice(tmp_path: Path) -> None:
    case = {"site": "A", "image": "x.nii", "split": "train"}
    cases = [case | {"case": name, "label": f"{name}.nii"} for name in ("first", "second")]
    assert len(read_datalist(write_json(tmp_path, {"cases": cases}))) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cases": []}, "at least one case"),
        ({"files": []}, "needs `cases`"),
        ({"cases": [1], "training": [1]}, "not both"),
        ([1], "holds a list"),
    ],
)
def test_wrong_outer_shape_is_named(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_datalist(write_json(tmp_path, content))


def test_file_that_is_not_json_or_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=r"bad\.json: cannot be read as JSON"):
        read_datalist(tmp_path / "bad.json")
    (tmp_path / "bad.csv").write_text("site,image")
    with pytest.raises(DataError, match=r"bad\.csv: cannot be read as JSON .*`gcml prepare manifest`"):
        read_datalist(tmp_path / "bad.csv")
    with pytest.raises(DataError, match="no such datalist"):
        read_datalist(tmp_path / "none.json")


def test_lists_that_would_be_ignored_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"site": "A", "image": "x", "label": "l"}
    read_datalist(write_json(tmp_path, {"training": [entry], "validation": [entry]}))
    assert "`validation` is not read" in caplog.text


def test_write_then_read_gives_the_same_cases(tmp_path: Path) -> None:
    near = Case(
        "A", "p", (str(tmp_path / "d/a.nii.gz"), str(tmp_path / "d/b.nii.gz")), str(tmp_path / "s.png"), "test", 127.0
    )
    far = Case("B", "q", ("/elsewhere/far/away/x.png",), "/elsewhere/far/away/y.png", None)
    write_datalist(tmp_path / "out" / "list.json", (near, far), description="two cases")
    assert read_datalist(tmp_path / "out" / "list.json") == (near, far)
    content = json.loads((tmp_path / "out" / "list.json").read_text())
    assert content["cases"][0]["image"] == ["../d/a.nii.gz", "../d/b.nii.gz"]
    assert content["cases"][1]["image"] == "/elsewhere/far/away/x.png"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["list.json"]


def test_missing_files_are_reported_together_and_counted_beyond_twenty(tmp_path: Path) -> None:
    cases = make_cases("A", 15)
    with pytest.raises(DataError, match=r"(?s)30 file\(s\).*site A, case c00.*and 10 more") as caught:
        check_files(cases)
    assert str(caught.value).count("\n  - site A") == 20
    (tmp_path / "x").touch()
    check_files([Case("A", "c", (str(tmp_path / "x"),), str(tmp_path / "x"), None)])


def test_sites_are_sorted_and_cases_selected() -> None:
    cases = (*make_cases("B", 1), *make_cases("A", 2))
    assert site_names(cases) == ("A", "B")
    assert cases_of_site(cases, "A") == cases[1:]


# --- splits


def test_split_sizes_are_the_rounded_shares() -> None:
    """20 cases: round(0.1 * 20) = 2 validation, round(0.2 * 20) = 4 test, 14 left."""
    split = assign_splits(make_cases("A", 20), SplitConfig(validation=0.1, test=0.2))
    assert num_by_split(split) == {"train": 14, "validation": 2, "test": 4}


@pytest.mark.parametrize("count", [3, 4, 5, 6])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.45, 0.5), (0.05, 0.9), (0.9, 0.05)])
def test_every_site_keeps_one_case_of_each(count: int, shares: tuple[float, float]) -> None:
    split = assign_splits(make_cases("A", count), SplitConfig(validation=shares[0], test=shares[1]))
    assert min(num_by_split(split).values()) >= 1


def test_splits_depend_neither_on_order_nor_on_other_sites() -> None:
    cases = make_cases("A", 12)
    alone = {case.name: case.split for case in assign_splits(cases, SplitConfig())}
    mixed = assign_splits((*make_cases("B", 5), *reversed(cases)), SplitConfig())
    assert {case.name: case.split for case in cases_of_site(mixed, "A")} == alone
    assert [case.name for case in mixed[5:]] == [case.name for case in reversed(cases)]


def test_explicit_splits_stay_and_count_towards_the_shares() -> None:
    """10 cases, 2 of them explicitly test = the whole test share: 1 validation and 7 train remain."""
    cases = make_cases("A", 10)
    cases = (*(replace(case, split="test") for case in cases[:2]), *cases[2:])
    split = assign_splits(cases, SplitConfig(validation=0.1, test=0.2))
    assert [case.split for case in split[:2]] == ["test", "test"]
    assert num_by_split(split) == {"train": 7, "validation": 1, "test": 2}


def test_sites_that_are_too_small_are_all_named() -> None:
    with pytest.raises(DataError, match=r"(?s)site A has 2 case\(s\) \(c00, c01\).*site B has 1 case"):
        assign_splits((*make_cases("A", 2), *make_cases("B", 1), *make_cases("C", 3)), SplitConfig())


def test_explicit_splits_that_leave_one_empty_are_an_error() -> None:
    cases = tuple(replace(case, split="train") for case in make_cases("A", 5))
    with pytest.raises(DataError, match=r"site A: the explicit splits .* no case for validation, test"):
        assign_splits(cases, SplitConfig())


# --- contract

DATA = DataConfig(
    datalist="a.json",
    channels=("t1", "flair"),
    labels={"background": 0, "tumour": 1},
    spacing_is_real=False,
    patch_size=(8, 8, 8),
)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": ("flair", "t1")},
        {"labels": {"background": 0, "tumour": 2}},
        {"regions": {"whole": ("tumour",)}},
        {"orientation": "LPS"},
        {"normalise": "all"},
        {"resize": (16, 16, 16)},
        {"spacing_is_real": True, "target_spacing_mm": (1.0, 1.0, 1.0)},
    ],
)
def test_contract_changes_with_what_gives_channels_their_meaning(change: dict[str, Any]) -> None:
    changed = DataConfig(**(DATA.model_dump() | change))
    assert data_contract(changed) != data_contract(DATA)


def test_contract_ignores_paths_patches_and_augmentation() -> None:
    changed = DataConfig(**(DATA.model_dump() | {"datalist": "b.json", "patch_size": (4, 4, 4), "batch_size": 9}))
    assert data_contract(changed) == data_contract(DATA)


def test_what_is_said_of_several_places_stands_once() -> None:
    problems = ["line 2: no site", "line 3: no site", "line 4: no image", "site A, case x: no site", "whole"]
    assert listed(problems).split("\n  - ")[1:] == ["line 2 (and 2 more): no site", "line 4: no image", "whole"]
