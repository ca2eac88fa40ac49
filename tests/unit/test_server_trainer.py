"""The server's own checkpoints and pushes, with real trainers in this process."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from gcml_ray.config import Config
from gcml_ray.model.checkpoint import saved_rounds
from tests.makers import make_config
from tests.runs import RecordingListener, run_real

ROUNDS = {"rounds": 5, "local_steps": 1, "warmup_rounds": 0, "cooldown_rounds": 0}


def config_of(folder: Path, **sections: Any) -> Config:
    federation = ROUNDS | sections.pop("federation", {})
    return make_config(folder, method={"name": "fedavg"}, federation=federation, **sections)


def cut_off(path: Path) -> None:
    """As a disk leaves a file that was being written when the power went."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("num_damaged", [1, 2])
def test_a_damaged_mean_is_put_aside_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_damaged: int
) -> None:
    """With the one before, or with none: the next exchange forms a new one."""
    config = config_of(tmp_path)
    stopped = run_real(config, listener=RecordingListener(stop_after=3))
    folder = stopped.folder.checkpoints("server")
    for number in saved_rounds(folder)[-num_damaged:]:
        cut_off(folder / f"round_{number:05d}.safetensors")
    with caplog.at_level(logging.WARNING):
        resumed = run_real(config, resume=True)
    assert resumed.summary.status == "finished"
    assert [len(record.pushes) for record in resumed.folder.rounds()] == [4] * 5
    assert len(list(folder.glob("*.damaged"))) == num_damaged
    assert "the server goes on without its mean of round 3" in caplog.text


def test_a_mean_that_is_lost_is_said_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path)
    stopped = run_real(config, listener=RecordingListener(stop_after=3))
    shutil.rmtree(stopped.folder.checkpoints("server"))
    with caplog.at_level(logging.WARNING):
        resumed = run_real(config, resume=True)
    assert [len(record.pushes) for record in resumed.folder.rounds()] == [4] * 5
    assert "the server has no mean of an earlier round in" in caplog.text


def test_with_differences_a_server_that_died_costs_its_own_round_alone(tmp_path: Path) -> None:
    """Its new process has nothing that a difference could start from: sites send it whole models."""
    config = config_of(tmp_path, wire={"encoding": "topk", "topk_share": 0.1})
    run = run_real(config.model_copy(update={"chaos": "kill:server@r3"}))
    merges = [[report.merge for report in record.trained] for record in run.folder.rounds()]
    assert merges == [["server"] * 2, ["server"] * 2, [""] * 2, ["server"] * 2, ["server"] * 2]
    assert [push.reason for record in run.folder.rounds() for push in record.pushes if push.reason] == []
