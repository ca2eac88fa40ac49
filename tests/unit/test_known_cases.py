"""No case of a run goes from one split to another, whatever becomes of the datalist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gcml_ray.data.datalist import Case
from gcml_ray.errors import CheckpointError, DataError
from gcml_ray.records import Split
from gcml_ray.training.known_cases import (
    CASES_FILE,
    CHUNK_BYTES,
    check_splits,
    content_key,
    keep_cases,
    known_cases,
    warn_of_changed_images,
)
from tests.makers import make_config
from tests.trainer_runs import make_trainer, order


def case(name: str, split: Split) -> Case:
    return Case("A", name, (f"{name}.nii.gz",), f"{name}_label.nii.gz", split)


def image(name: str) -> str:
    """What such a case's image is known by."""
    return f"image {Path(f'{name}.nii.gz').resolve()}"


def test_an_image_that_comes_back_by_a_link_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "here")
    first, again = (
        replace(case(name, split), images=(str(tmp_path / folder / "a.nii.gz"),))
        for name, folder, split in (("a", "here", "train"), ("b", "there", "test"))
    )
    keep_cases(tmp_path, [first], anew=True)
    with pytest.raises(DataError, match=r"case b \(.*there/a.nii.gz\): was train, is test"):
        check_splits(tmp_path, [again], source="list.json")


def test_a_case_that_moves_is_refused_by_name(tmp_path: Path) -> None:
    keep_cases(tmp_path, [case("a", "train"), case("b", "test")], anew=True)
    with pytest.raises(DataError, match=r"(?s)1 case.*site A, case a: was train, is test"):
        check_splits(tmp_path, [case("a", "test"), case("b", "test")], source="list.json")


def test_cases_may_come_and_go_but_not_come_back_elsewhere(tmp_path: Path) -> None:
    keep_cases(tmp_path, [case("a", "train")], anew=True)
    keep_cases(tmp_path, [case("b", "test")], anew=False)
    known = {"A/a": "train", image("a"): "train", "A/b": "test", image("b"): "test"}
    assert known_cases(tmp_path) == known
    with pytest.raises(DataError, match="case a"):
        check_splits(tmp_path, [case("a", "validation")], source="list.json")


def test_a_run_that_starts_anew_forgets_what_was_written_before(tmp_path: Path) -> None:
    keep_cases(tmp_path, [case("a", "train")], anew=True)
    keep_cases(tmp_path, [case("a", "test")], anew=True)
    assert known_cases(tmp_path) == {"A/a": "test", image("a"): "test"}


def test_images_that_two_cases_exchange_are_found(tmp_path: Path) -> None:
    first, second = case("a", "train"), case("b", "test")
    keep_cases(tmp_path, [first, second], anew=True)
    exchanged = [replace(first, images=second.images), replace(second, images=first.images)]
    with pytest.raises(
        DataError, match=r"(?s)2 case.*case a \(b.nii.gz\): was test, is train.*case b \(a.nii.gz\): was"
    ):
        check_splits(tmp_path, exchanged, source="list.json")


def test_case_with_a_new_name_is_known_by_its_images(tmp_path: Path) -> None:
    keep_cases(tmp_path, [case("a", "train")], anew=True)
    with pytest.raises(DataError, match=r"case new \(a.nii.gz\): was train, is test"):
        check_splits(tmp_path, [replace(case("a", "test"), name="new")], source="list.json")


def stored(folder: Path, name: str, split: Split, content: bytes) -> Case:
    path = folder / f"{name}.nii.gz"
    path.write_bytes(content)
    return replace(case(name, split), images=(str(path),))


def test_a_copy_of_a_training_image_is_no_test_case(tmp_path: Path) -> None:
    keep_cases(tmp_path, [stored(tmp_path, "a", "train", b"one")], anew=True)
    with pytest.raises(DataError, match=r"case b \(what its images hold\): was train, is test"):
        check_splits(tmp_path, [stored(tmp_path, "b", "test", b"one")], source="list.json")
    check_splits(tmp_path, [stored(tmp_path, "b", "test", b"two")], source="list.json")


def test_files_that_two_cases_exchange_are_found(tmp_path: Path) -> None:
    keep_cases(tmp_path, [stored(tmp_path, "a", "train", b"one"), stored(tmp_path, "b", "test", b"two")], anew=True)
    exchanged = [stored(tmp_path, "a", "train", b"two"), stored(tmp_path, "b", "test", b"one")]
    with pytest.raises(DataError, match=r"(?s)2 case.*case a \(what its images hold\): was test, is train"):
        check_splits(tmp_path, exchanged, source="list.json")


def test_images_that_hold_something_else_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = stored(tmp_path, "a", "train", b"one")
    keep_cases(tmp_path, [first], anew=True)
    warn_of_changed_images(tmp_path, [first, stored(tmp_path, "b", "train", b"added")])
    assert not caplog.text
    warn_of_changed_images(tmp_path, [stored(tmp_path, "a", "train", b"two")])
    assert "1 case has images that are not as when the run began: a." in caplog.text


def test_copies_in_two_splits_from_the_start_are_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = [stored(tmp_path, name, split, b"one") for name, split in (("a", "train"), ("b", "test"))]
    cases.append(stored(tmp_path, "c", "train", b"two"))
    keep_cases(tmp_path, cases, anew=True)
    check_splits(tmp_path, cases, source="list.json")
    warn_of_changed_images(tmp_path, cases)
    assert not caplog.text


def test_what_a_large_file_holds_is_known_by_its_ends_and_its_middle(tmp_path: Path) -> None:
    whole = bytes(10 * CHUNK_BYTES)
    keys = {content_key(stored(tmp_path, "a", "train", whole))}
    for place in (0, 5 * CHUNK_BYTES, len(whole) - 1):
        keys.add(content_key(stored(tmp_path, "a", "train", whole[:place] + b"1" + whole[place + 1 :])))
    keys.add(content_key(stored(tmp_path, "a", "train", whole + b"0")))
    assert len(keys) == 5
    assert content_key(case("gone", "train")) == ""


def test_image_of_two_cases_in_different_splits_does_not_stop_a_resume(tmp_path: Path) -> None:
    cases = [case("a", "train"), replace(case("a", "test"), name="b")]
    keep_cases(tmp_path, cases, anew=True)
    check_splits(tmp_path, cases, source="list.json")


def test_a_folder_without_a_list_knows_nothing_and_a_damaged_list_is_named(tmp_path: Path) -> None:
    check_splits(tmp_path, [case("a", "test")], source="list.json")
    (tmp_path / CASES_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=CASES_FILE):
        check_splits(tmp_path, [case("a", "test")], source="list.json")


def test_a_list_that_has_grown_does_not_score_training_cases(tmp_path: Path) -> None:
    keep_cases(tmp_path, [case("a", "train")], anew=True)
    with pytest.raises(DataError, match=r"(?s)list.json: 1 case.*was train, is test"):
        check_splits(tmp_path, [case("a", "test")], source="list.json")


def test_a_site_goes_on_with_the_cases_it_had_or_not_at_all(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    trainer = make_trainer(config)
    trainer.train_round(order(1), [])
    folder = trainer.files.folder
    known = known_cases(folder)
    assert set(known.values()) >= {"train", "validation"}
    make_trainer(config, resume_round=1)
    name = next(name for name, split in known.items() if split == "train")
    (folder / CASES_FILE).write_text(
        (folder / CASES_FILE).read_text().replace(f'"{name}": "train"', f'"{name}": "test"')
    )
    with pytest.raises(DataError, match="was test, is train"):
        make_trainer(config, resume_round=1)
