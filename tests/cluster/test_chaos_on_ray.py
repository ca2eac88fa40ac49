"""Faults of ``--chaos`` where sites are processes: a kill ends one, a hang keeps it from answering for good."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from ray._private.state import actors as all_actors

from gcml_ray.config import Config
from gcml_ray.records import RoundRecord
from tests.cluster.ray_runs import run_on_ray
from tests.fakes import calls_of, fake_config
from tests.runs import RecordingListener, Run
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("ray_local", "waits_for_returns")


def chaotic(folder: Path, text: str) -> Config:
    """Three fake sites, each in a process of its own, with faults."""
    config = fake_config(folder, resources={"pool": "ray"})
    return Config.model_validate(config.model_dump(by_alias=True) | {"chaos": text})


def num_restarts(site: str) -> int:
    """How often Ray has replaced the process of a site, in the newest run."""
    mine = [actor for actor in all_actors().values() if actor["Name"] == f"site/{site}/run"]
    return int(max(mine, key=lambda actor: int(actor["StartTime"]))["NumRestarts"])


def check_came_back(run: Run) -> None:
    """B missed its second round alone, and went on from its checkpoint of the first."""
    assert run.summary.status == "finished"
    assert [run.trained(site) for site in "ABC"] == [[1, 2, 3, 4], [1, 3, 4], [1, 2, 3, 4]]
    assert run.restored("B") == [0, 1]
    first, second = (info.pid for info in run.listener.ready if info.site == "B")
    assert first != second
    assert num_restarts("B") in (1, 2)  # the second where Ray did not know yet that the process had ended


def test_chaos_kill_ends_the_process_once_and_the_site_is_back_in_the_next_round(tmp_path: Path) -> None:
    run = run_on_ray(chaotic(tmp_path, "kill:B@r2"))
    assert run.failures() == [("B", 2, "unreachable", "restart")]
    check_came_back(run)
    assert calls_of(run.folder, "B", "train").count(2) <= 1


def test_chaos_hang_is_given_up_after_the_timeout_and_the_site_is_back_in_the_next_round(
    tmp_path: Path, give_up_soon: Callable[[str, str, int], None]
) -> None:
    give_up_soon("B", "train", 2)
    run = run_on_ray(chaotic(tmp_path, "hang:B@r2"))
    assert run.failures() == [("B", 2, "late", "restart")]
    check_came_back(run)


def test_frozen_process_is_given_up_and_ended_although_it_can_answer_nothing(
    tmp_path: Path, give_up_soon: Callable[[str, str, int], None]
) -> None:
    """SIGSTOP, as where a machine swaps itself to death: no call is answered, not even the one that would end it."""
    give_up_soon("B", "push", 2)

    def freeze(record: RoundRecord) -> None:
        if record.plan.round_number == 1:
            os.kill(pid_of("B"), signal.SIGSTOP)

    def pid_of(site: str) -> int:
        return next(info.pid for info in listener.ready if info.site == site)

    listener = RecordingListener(on_end=freeze)
    run = run_on_ray(fake_config(tmp_path, federation={"push_timeout_s": 3.0}), listener=listener)
    assert run.summary.status == "finished"
    assert [(site, decision) for site, _, _, decision in run.failures()] == [("B", "restart")], "not who pushed to it"
    assert run.trained("B")[-1] == 4
    assert wait_until(lambda: not Path(f"/proc/{pid_of('B')}").exists())
