from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gcml_ray.config import DataConfig
from gcml_ray.data.image_cases import FoundCases, cases_from_files, find_cases
from gcml_ray.errors import ConfigError, DataError


def data(*channels: str, **changes: Any) -> DataConfig:
    values = {
        "datalist": "x.json",
        "channels": channels or ("ct",),
        "labels": {"background": 0, "lesion": 1},
        "spacing_is_real": True,
        "patch_size": (8, 8, 8),
    }
    return DataConfig(**(values | changes))


def found(config: DataConfig, *names: str) -> FoundCases:
    return cases_from_files([Path("/in") / name for name in names], config, site="A")


def shown(result: FoundCases) -> dict[str, list[str]]:
    """Case name to its files' names."""
    return {case.name: [Path(image).name for image in case.images] for case in result.cases}


# --- names


def test_channel_names_put_a_case_together_in_the_order_of_the_configuration() -> None:
    result = found(data("t1", "flair"), "p1_flair.nii.gz", "p1_t1.nii.gz", "p2_t1.nii", "p2_flair.nii")
    assert shown(result) == {"p1": ["p1_t1.nii.gz", "p1_flair.nii.gz"], "p2": ["p2_t1.nii", "p2_flair.nii"]}
    assert {case.site for case in result.cases} == {"A"}


def test_numbers_put_a_case_together() -> None:
    result = found(data("t1", "flair"), "p1_0001.nii.gz", "p1_0000.nii.gz")
    assert shown(result) == {"p1": ["p1_0000.nii.gz", "p1_0001.nii.gz"]}


def test_single_channel_number_is_not_part_of_the_name() -> None:
    assert shown(found(data(), "p1_0000.nii.gz", "p2_0000.nii.gz")) == {
        "p1": ["p1_0000.nii.gz"],
        "p2": ["p2_0000.nii.gz"],
    }


def test_numbers_beyond_the_channels_count_cases() -> None:
    assert list(shown(found(data(), "lung_0000.nii.gz", "lung_0007.nii.gz"))) == ["lung_0000", "lung_0007"]


def test_any_other_file_is_a_whole_case() -> None:
    assert shown(found(data("t1", "flair"), "p1.nii.gz")) == {"p1": ["p1.nii.gz"]}


def test_longest_channel_name_wins() -> None:
    result = found(data("t1", "ce_t1"), "p1_ce_t1.nii", "p1_t1.nii")
    assert shown(result) == {"p1": ["p1_t1.nii", "p1_ce_t1.nii"]}


def test_missing_channel_is_named_and_other_cases_are_kept() -> None:
    result = found(data("t1", "flair"), "p1_t1.nii", "p2.nii")
    assert list(shown(result)) == ["p2"]
    assert len(result.problems) == 1
    assert "p1: channel flair is missing beside /in/p1_t1.nii" in result.problems[0]


def test_channel_in_other_letters_is_told_how_to_be_called() -> None:
    result = found(data("t1", "flair"), "b_T1.nii.gz", "b_FLAIR.nii.gz", "c.nii.gz")
    assert list(shown(result)) == ["c"]
    assert [problem.partition(":")[0] for problem in result.problems] == ["b_T1", "b_FLAIR"]
    assert all("call the files b_t1, b_flair, or b_0000, b_0001" in problem for problem in result.problems)


def test_single_channel_in_other_letters_is_a_case_of_its_own() -> None:
    assert list(shown(found(data("ct"), "b_CT.nii.gz"))) == ["b_CT"]


@pytest.mark.parametrize("names", [("p1.nii", "p1.nii.gz"), ("p1.nii", "p1_t1.nii"), ("p1_t1.nii", "p1_t1.nii.gz")])
def test_two_files_in_one_place_are_a_problem(names: tuple[str, str]) -> None:
    result = found(data("t1", "flair"), *names)
    assert result.cases == ()
    assert all(f"/in/{name}" in result.problems[0] for name in names)
    assert "claim the same place" in result.problems[0]


# --- folders


def test_folder_gives_its_images_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii", "notes.txt", "picture.png", ".hidden.nii"):
        (tmp_path / name).touch()
    result = find_cases([tmp_path], data(), site="A", split=None)
    assert shown(result) == {"a": ["a.nii"], "b": ["b.nii.gz"]}


def test_files_and_folders_mix(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/a.nii", "b.nii"):
        (tmp_path / name).touch()
    assert list(shown(find_cases([tmp_path / "in", tmp_path / "b.nii"], data(), site="A", split=None))) == ["a", "b"]


def test_folder_without_images_and_missing_path_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no image .*sub-folders are not searched"):
        find_cases([tmp_path], data(), site="A", split=None)
    with pytest.raises(DataError, match="no such file or folder"):
        find_cases([tmp_path / "x.nii"], data(), site="A", split=None)


# --- datalists


def datalist(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps({"cases": list(entries)}))
    return path


def test_datalist_of_new_patients_needs_neither_site_nor_label(tmp_path: Path) -> None:
    path = datalist(tmp_path, {"image": "p1.nii.gz"}, {"image": ["x_t1.nii", "x_t2.nii"], "case": "x"})
    result = find_cases([path], data(), site="A", split=None)
    assert [(case.name, case.site, case.label) for case in result.cases] == [("p1", "A", ""), ("x", "A", "")]
    assert result.cases[0].images == (str(tmp_path / "p1.nii.gz"),)


def test_cases_of_other_sites_are_left_out_with_a_note(tmp_path: Path) -> None:
    path = datalist(tmp_path, {"image": "p1.nii", "site": "A"}, {"image": "p2.nii", "site": "B"}, {"image": "p3.nii"})
    result = find_cases([path], data(), site="A", split=None)
    assert list(shown(result)) == ["p1", "p3"]
    assert "1 case of other sites" in result.notes[0]
    with pytest.raises(DataError, match=r"holds 1 case, none of site A; sites are B"):
        find_cases([datalist(tmp_path, {"image": "p2.nii", "site": "B"})], data(), site="A", split=None)


def test_split_takes_the_cases_that_training_gave_it(tmp_path: Path) -> None:
    """Ten cases without a split: 10 % validation is one, 20 % test is two."""
    path = datalist(tmp_path, *({"image": f"p{i}.nii", "site": "A"} for i in range(10)))
    sizes = {split: len(find_cases([path], data(), site="A", split=split).cases) for split in ("validation", "test")}  # type: ignore[arg-type]
    assert sizes == {"validation": 1, "test": 2}


def test_split_without_its_cases_is_an_error(tmp_path: Path) -> None:
    path = datalist(tmp_path, {"image": "p1.nii", "site": "A", "split": "train"})
    with pytest.raises(DataError, match="site A has no test case"):
        find_cases([path], data(), site="A", split="test")


def test_case_named_twice_with_and_without_its_site_is_an_error(tmp_path: Path) -> None:
    path = datalist(tmp_path, {"image": "p1.nii", "site": "A"}, {"image": "p1.nii"})
    with pytest.raises(DataError, match="case p1 is listed 2 times"):
        find_cases([path], data(), site="A", split=None)


def test_inputs_that_would_be_ignored_are_errors(tmp_path: Path) -> None:
    path = datalist(tmp_path, {"image": "p1.nii"})
    with pytest.raises(ConfigError, match="give a datalist alone"):
        find_cases([path, tmp_path], data(), site="A", split=None)
    with pytest.raises(ConfigError, match="--split test would be ignored"):
        find_cases([tmp_path], data(), site="A", split="test")
