"""``gcml evaluate`` through typer, on the tiny federation of ``tests/makers.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import Result

from gcml_ray.config import Config
from gcml_ray.data.datalist import read_datalist, write_datalist
from gcml_ray.errors import ConfigError, DataError
from tests.model_files import save_volume, write_run
from tests.unit.test_cli_predict import gcml, rows


def references_as_predictions(config: Config, folder: Path, *, sites: str = "AB", flat: bool = False) -> None:
    """Perfect predictions: copies of the test cases' labels."""
    for case in read_datalist(config.data.datalist):
        if case.split == "test" and case.site in sites:
            target = folder / ("" if flat else case.site) / f"{case.name}.nii"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(case.label).read_bytes())


def evaluate_out(config: Config, *words: object) -> Result:
    folder = Path(config.output.folder)
    given = ("--predictions", folder.parent / "out", "--datalist", config.data.datalist)
    return gcml("evaluate", "--run", folder, *given, *words)


def test_references_score_one_at_every_site(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out")
    result = evaluate_out(config, "--split", "test", "--out", tmp_path / "s.csv")
    assert result.exit_code == 0, result.output
    assert [(row["site"], row["split"], row["dice"], row["hd95"]) for row in rows(tmp_path / "s.csv")] == [
        ("A", "test", "1.0", "0.0"),
        ("B", "test", "1.0", "0.0"),
    ]


def test_one_site_may_lie_in_the_folder_itself(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out", sites="B", flat=True)
    result = evaluate_out(config, "--site", "B", "--split", "test")
    assert "1 scored, 0 failed, 0 without" in result.output


def test_file_that_two_sites_would_share_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out", flat=True)
    assert (tmp_path / "out" / "c4.nii").is_file()  # of A's test case; B has a training case of that name
    result = evaluate_out(config)
    assert isinstance(result.exception, DataError)
    assert f"{tmp_path / 'out' / 'c4.nii'} would be scored as the prediction of the sites A, B" in str(result.exception)
    assert "--site, or put each site's files into a folder of its own" in str(result.exception)
    assert "1 scored, 0 failed" in evaluate_out(config, "--site", "A").output


def test_missing_prediction_fails_only_where_a_split_was_asked_for(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out", sites="A")
    asked, open_ended = evaluate_out(config, "--split", "test"), evaluate_out(config)
    assert "without a prediction: B/c5" in asked.output
    assert (asked.exit_code, open_ended.exit_code) == (1, 0)
    assert "1 scored, 0 failed, 10 without a prediction" in open_ended.output


def test_prediction_on_another_grid_fails_and_the_rest_is_scored(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out")
    save_volume(tmp_path / "out" / "A" / "c4.nii", np.zeros((3, 3, 3), np.uint8))
    result = evaluate_out(config, "--split", "test")
    assert "failed: c4 (site A)" in result.output
    assert "shape (3, 3, 3)" in result.output
    assert "1 scored, 1 failed" in result.output
    assert result.exit_code == 1


def test_predictions_stored_on_other_axes_are_turned_before_they_are_scored(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out")
    for path in (tmp_path / "out").glob("*/*.nii"):
        volume = nibabel.load(path)
        mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
        mirror[0, 3] = volume.shape[0] - 1
        save_volume(path, np.asarray(volume.dataobj)[::-1].copy(), volume.affine @ mirror)
    result = evaluate_out(config, "--split", "test", "--out", tmp_path / "s.csv")
    assert "another affine" not in result.output
    assert [row["dice"] for row in rows(tmp_path / "s.csv")] == ["1.0", "1.0"]


def test_region_files_on_axes_of_their_own_are_turned_each(tmp_path: Path) -> None:
    labels = {"background": 0, "box": 1, "rim": 2}
    regions = {"all": ["box", "rim"], "inner": ["box", "rim"]}
    config = write_run(tmp_path, data={"labels": labels, "regions": regions})
    for case in read_datalist(config.data.datalist):
        volume: Any = nibabel.load(case.label)
        mask, mirror = np.asarray(volume.dataobj) > 0, np.diag([-1.0, 1.0, 1.0, 1.0])
        mirror[0, 3] = mask.shape[0] - 1
        (tmp_path / "out" / case.site).mkdir(parents=True, exist_ok=True)
        for name, array, affine in (("all", mask, volume.affine), ("inner", mask[::-1], volume.affine @ mirror)):
            save_volume(tmp_path / "out" / case.site / f"{case.name}_{name}.nii", array.astype(np.uint8), affine)
    result = evaluate_out(config, "--split", "test", "--out", tmp_path / "s.csv")
    assert result.exit_code == 0, result.output
    assert {row["dice"] for row in rows(tmp_path / "s.csv")} == {"1.0"}


def test_region_files_are_scored_a_region(tmp_path: Path) -> None:
    """One region whole, the other left out: Dice 1, and 0 against the reference."""
    labels = {"background": 0, "box": 1, "rim": 2}
    config = write_run(tmp_path, data={"labels": labels, "regions": {"all": ["box", "rim"], "inner": ["box", "rim"]}})
    for case in read_datalist(config.data.datalist):
        if case.split == "test":
            reference = np.asarray(nibabel.load(case.label).dataobj)
            save_volume(tmp_path / "out" / case.site / f"{case.name}_all.nii.gz", reference)
            save_volume(tmp_path / "out" / case.site / f"{case.name}_inner.nii.gz", np.zeros_like(reference))
    result = evaluate_out(config, "--split", "test", "--out", tmp_path / "s.csv")
    assert result.exit_code == 0, result.output
    scores = [(row["class_name"], row["dice"], row["hd95"]) for row in rows(tmp_path / "s.csv") if row["site"] == "A"]
    assert scores == [("all", "1.0", "0.0"), ("inner", "0.0", "")]


def test_cases_of_another_list_count_as_test_cases(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out", sites="A")
    cases = [replace(case, split=None) for case in read_datalist(config.data.datalist) if case.split == "test"]
    write_datalist(tmp_path / "new.json", cases, description="new patients")
    result = evaluate_out(config, "--datalist", tmp_path / "new.json", "--out", tmp_path / "s.csv")
    assert result.exit_code == 0, result.output
    assert [row["split"] for row in rows(tmp_path / "s.csv")] == ["test"]


def test_nothing_to_score_is_a_failure(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "out").mkdir()
    result = evaluate_out(config)
    assert "0 scored, 0 failed, 11 without a prediction" in result.output
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--site", "Z"), "no case is of site Z; sites are A, B"), (("--predictions", "nowhere"), "no such folder")],
)
def test_wrong_input_of_evaluate_is_an_error(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    config = write_run(tmp_path)
    (tmp_path / "out").mkdir()
    result = evaluate_out(config, *words)
    assert isinstance(result.exception, DataError)
    assert message in str(result.exception)


def test_a_place_for_the_scores_that_cannot_be_written_is_told_before_they_are_made(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    references_as_predictions(config, tmp_path / "out")
    (tmp_path / "file").write_text("in the way")
    result = evaluate_out(config, "--out", tmp_path / "file" / "s.csv")
    assert isinstance(result.exception, ConfigError)
    assert "--out: " in str(result.exception)
    assert "scored" not in result.output
