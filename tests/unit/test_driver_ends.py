"""How a run ends before its last round, by its failures, its clock or a stop, and what a resume makes of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from actors.driver import Driver
from actors.run import run_federation
from gcml_ray.errors import CheckpointError
from gcml_ray.records import SiteInfo
from tests.fakes import FakeTrainers, fake_config
from tests.runs import RecordingListener, run_locally
from tests.unit.test_driver import raises_in


def test_run_without_a_site_left_has_failed(tmp_path: Path) -> None:
    faults = [fault for site in "ABC" for fault in raises_in(range(2, 5), site=site)]
    run = run_locally(fake_config(tmp_path, federation={"rounds": 9}), *faults)
    assert (run.summary.status, run.summary.last_round) == ("failed", 4)
    assert sorted(run.summary.dropped) == ["A", "B", "C"]
    state = run.folder.read_state()
    assert (state.status, state.last_complete_round) == ("failed", 1)


@pytest.mark.parametrize(("method", "later"), [("local", "finished"), ("fedavg", "failed")])
def test_run_in_which_nobody_has_trained_has_failed(tmp_path: Path, method: str, later: str) -> None:
    """Two failures in a row give no site up. A resume trains from the start; with a server nobody's mean is kept."""
    config = fake_config(tmp_path, method={"name": method}, federation={"rounds": 2})
    run = run_locally(config, *(fault for site in "ABC" for fault in raises_in(range(1, 3), site=site)))
    assert (run.summary.status, run.folder.read_state().status) == ("failed", "failed")
    assert run.folder.cases() == ()
    again = run_locally(config, resume=True)
    assert (again.summary.status, again.folder.cases() == ()) == (later, later == "failed")


def test_one_site_that_has_trained_is_a_result(tmp_path: Path) -> None:
    config = fake_config(tmp_path, method={"name": "local"}, federation={"rounds": 2})
    run = run_locally(config, *(fault for site in "AB" for fault in raises_in(range(1, 3), site=site)))
    assert run.summary.status == "finished"
    assert {score.site for score in run.folder.cases()} == {"C"}
    assert sorted(run.summary.dropped) == ["A", "B"]


def test_resume_of_a_run_that_lost_all_sites_tries_them_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their disk was full, for example: what they had finished is there, and nothing else is wrong with them."""
    config = fake_config(tmp_path, sites=("A", "B"), federation={"rounds": 9})
    run_locally(config, *(fault for site in "AB" for fault in raises_in(range(2, 5), site=site)))
    resumed = run_locally(config, resume=True)
    assert "all sites were given up and are tried again (A: train, raised: broken train of A in round 4" in caplog.text
    assert (resumed.summary.status, resumed.summary.dropped) == ("finished", {})
    assert resumed.restored("A") == [1]
    assert [record.plan.round_number for record in resumed.folder.rounds()] == list(range(1, 10))


def test_resume_of_a_run_that_all_sites_have_left_is_refused(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=("A", "B"))
    folder = run_locally(config, listener=RecordingListener(stop_after=1)).folder
    state = folder.read_state()
    folder.write_state(replace(state, alive=(), dropped={"A": "left on request", "B": "left on request"}))
    with pytest.raises(CheckpointError, match=r"all its sites have left \(A: left on request; B: left"):
        run_locally(config, resume=True)


# --- stopped by the clock, or before the first round -------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_run_whose_time_is_up_is_tested_and_a_resume_tests_again_but_trains_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(Driver, "is_time_up", lambda self: self.last_record >= 3)
    config = fake_config(tmp_path, federation={"rounds": 50, "mode": mode})
    first = run_locally(config)
    assert (first.summary.status, len(first.summary.evaluations)) == ("finished", 3)
    assert 3 <= first.summary.last_round < 8
    again = run_locally(config, resume=True)
    assert (again.summary.status, len(again.summary.evaluations)) == ("finished", 3)
    assert again.summary.last_round == first.summary.last_round
    assert again.trained("A") == []


@pytest.mark.parametrize(("round_s", "goes_on_with"), [(100.0, [3, 4]), (301.0, [])])
def test_time_before_a_stop_counts(tmp_path: Path, round_s: float, goes_on_with: list[int]) -> None:
    """Ten minutes for rounds; by the records of the first two they took these seconds each."""
    config = fake_config(tmp_path, federation={"time_limit_s": 600.0})
    folder = run_locally(config, listener=RecordingListener(stop_after=2)).folder
    records = folder.rounds()
    folder.rounds_file.unlink()
    for record in records:
        folder.append_round(replace(record, seconds=round_s))
    resumed = run_locally(config, resume=True)
    assert (resumed.summary.status, resumed.trained("A")) == ("finished", goes_on_with)


def test_stop_during_the_start_ends_it_and_the_run_can_begin_later(tmp_path: Path) -> None:
    class Hasty(RecordingListener):
        def on_site_ready(self, info: SiteInfo) -> None:
            del info
            self.stop.set()

    config = fake_config(tmp_path)
    run = run_locally(config, listener=Hasty())
    assert (run.summary.status, run.summary.last_round, run.folder.rounds()) == ("stopped", 0, ())
    assert not run.folder.state_file.exists()
    again = run_federation(config, listener=RecordingListener(), stop=Event(), resume=True, make_trainer=FakeTrainers())
    assert (again.status, again.last_round) == ("finished", 4)
