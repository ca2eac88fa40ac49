"""Sites that join or leave during a run."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.attendance import Attendance, request
from gcml_ray.config import SERVER, Config
from gcml_ray.errors import CheckpointError, ConfigError, SiteError
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.records import RoundRecord, SiteInfo
from tests.fakes import FakeTrainer, Fault, calls_of, fake_config, final_weights
from tests.runs import RecordingListener, run_locally


def sites_of_rounds(run: Any) -> list[str]:
    return ["".join(record.plan.sites) for record in run.folder.rounds()]


def test_schedule_lets_sites_join_and_leave(tmp_path: Path) -> None:
    schedule = {"B": {"joins": 3}, "C": {"leaves": 3}}
    run = run_locally(fake_config(tmp_path, federation={"schedule": schedule}))
    assert sites_of_rounds(run) == ["AC", "AC", "AB", "AB"]
    assert run.summary.dropped == {"C": "left before round 3, as scheduled"}
    assert {report.site for report in run.summary.evaluations} == {"A", "B"}


def ask(folder: Path, wishes: dict[int, Any], *, stop_after: int = 0) -> RecordingListener:
    """A listener that leaves requests, one or a list, at the end of rounds."""

    def on_end(record: Any) -> None:
        asked = wishes.get(record.plan.round_number, [])
        for wish in asked if isinstance(asked, list) else [asked]:
            request(folder, *wish)

    return RecordingListener(on_end=on_end, stop_after=stop_after)


def test_requests_are_followed_before_the_next_round_and_a_returning_site_goes_on(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6})
    listener = ask(tmp_path / "run", {1: ("remove", "B"), 3: ("add", "B")})
    run = run_locally(config, listener=listener)
    assert sites_of_rounds(run) == ["ABC", "AC", "AC", "ABC", "ABC", "ABC"]
    assert run.restored("B") == [0, 1]
    assert calls_of(run.folder, "B", "train") == [1, 4, 5, 6]
    assert run.summary.dropped == {}
    assert list((tmp_path / "run" / "requests").iterdir()) == []


def test_no_site_joins_a_run_that_trains_one_model_on_all_cases(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = fake_config(tmp_path, method={"name": "pooled"})
    run = run_locally(config, listener=ask(tmp_path / "run", {1: ("add", "A")}))
    assert sites_of_rounds(run) == ["pooled"] * 4
    assert "site A cannot join: this run trains one model on the cases of all sites (pooled)" in caplog.text


@pytest.mark.parametrize(("wish", "site"), [("add", "A"), ("add", "stranger")])
def test_request_that_cannot_be_followed_is_put_aside_and_the_run_goes_on(tmp_path: Path, wish: Any, site: str) -> None:
    run = run_locally(fake_config(tmp_path), listener=ask(tmp_path / "run", {1: (wish, site)}))
    assert sites_of_rounds(run) == ["ABC"] * 4
    assert [path.suffix for path in (tmp_path / "run" / "requests").iterdir()] == [".refused"]


def test_request_that_cannot_be_read_is_put_aside_and_the_run_goes_on(tmp_path: Path) -> None:
    """A folder stands for a file of somebody else that we may not read."""

    def leave(record: RoundRecord) -> None:
        if record.plan.round_number == 1:
            (tmp_path / "run" / "requests" / "1.json").mkdir(parents=True)

    run = run_locally(fake_config(tmp_path), listener=RecordingListener(on_end=leave))
    assert run.summary.status == "finished"
    assert [path.suffix for path in (tmp_path / "run" / "requests").iterdir()] == [".refused"]


def test_last_site_cannot_leave(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=("A", "B"))
    run = run_locally(config, listener=ask(tmp_path / "run", {1: ("remove", "A"), 2: ("remove", "B")}))
    assert sites_of_rounds(run) == ["AB", "B", "B", "B"]


def test_schedule_with_an_unknown_site_or_nobody_at_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation.schedule names \['X'\]"):
        run_locally(fake_config(tmp_path / "1", federation={"schedule": {"X": {"joins": 2}}}))
    late = {site: {"joins": 2} for site in "ABC"}
    with pytest.raises(ConfigError, match="at least one site must take part from round 1"):
        run_locally(fake_config(tmp_path / "2", federation={"schedule": late}))


def test_request_to_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        request(tmp_path / "nothing", "add", "A")


def test_departure_of_a_site_that_takes_no_part_is_refused(tmp_path: Path) -> None:
    run_locally(fake_config(tmp_path), listener=RecordingListener(stop_after=2))
    with pytest.raises(ConfigError, match=r"site Q takes no part in the run in .*; its sites are \['A', 'B', 'C'\]"):
        request(tmp_path / "run", "remove", "Q")


# --- a run that goes on ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_site_that_joined_by_the_schedule_takes_part_after_a_resume(tmp_path: Path, mode: str) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6, "mode": mode, "schedule": {"B": {"joins": 3}}})
    stopped = run_locally(config, listener=RecordingListener(stop_after=4))
    newest = stopped.folder.read_state().site_rounds["B"]
    resumed = run_locally(config, resume=True)
    assert resumed.restored("B") == [newest]
    assert resumed.trained("B") == list(range(newest + 1, 7))
    assert {report.site for report in resumed.summary.evaluations} == set("ABC")


def test_site_that_was_added_on_request_alone_takes_part_after_a_resume(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6, "sites": ["A", "C"]})
    run_locally(config, listener=ask(tmp_path / "run", {1: ("add", "B")}, stop_after=3))
    resumed = run_locally(config, resume=True)
    assert sites_of_rounds(resumed) == ["AC", *["ABC"] * 5]
    assert resumed.restored("B") == [3]


def test_site_on_its_way_when_the_run_stopped_takes_part_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while B, which was added on request, loads its data."""

    def start(trainer: FakeTrainer, *, resume_round: int) -> Any:
        if trainer.site == "B":
            raise KeyboardInterrupt
        return begin(trainer, resume_round=resume_round)

    begin = FakeTrainer.start
    config = fake_config(tmp_path, federation={"sites": ["A", "C"]})
    monkeypatch.setattr(FakeTrainer, "start", start)
    with pytest.raises(KeyboardInterrupt):
        run_locally(config, listener=ask(tmp_path / "run", {2: ("add", "B")}))
    monkeypatch.undo()
    state = RunFolder.open(tmp_path / "run").read_state()
    assert (state.alive, state.site_rounds) == (("A", "C", "B"), {"A": 2, "C": 2, "B": 0})
    resumed = run_locally(config, resume=True)
    assert sites_of_rounds(resumed) == ["AC", "AC", "ABC", "ABC"]
    assert resumed.restored("B") == [0]


