"""Stopping a run and going on with it: what is on disk, and that the result is that of an unbroken run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.local_pool import LocalPool
from actors.run import run_federation
from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.records import TrainReport
from tests.fakes import FakeTrainers, Fault, fake_config, final_weights
from tests.makers import make_config
from tests.runs import RecordingListener, drive, run_locally


def stopped_after(number: int) -> RecordingListener:
    """A listener that asks for the end in the given round."""
    return RecordingListener(stop_after=number)


def test_stop_ends_after_the_round_in_flight(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path), listener=stopped_after(2))
    assert (run.summary.status, run.summary.last_round) == ("stopped", 2)
    assert run.folder.read_state() == RunState(2, "stopped", ("A", "B", "C"), {"A": 2, "B": 2, "C": 2}, {})
    assert run.summary.evaluations == ()


def test_resume_without_the_state_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    rounds = run_locally(config, listener=stopped_after(2)).folder.rounds()
    (tmp_path / "run" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state.json is missing, but rounds.jsonl beside it holds 2 rounds"):
        run_federation(config, listener=RecordingListener(), stop=threading.Event(), resume=True)
    assert RunFolder(tmp_path / "run").rounds() == rounds


def test_resume_with_records_that_end_too_early_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = fake_config(tmp_path)
    folder = run_locally(config, listener=stopped_after(2)).folder
    folder.truncate_after(1)
    summary = run_federation(
        config, listener=RecordingListener(), stop=threading.Event(), resume=True, make_trainer=FakeTrainers()
    )
    assert summary.status == "finished"
    assert "rounds.jsonl ends at round 1, the run was at round 2" in caplog.text


def test_resume_after_stop_gives_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    whole = run_locally(fake_config(tmp_path / "whole"))
    config = fake_config(tmp_path / "broken")
    run_locally(config, listener=stopped_after(2))
    resumed = run_locally(config, resume=True)
    assert [record.plan.round_number for record in resumed.folder.rounds()] == [1, 2, 3, 4]
    expected = final_weights(whole.folder)
    for site, weights in final_weights(resumed.folder).items():
        np.testing.assert_array_equal(weights, expected[site])


def test_resume_goes_back_to_the_last_checkpoint_and_repeats_what_came_after(tmp_path: Path) -> None:
    """Checkpoints after rounds 2, 4, 6; stopped after 5: rounds 5 to 6 are made again from 4, once in the records."""

    def config_in(folder: str) -> Config:
        return fake_config(tmp_path / folder, federation={"rounds": 6}, output={"checkpoint_every": 2})

    whole, config = run_locally(config_in("whole")), config_in("broken")
    stopped = run_locally(config, listener=stopped_after(5))
    assert stopped.folder.read_state().last_complete_round == 4
    resumed = run_locally(config, resume=True)
    assert [plan.round_number for plan in resumed.listener.plans] == [5, 6]
    assert [record.plan.round_number for record in resumed.folder.rounds()] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(final_weights(resumed.folder)["B"], final_weights(whole.folder)["B"])


def test_site_skipped_before_the_stop_resumes_from_its_own_older_checkpoint(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    fault = Fault("B", 2, "train", "raise")
    stopped = run_locally(config, fault, listener=stopped_after(2))
    assert stopped.folder.read_state() == RunState(2, "stopped", ("A", "B", "C"), {"A": 2, "B": 1, "C": 2}, {})
    resumed = run_locally(config, resume=True)
    assert {info.site: info.restored_round for info in resumed.listener.ready} == {"A": 2, "B": 1, "C": 2}
    whole = run_locally(fake_config(tmp_path / "whole"), fault)
    np.testing.assert_array_equal(final_weights(resumed.folder)["B"], final_weights(whole.folder)["B"])


def test_dropped_site_stays_dropped_after_a_resume(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 6})
    run_locally(config, *(Fault("B", number, "train", "raise") for number in (1, 2, 3)), listener=stopped_after(4))
    resumed = run_locally(config, resume=True)
    assert resumed.trained("A") == [5, 6]
    assert resumed.trained("B") == []
    assert list(resumed.summary.dropped) == ["B"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_stopped_run_can_be_finished_as_it_is(tmp_path: Path, mode: str) -> None:
    config = fake_config(tmp_path, federation={"rounds": 50, "mode": mode})
    stopped = run_locally(config, listener=stopped_after(2))
    done = {site: len(stopped.trained(site)) for site in "ABC"}
    finished = run_locally(config, resume=True, finish=True)
    assert (finished.summary.status, finished.listener.trained) == ("finished", [])
    assert {report.site: report.round_number for report in finished.summary.evaluations} == done
    again = run_locally(config, resume=True)
    assert (again.summary.status, again.listener.trained) == ("finished", [])


def test_resume_of_a_stop_in_the_last_round_only_tests(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    run_locally(config, listener=stopped_after(4))
    resumed = run_locally(config, resume=True)
    assert (resumed.summary.status, resumed.summary.last_round, resumed.listener.plans) == ("finished", 4, [])
    assert len(resumed.folder.cases()) == 6


def test_crash_of_the_driver_can_be_resumed(tmp_path: Path) -> None:
    """The state on disk is that of the last whole round, whatever the sites have written since."""

    def crash(record: Any) -> None:
        if record.plan.round_number == 3:
            raise MemoryError("killed")

    config = fake_config(tmp_path)
    with pytest.raises(MemoryError, match="killed"):
        run_locally(config, listener=RecordingListener(on_end=crash))
    assert RunFolder(tmp_path / "run").read_state().status == "running"
    resumed = run_locally(config, resume=True)
    whole = run_locally(fake_config(tmp_path / "whole"))
    np.testing.assert_array_equal(final_weights(resumed.folder)["A"], final_weights(whole.folder)["A"])


def test_resume_with_the_real_trainer_gives_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    def run(folder: Path, stop_after: int | None) -> dict[str, Any]:
        config = make_config(folder, federation={"rounds": 3})
        if stop_after:
            pool = LocalPool(config, config.output.folder, run_id="run")
            drive(config, pool, listener=stopped_after(stop_after))
        pool = LocalPool(config, config.output.folder, run_id="run")
        folder = drive(config, pool, resume=bool(stop_after)).folder.path
        return load_file(folder / "checkpoints" / "A" / "round_00003.safetensors")

    whole, resumed = run(tmp_path / "whole", None), run(tmp_path / "broken", 2)
    assert whole.keys() == resumed.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values, err_msg=name)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_interrupt_between_two_records_loses_no_report(tmp_path: Path, mode: str) -> None:
    """A has reported its round 3 and written its checkpoint, B's report ends the run at once."""
    config = fake_config(tmp_path, federation={"mode": mode, "rounds": 6})

    def interrupt(report: TrainReport) -> None:
        if (report.site, report.round_number) == ("B", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_locally(config, listener=RecordingListener(on_trained=interrupt))
    assert RunFolder(Path(config.output.folder)).read_state().status == "stopped"
    run = run_locally(config, resume=True)
    assert run.summary.status == "finished"
    reported = [(report.site, report.round_number) for one in run.folder.rounds() for report in one.trained]
    assert sorted(reported) == [(site, number) for site in "ABC" for number in range(1, 7)]
