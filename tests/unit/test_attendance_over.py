"""Requests to a run that is over, or has nothing left but its test; and what a run has lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from actors.attendance import request
from gcml_ray.console.summary import lost_words
from gcml_ray.errors import ConfigError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import TrainReport
from tests.fakes import Fault, fake_config
from tests.runs import run_locally
from tests.unit.test_attendance import ask


def test_request_to_a_run_that_is_over_is_refused(tmp_path: Path) -> None:
    run_locally(fake_config(tmp_path))
    with pytest.raises(ConfigError, match="has finished: nobody joins or leaves any more"):
        request(tmp_path / "run", "add", "A")


def test_request_that_comes_when_all_rounds_are_over_is_put_aside_and_changes_no_result(tmp_path: Path) -> None:
    """One after the last round, and one that came in the test, when the driver looked for none any more."""
    folder, config = tmp_path / "run", fake_config(tmp_path)
    assert run_locally(config, listener=ask(folder, {4: ("remove", "A")})).summary.dropped == {}
    (folder / "requests" / "9.json").write_text(json.dumps({"wish": "remove", "site": "C"}))
    again = run_locally(config, resume=True)
    assert {report.site for report in again.summary.evaluations} == set("ABC")
    assert again.folder.read_state().last_complete_round == 4
    assert {path.suffix for path in (folder / "requests").iterdir()} == {".refused"}


def breaks(site: str, rounds: tuple[int, ...]) -> list[Fault]:
    return [Fault(site, number, "train", "raise") for number in rounds]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_site_that_a_finished_run_has_lost_can_be_added_to_its_test(tmp_path: Path, mode: str) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6, "mode": mode})
    run = run_locally(config, *breaks("B", (3, 4, 5)))
    state = run.folder.read_state()
    assert {report.site for report in run.summary.evaluations} == set("AC")
    words = lost_words(state, tmp_path / "run")
    assert "LOST         B is in no result: train, raised" in words
    assert f"gcml site add {tmp_path / 'run'} B, then gcml run --resume" in words
    request(tmp_path / "run", "add", "B")
    again = run_locally(config, resume=True)
    assert {report.site: report.round_number for report in again.summary.evaluations} == {"A": 6, "B": 2, "C": 6}
    assert (again.summary.dropped, again.trained("B")) == ({}, [])
    assert list((tmp_path / "run" / "requests").iterdir()) == []
    assert again.folder.read_state().last_complete_round == state.last_complete_round


def test_site_without_a_checkpoint_cannot_be_added_to_the_test_and_is_not_said_to(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path), *breaks("B", (1, 2, 3)))
    assert lost_words(run.folder.read_state(), tmp_path / "run").count("\n") == 0
    with pytest.raises(ConfigError, match="has finished, and site B has no checkpoint that could be tested"):
        request(tmp_path / "run", "add", "B")


def test_requests_to_a_run_that_was_stopped_in_its_test_are_followed(tmp_path: Path) -> None:
    """All rounds are over: B, which is lost, is tested again, and C, whose disk is gone, is left out."""
    config = fake_config(tmp_path, federation={"rounds": 6})
    folder = run_locally(config, *breaks("B", (3, 4, 5))).folder
    folder.write_state(replace(folder.read_state(), status="stopped"))
    shutil.rmtree(folder.path / "checkpoints" / "C")
    for wish, site in (("add", "B"), ("remove", "C"), ("add", "Q")):
        request(folder.path, wish, site)  # type: ignore[arg-type]
    again = run_locally(config, resume=True)
    assert {report.site for report in again.summary.evaluations} == set("AB")
    assert [path.suffix for path in (folder.path / "requests").iterdir()] == [".refused"]


def test_site_of_a_run_that_failed_in_its_first_round_can_be_left_out(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    run_locally(config, *(fault for site in "ABC" for fault in breaks(site, (1, 2, 3))))
    request(tmp_path / "run", "remove", "B")
    resumed = run_locally(config, Fault("B", 0, "start", "raise"), resume=True)
    assert (resumed.summary.status, list(resumed.summary.dropped)) == ("finished", ["B"])


def test_site_of_a_failed_run_whose_checkpoints_are_gone_can_be_left_out(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6})
    run_locally(config, *(Fault(site, number, "train", "raise") for site in "ABC" for number in (2, 3, 4)))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "B")
    request(tmp_path / "run", "remove", "B")
    resumed = run_locally(config, resume=True)
    assert (resumed.summary.status, list(resumed.summary.dropped)) == ("finished", ["B"])
    assert resumed.trained("A") == [2, 3, 4, 5, 6]


def test_rounds_that_are_done_stay_done_when_the_sites_that_did_them_leave(tmp_path: Path) -> None:
    """B is at its checkpoint of round 1 when the others, which are at round 3, leave."""
    broken = [Fault("B", number, "train", "raise") for number in (2, 3)]
    listener = ask(tmp_path / "run", {3: [("remove", "A"), ("remove", "C")]}, stop_after=4)
    config = fake_config(tmp_path, federation={"rounds": 6})
    assert run_locally(config, *broken, listener=listener).folder.read_state().last_complete_round == 4
    resumed = run_locally(config, resume=True)
    assert [record.plan.round_number for record in resumed.folder.rounds()] == [1, 2, 3, 4, 5, 6]


# --- a driver that dies --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_who_has_left_on_request_is_not_back_after_the_driver_was_killed_in_that_round(
    tmp_path: Path, mode: str
) -> None:
    folder, config = tmp_path / "run", fake_config(tmp_path, federation={"rounds": 6, "mode": mode})
    listener = ask(folder, {2: ("remove", "B")})

    def crash(_: TrainReport) -> None:
        if listener.rounds and listener.rounds[-1].plan.round_number >= 2 and not list(folder.glob("requests/*.json")):
            raise MemoryError("killed")

    listener.on_trained = crash
    with pytest.raises(MemoryError, match="killed"):
        run_locally(config, listener=listener)
    assert "B" not in RunFolder(folder).read_state().alive
    resumed = run_locally(config, resume=True)
    assert resumed.trained("B") == []
    assert {report.site for report in resumed.summary.evaluations} == set("AC")


# --- a cool-down ---------------------------------------------------------------------------------


def test_nobody_begins_in_a_cool_down_who_has_learnt_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rounds 5 and 6 are without exchange: C would train alone; B goes on from what it had."""
    federation = {"rounds": 6, "cooldown_rounds": 2, "sites": ["A", "B"]}
    wishes = {2: ("remove", "B"), 4: [("add", "B"), ("add", "C")]}
    run = run_locally(fake_config(tmp_path, federation=federation), listener=ask(tmp_path / "run", wishes))
    assert [record.plan.sites for record in run.folder.rounds()][3:] == [("A",), ("A", "B"), ("A", "B")]
    assert "site C cannot join before round 5: in a cool-down nothing is sent any more" in caplog.text


@pytest.mark.parametrize(("joins", "is_refused"), [(4, False), (5, True)])
def test_a_schedule_in_which_a_site_begins_in_the_cool_down_is_refused(
    tmp_path: Path, joins: int, is_refused: bool
) -> None:
    schedule = {"C": {"joins": joins}}
    config = fake_config(tmp_path, federation={"rounds": 6, "cooldown_rounds": 2, "schedule": schedule})
    if not is_refused:
        assert len(run_locally(config).folder.rounds()) == 6
        return
    with pytest.raises(ConfigError, match=r"federation.schedule.C.joins is 5: in a cool-down .*let it join earlier"):
        run_locally(config)