def test_resume_from_before_a_scheduled_join_repeats_it_at_its_time(tmp_path: Path) -> None:
    """Checkpoints of rounds 3 and 6, stopped after 5: B, which joined before 5, must not be there in round 4."""

    def config_in(folder: str) -> Config:
        federation = {"rounds": 6, "schedule": {"B": {"joins": 5}}}
        return fake_config(tmp_path / folder, federation=federation, output={"checkpoint_every": 3})

    whole, config = run_locally(config_in("whole")), config_in("broken")
    run_locally(config, listener=RecordingListener(stop_after=5))
    resumed = run_locally(config, resume=True)
    assert sites_of_rounds(resumed) == sites_of_rounds(whole) == ["AC"] * 4 + ["ABC"] * 2
    for site, weights in final_weights(whole.folder).items():
        np.testing.assert_array_equal(final_weights(resumed.folder)[site], weights)


def test_site_that_would_join_after_the_last_round_is_refused(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 4, "schedule": {"B": {"joins": 5}}})
    with pytest.raises(ConfigError, match=r"federation.schedule.B.joins is 5, after the last round \(4\)"):
        run_locally(config)


def test_run_that_stopped_before_its_first_round_starts_with_all_its_sites(tmp_path: Path) -> None:
    class Hasty(RecordingListener):
        def on_site_ready(self, info: SiteInfo) -> None:
            if info.site == "C":  # the last one to start
                self.stop.set()

    config = fake_config(tmp_path, federation={"schedule": {"B": {"joins": 2}}})
    assert run_locally(config, listener=Hasty()).folder.read_state().last_complete_round == 0
    assert sites_of_rounds(run_locally(config, resume=True)) == ["AC", "ABC", "ABC", "ABC"]


@pytest.mark.parametrize("schedule", [{"B": {"joins": 3}}, {"B": {"leaves": 3}}])
def test_part_of_the_schedule_that_a_stop_came_before_is_followed_after_a_resume(
    tmp_path: Path, schedule: dict[str, Any]
) -> None:
    """Stopped after record 2, the rounds in flight make a third one: what is due before it comes with the resume."""
    config = fake_config(tmp_path, federation={"rounds": 6, "mode": "async", "schedule": schedule})
    state = run_locally(config, listener=RecordingListener(stop_after=2)).folder.read_state()
    assert (state.last_complete_round, state.followed) == (3, 2)
    assert ("B" in state.alive) == ("leaves" in schedule["B"])
    resumed = run_locally(config, resume=True)
    evaluated = {report.site for report in resumed.summary.evaluations}
    assert evaluated == (set("AC") if "leaves" in schedule["B"] else set("ABC"))


