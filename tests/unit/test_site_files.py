"""A site's files where one of them is damaged."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError, DamagedError
from gcml_ray.model.checkpoint import round_file, save_model, save_round, saved_rounds
from gcml_ray.model.learner import Learner
from gcml_ray.records import PERSONALISED
from gcml_ray.training.site_files import SiteFiles
from tests.makers import make_config
from tests.unit.test_checkpoint import make_learner


def files_of(config: Config, folder: Path) -> SiteFiles:
    return SiteFiles(config, "A", folder)


def saved(config: Config, folder: Path, *rounds: int) -> None:
    """Checkpoints of these rounds, whose weights are the round's number."""
    for number in rounds:
        learner = make_learner()
        learner.model.flat.fill_(float(number))
        save_round(folder, learner, replace(files_of(config, folder).state, round_number=number))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def restored(config: Config, folder: Path, *, resume_round: int) -> tuple[Learner, SiteFiles]:
    learner, files = make_learner(), files_of(config, folder)
    files.restore(learner, None, resume_round=resume_round)
    return learner, files


def test_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path)
    saved(config, tmp_path / "A", 3, 4)
    cut_short(round_file(tmp_path / "A", 4))
    with caplog.at_level(logging.WARNING):
        learner, files = restored(config, tmp_path / "A", resume_round=4)
    assert set(learner.model.flat.tolist()) == {3.0}
    assert files.state.round_number == 3
    assert saved_rounds(tmp_path / "A") == [3]
    assert (tmp_path / "A" / "round_00004.damaged").exists()
    assert "site A goes on from the checkpoint before round 4" in caplog.text


def test_damaged_checkpoint_with_none_before_it_is_an_error_and_stays_where_it_is(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    saved(config, tmp_path / "A", 3, 4)
    for number in (3, 4):
        cut_short(round_file(tmp_path / "A", number))
    with pytest.raises(DamagedError, match=r"round_00003.*There is no older checkpoint of site A"):
        restored(config, tmp_path / "A", resume_round=4)
    assert saved_rounds(tmp_path / "A") == [3, 4]


def with_best_model(config: Config, folder: Path) -> SiteFiles:
    """A site whose best model is that of round 3, of threes, and was kept by a test."""
    learner, files = make_learner(), files_of(config, folder)
    learner.model.flat.fill_(3.0)
    files.advance(3, learner, dice=0.5, is_best=True)
    files.keep_personalised()
    return files


@pytest.mark.parametrize("is_gone", [True, False])
def test_lost_best_model_is_taken_from_what_an_earlier_test_has_kept(
    tmp_path: Path, is_gone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files, learner = with_best_model(make_config(tmp_path), tmp_path / "A"), make_learner()
    best = tmp_path / "A" / files.state.best_file
    best.unlink() if is_gone else cut_short(best)
    assert files.load(PERSONALISED, learner.model) == 3
    assert set(learner.model.flat.tolist()) == {3.0}
    assert "site A takes personalised.safetensors, which an earlier test has kept" in caplog.text
    caplog.clear()
    assert files.load(PERSONALISED, learner.model) == 3  # it is whole again
    assert not caplog.records


def test_kept_model_of_another_round_does_not_take_the_place_of_the_best_one(tmp_path: Path) -> None:
    files = with_best_model(make_config(tmp_path), tmp_path / "A")
    kept, best = tmp_path / "A" / "personalised.safetensors", tmp_path / "A" / files.state.best_file
    facts = {"site": "A", "round": "2"}
    best.unlink()
    kept.unlink()
    save_model(kept, make_learner().model, facts=facts)
    with pytest.raises(CheckpointError, match=r"personalised\.safetensors is the model of site A, round 2"):
        files.load(PERSONALISED, make_learner().model)
    assert not best.exists()


def test_best_model_that_is_lost_for_good_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    files = with_best_model(make_config(tmp_path), tmp_path / "A")
    (tmp_path / "A" / "personalised.safetensors").unlink()
    cut_short(tmp_path / "A" / files.state.best_file)
    with pytest.raises(CheckpointError, match=r"personalised model of site A is lost: .*Bring the file back"):
        files.load(PERSONALISED, make_learner().model)


def test_damaged_checkpoint_that_the_driver_still_counts_on_is_passed_over_again(tmp_path: Path) -> None:
    """It was put aside in a start after which the driver did not live to write down the round before it."""
    config = make_config(tmp_path)
    saved(config, tmp_path / "A", 3, 4)
    cut_short(round_file(tmp_path / "A", 4))
    for _ in range(2):
        _, files = restored(config, tmp_path / "A", resume_round=4)
        assert files.state.round_number == 3


def test_lost_newest_checkpoint_is_passed_over_where_one_shortly_before_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path)
    saved(config, tmp_path / "A", 3, 4, 5)
    round_file(tmp_path / "A", 5).unlink()
    _, files = restored(config, tmp_path / "A", resume_round=5)
    assert files.state.round_number == 4
    assert "site A goes on from its checkpoint of round 4: that of round 5 is not in" in caplog.text
    with pytest.raises(CheckpointError, match=r"no checkpoint of round 8 in .*found \[3, 4\]"):
        restored(config, tmp_path / "A", resume_round=8)


def test_start_takes_away_what_a_broken_write_has_left(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    saved(config, tmp_path / "A", 3)
    for name in ("round_00004.tmp", ".tmpr2TIxQ"):  # ours, and that of safetensors
        (tmp_path / "A" / name).write_bytes(b"half")
    restored(config, tmp_path / "A", resume_round=3)
    assert [path.name for path in (tmp_path / "A").iterdir()] == ["round_00003.safetensors"]


def test_checkpoint_of_another_configuration_is_no_damage(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    saved(config, tmp_path / "A", 3, 4)
    other = make_config(tmp_path, federation={"seed": 77})
    with pytest.raises(CheckpointError, match="resume with the configuration"):
        restored(other, tmp_path / "A", resume_round=4)
    assert saved_rounds(tmp_path / "A") == [3, 4]
