"""Sites that die, are killed or hang: the round completes without them, and they come back from their checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.pool import ObjectStoreTransport, RayPool
from gcml_ray.push.wire import Buffer, PushHeader
from gcml_ray.records import RoundRecord, TrainOrder
from tests.cluster.conftest import wait_until
from tests.cluster.ray_runs import ray_pool, run_on_ray
from tests.fake_runs import RecordingListener, Run, drive
from tests.fakes import FakeTrainers, Fault, calls_of, fake_config, final_weights

pytestmark = pytest.mark.usefixtures("ray_local", "waits_for_returns")

LATE = {"round_timeout_s": 3.0, "push_timeout_s": 3.0}


def test_site_that_dies_in_training_restarts_from_its_checkpoint_and_others_go_on(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path), Fault("B", 2, "train", "die"))
    assert run.failures() == [("B", 2, "unreachable", "restart")]
    assert run.summary.status == "finished"
    assert [run.trained(site) for site in "ABC"] == [[1, 2, 3, 4], [1, 3, 4], [1, 2, 3, 4]]
    assert run.restored("B") == [0, 1]
    assert all(np.isfinite(weights).all() for weights in final_weights(run.folder).values())


def test_training_that_died_is_never_repeated(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path), Fault("B", 2, "train", "die"))
    assert [calls_of(run.folder, site, "train") for site in "ABC"] == [[1, 2, 3, 4]] * 3


def test_site_that_dies_in_its_push_is_back_by_the_next_round(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path), Fault("B", 2, "export", "die"))
    assert run.failures() == [("B", 2, "unreachable", "restart")]
    check_lost_in_a_push(run)


def check_lost_in_a_push(run: Run) -> None:
    """B goes on from its checkpoint of round 1; where it is back before the others train, it trains with them."""
    assert run.restored("B") == [0, 1]
    assert run.trained("B") in ([1, 3, 4], [1, 2, 3, 4])


def test_site_killed_between_rounds_is_found_restarted_by_ray_and_started_again(tmp_path: Path) -> None:
    """Ray replaces the process on its own; the new one knows nothing until the driver starts it."""
    pool = ray_pool(fake_config(tmp_path))
    first_pids: list[int] = []

    def kill(record: RoundRecord) -> None:
        if record.plan.round_number == 1:
            first_pids.append(listener.ready[-1].pid)
            ray.kill(pool._handles["B"], no_restart=False)
            assert wait_until(lambda: is_replaced(pool, "B"))

    listener = RecordingListener(on_end=kill)
    run = drive(fake_config(tmp_path), pool, listener=listener)
    assert run.summary.status == "finished"
    assert run.failures() == [("B", 2, "died", "restart")]
    assert "has a new process that was not started" in run.listener.failures[0][0].message
    assert run.restored("B") == [0, 1]
    assert run.trained("B")[-2:] == [3, 4]


def is_replaced(pool: RayPool, site: str) -> bool:
    """Whether a new process of a site answers."""
    try:
        status = ray.get(pool._handles[site].status.options(concurrency_group="control").remote(), timeout=10)
    except ray.exceptions.RayError:
        return False
    return bool(status.stage == "created")


def test_site_killed_while_it_trains_is_back_within_two_rounds(tmp_path: Path) -> None:
    """Killed from outside, in the middle of round 2, by the listener of another site's report."""
    config = fake_config(tmp_path)
    pool = ray_pool(config, Fault("B", 2, "train", "slow", seconds=20))

    class Killer(RecordingListener):
        def on_site_trained(self, report: object) -> None:
            if getattr(report, "round_number", 0) == 2 and not self.failures:
                ray.kill(pool._handles["B"], no_restart=False)

    run = drive(config, pool, listener=Killer())
    assert run.failures() == [("B", 2, "unreachable", "restart")]
    assert run.restored("B") == [0, 1]
    assert [report.site for report in run.folder.rounds()[2].trained] == ["A", "B", "C"]
    assert run.seconds < 20


def test_hanging_site_is_late_restarted_and_the_round_completes(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path, federation=LATE), Fault("B", 2, "train", "hang"))
    assert run.failures() == [("B", 2, "late", "restart")]
    assert run.summary.status == "finished"
    assert run.trained("B") == [1, 3, 4]
    assert run.restored("B") == [0, 1]


def test_site_that_hangs_in_its_push_is_restarted(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path, federation=LATE), Fault("B", 2, "export", "hang"))
    assert run.failures() == [("B", 2, "late", "restart")]
    check_lost_in_a_push(run)


def test_site_that_dies_in_every_round_is_dropped_and_the_rest_finish(tmp_path: Path) -> None:
    faults = [Fault("B", number, "train", "die") for number in range(1, 5)]
    run = run_on_ray(fake_config(tmp_path), *faults)
    assert [decision for *_, decision in run.failures()] == ["restart", "restart", "drop"]
    assert list(run.summary.dropped) == ["B"]
    assert [run.trained(site) for site in "AC"] == [[1, 2, 3, 4]] * 2


def test_statuses_of_a_restarted_site_are_those_of_its_new_process(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    pool = ray_pool(config)
    pool.launch(["A"])
    pool.start("A", resume_round=0)
    assert wait_until(lambda: bool(pool.wait(0.1)))
    assert wait_until(lambda: [status.stage for status in pool.statuses()] == ["ready"])
    pool.restart("A")
    assert pool.statuses() == []
    assert wait_until(lambda: [status.stage for status in pool.statuses()] == ["created"])
    pool.shutdown()


def test_push_of_50_mb_is_acknowledged_while_its_receiver_trains(tmp_path: Path) -> None:
    """B holds its training lock for 30 s. The first push also pays for fresh memory pages; the second is timed."""
    config = fake_config(tmp_path, sites=("A", "B"))
    pool = ray_pool(config, Fault("B", 1, "train", "slow", seconds=30), num_values=12_500_000)
    pool.launch(["A", "B"])
    for site in "AB":
        pool.start(site, resume_round=0)
        assert wait_until(lambda: bool(pool.wait(0.1)))
    pool.submit("B", "train", TrainOrder(1, "exchange", evaluate=False, checkpoint=False), round_number=1)
    assert wait_until(lambda: [status.stage for status in pool.statuses() if status.site == "B"] == ["train"])
    seconds = []
    for number in (1, 2):
        began = time.monotonic()
        pool.submit("A", "push", number, ("B",), 60.0, round_number=number)
        (outcome,) = pool.wait(10.0)
        seconds.append(time.monotonic() - began)
        assert [receipt.accepted for receipt in outcome.result.receipts] == [True]
    pool.shutdown()
    assert seconds[1] < 1.0


def test_receiver_that_is_gone_gives_a_refused_receipt_in_time(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"push_timeout_s": 5.0})
    pool = ray_pool(config)
    pool.launch(["A", "B"])
    transport = ObjectStoreTransport(pool._handles, label_key=None)
    pool.remove("B")
    header, buffer = _export(tmp_path)
    (receipt,) = transport.send(header, buffer, ("B",), timeout_s=5.0)
    assert not receipt.accepted
    assert receipt.reason.startswith("unreachable: ")
    pool.shutdown()


def _export(folder: Path) -> tuple[PushHeader, Buffer]:
    config = fake_config(folder)
    trainer = FakeTrainers()(config, "A", folder, use_gpu=False, on_progress=lambda *_: None)
    return trainer.export("run", 1)