def test_site_whose_checkpoints_are_gone_can_be_left_out_of_a_resume(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 5})
    run_locally(config, listener=RecordingListener(stop_after=2))
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoints" / "B")
    with pytest.raises(SiteError):
        run_locally(config, resume=True)
    request(folder, "remove", "B")
    resumed = run_locally(config, resume=True)
    assert sites_of_rounds(resumed)[2:] == ["AC"] * 3
    assert resumed.summary.dropped["B"].startswith("left before the run went on")
    assert list((folder / "requests").iterdir()) == []


# --- the schedule, whatever else happens -------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_scheduled_join_is_followed_once(tmp_path: Path, mode: str) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6, "mode": mode, "schedule": {"B": {"joins": 3}}})
    run = run_locally(config)
    assert run.summary.status == "finished"
    assert run.restored("B") == [0]
    assert {report.site for report in run.summary.evaluations} == set("ABC")


def test_site_that_came_on_request_before_its_scheduled_join_stays(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 5, "schedule": {"B": {"joins": 4, "leaves": 5}}})
    run = run_locally(config, listener=ask(tmp_path / "run", {1: ("add", "B")}))
    assert sites_of_rounds(run) == ["AC", "ABC", "ABC", "ABC", "AC"]
    assert run.restored("B") == [0]


def test_scheduled_departure_of_the_last_site_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = fake_config(tmp_path, sites=("A", "B"), federation={"rounds": 5, "schedule": {"B": {"leaves": 3}}})
    with caplog.at_level(logging.WARNING):
        run = run_locally(config, listener=ask(tmp_path / "run", {1: ("remove", "A")}))
    assert sites_of_rounds(run) == ["AB", "B", "B", "B", "B"]
    said = [record.getMessage() for record in caplog.records if "schedule" in record.getMessage()]
    assert said == [
        "the schedule of site B is not followed before round 3: site B is the last one: stop the run instead"
    ]


@pytest.mark.parametrize("schedule", [{}, {"B": {"joins": 3}}])
def test_datalist_that_cannot_be_read_any_more_keeps_a_site_out_but_ends_no_run(
    tmp_path: Path, schedule: dict[str, Any]
) -> None:
    def spoil(record: Any) -> None:
        if record.plan.round_number == 1:
            (tmp_path / "datalist.json").write_text("{")
            request(tmp_path / "run", "add", "B")

    sites = ["A", "B", "C"] if schedule else ["A", "C"]
    config = fake_config(tmp_path, federation={"sites": sites, "schedule": schedule})
    run = run_locally(config, listener=RecordingListener(on_end=spoil))
    assert sites_of_rounds(run) == ["AC"] * 4
    assert [why[:27] for why in run.summary.dropped.values()] == ["did not join before round 3"] * len(schedule)


@dataclass
class FakeRoster:
    """Writes down who comes and goes."""

    members: dict[str, int]
    absent: set[str] = field(default_factory=set)
    past_rounds: dict[str, int] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def join(self, site: str, *, number: int, checkpoint_round: int) -> None:
        """A site is on its way."""
        self.absent.add(site)
        self.done.append(f"{site} joins before {number} from {checkpoint_round}")

    def drop(self, site: str, reason: str) -> None:
        """A site is gone."""
        self.members.pop(site, None)
        self.absent.discard(site)
        self.done.append(f"{site} {reason}")


def attendance_of(folder: Path, schedule: dict[str, Any], roster: FakeRoster) -> Attendance:
    """Who comes and goes, without a run."""
    config = fake_config(folder, federation={"rounds": 9, "schedule": schedule})
    return Attendance(config, RunFolder.create(folder / "run", config), roster)  # type: ignore[arg-type]


def test_every_round_that_was_passed_is_followed_once(tmp_path: Path) -> None:
    """Without a barrier several records may be written between two looks at the schedule."""
    roster = FakeRoster({"A": 1, "C": 1})
    attendance = attendance_of(tmp_path, {"B": {"joins": 3, "leaves": 6}, "C": {"leaves": 4}}, roster)
    for number in (1, 2, 2, 5, 5, 8):
        attendance.apply(number)
    assert roster.done == [
        "B joins before 3 from 0",
        "C left before round 4, as scheduled",
        "B left before round 6, as scheduled",
    ]


def test_resume_follows_the_schedule_from_where_it_was_left(tmp_path: Path) -> None:
    roster = FakeRoster({"A": 1, "C": 1})
    attendance = attendance_of(tmp_path, {"B": {"joins": 3}, "C": {"leaves": 2}}, roster)
    attendance.at_start("ABC", RunState(4, "stopped", ("A", "C"), {"A": 4, "C": 4}, followed=2))
    attendance.apply(5)
    assert roster.done == ["B joins before 3 from 0"]


# --- going on from a checkpoint ----------------------------------------------------------------


def test_site_that_was_dropped_after_failures_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 8})
    faults = [Fault("B", number, "train", "raise") for number in (3, 4, 5)]
    run = run_locally(config, *faults, listener=ask(tmp_path / "run", {6: ("add", "B")}))
    assert sites_of_rounds(run) == ["ABC"] * 5 + ["AC"] + ["ABC"] * 2
    assert run.restored("B") == [0, 2]


def test_site_that_left_before_a_resume_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Two resumes: the second one knows it from what the first one wrote."""
    config = fake_config(tmp_path, federation={"rounds": 8})
    left = run_locally(config, listener=ask(tmp_path / "run", {2: ("remove", "B")}, stop_after=3))
    assert left.folder.read_state() == RunState(
        3, "stopped", ("A", "C"), {"A": 3, "B": 2, "C": 3}, {"B": "left before round 3, on request"}
    )
    run_locally(config, resume=True, listener=RecordingListener(stop_after=4))
    back = run_locally(config, resume=True, listener=ask(tmp_path / "run", {5: ("add", "B")}))
    assert sites_of_rounds(back) == ["ABC"] * 2 + ["AC"] * 3 + ["ABC"] * 3
    assert back.restored("B") == [2]


def test_state_of_an_older_version_can_be_resumed(tmp_path: Path) -> None:
    """It has no checkpoint of a site that is gone, and does not say how far the schedule was followed."""
    config = fake_config(tmp_path, federation={"rounds": 6, "schedule": {"C": {"leaves": 5}}})
    stopped = run_locally(config, listener=ask(tmp_path / "run", {2: ("remove", "B")}, stop_after=3))
    values = json.loads(stopped.folder.state_file.read_text())
    del values["followed"], values["site_rounds"]["B"]
    stopped.folder.state_file.write_text(json.dumps(values))
    resumed = run_locally(config, resume=True, listener=ask(tmp_path / "run", {5: ("add", "B")}))
    assert sites_of_rounds(resumed) == ["ABC", "ABC", "AC", "AC", "A", "AB"]


# --- leaving while on the way ------------------------------------------------------------------


def test_site_that_is_asked_to_leave_while_it_starts_does_not_come(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6})
    wishes = {1: ("remove", "B"), 2: [("add", "B"), ("remove", "B")], 4: ("add", "B")}
    run = run_locally(config, listener=ask(tmp_path / "run", wishes))
    assert sites_of_rounds(run) == ["ABC", "AC", "AC", "AC", "ABC", "ABC"]
    assert run.restored("B") == [0, 1]
    assert list((tmp_path / "run" / "requests").iterdir()) == []


def test_scheduled_departure_of_a_site_on_its_way_is_followed(tmp_path: Path) -> None:
    roster = FakeRoster({"A": 1}, absent={"B"})
    attendance_of(tmp_path, {"B": {"leaves": 2}}, roster).apply(2)
    assert roster.done == ["B left before round 2, as scheduled"]


def test_server_that_is_being_restarted_cannot_be_asked_to_leave(tmp_path: Path) -> None:
    roster = FakeRoster({"A": 1}, absent={SERVER})
    attendance = attendance_of(tmp_path, {}, roster)
    request(tmp_path / "run", "remove", SERVER)
    attendance.apply(1)
    assert roster.done == []


def stopped_with_requests(folder: Path, *wishes: tuple[str, str]) -> Config:
    """A run of A, B and C that was stopped after round 2, and what was asked of it since."""
    config = fake_config(folder)
    run_locally(config, listener=RecordingListener(stop_after=2))
    for wish, site in wishes:
        request(folder / "run", wish, site)  # type: ignore[arg-type]
    return config


def test_last_site_stays_where_all_were_asked_to_leave_while_the_run_stood(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = stopped_with_requests(tmp_path, ("remove", "A"), ("remove", "B"), ("remove", "C"))
    run = run_locally(config, resume=True)
    assert sites_of_rounds(run)[2:] == ["C", "C"]
    assert "site C is the last one" in caplog.text


def test_newest_request_for_a_site_counts_while_the_run_stands(tmp_path: Path) -> None:
    config = stopped_with_requests(tmp_path, ("remove", "A"), ("add", "A"))
    run = run_locally(config, resume=True)
    assert sites_of_rounds(run)[-1] == "ABC"
    assert run.summary.status == "finished"
