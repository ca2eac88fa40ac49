"""Sites that die, are killed or hang: the round completes without them, and they come back from their checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.object_store import ObjectStoreTransport
from actors.ray_pool import RayPool
from gcml_ray.push.wire import Buffer, PushHeader
from gcml_ray.records import RoundRecord, TrainOrder, TrainReport
from tests.cluster.conftest import live_actors
from tests.cluster.ray_runs import launched, next_outcomes, ray_pool, run_on_ray, start_all
from tests.fakes import FakeTrainers, Fault, calls_of, fake_config, final_weights, release, run_folder
from tests.runs import RecordingListener, Run, drive
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("ray_local", "waits_for_returns")

GiveUp = Callable[[str, str, int], None]


def test_site_that_dies_in_training_restarts_from_its_checkpoint_and_others_go_on(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path), Fault("B", 2, "train", "die"))
    assert run.failures() == [("B", 2, "unreachable", "restart")]
    assert run.listener.failures[0][0].message == "its process has ended, or cannot be reached"
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

    def kill(record: RoundRecord) -> None:
        if record.plan.round_number == 1:
            ray.kill(pool._handles["B"], no_restart=False)
            assert wait_until(lambda: is_replaced(pool, "B"))

    run = drive(fake_config(tmp_path), pool, listener=RecordingListener(on_end=kill))
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
    pool = ray_pool(config, Fault("B", 2, "train", "held"))

    def kill(report: TrainReport) -> None:
        if (report.site, report.round_number) == ("A", 2):
            ray.kill(pool._handles["B"], no_restart=False)

    run = drive(config, pool, listener=RecordingListener(on_trained=kill))
    assert run.failures() == [("B", 2, "unreachable", "restart")]
    assert run.restored("B") == [0, 1]
    assert [report.site for report in run.folder.rounds()[2].trained] == ["A", "B", "C"]


def test_site_that_is_killed_before_the_test_is_started_again_and_tested(tmp_path: Path) -> None:
    pool = ray_pool(fake_config(tmp_path))

    def kill(record: RoundRecord) -> None:
        if record.plan.round_number == 4:
            ray.kill(pool._handles["B"], no_restart=False)
            assert wait_until(lambda: is_replaced(pool, "B"))

    run = drive(fake_config(tmp_path), pool, listener=RecordingListener(on_end=kill))
    assert [(site, decision) for site, _, _, decision in run.failures()] == [("B", "restart")]
    assert run.restored("B") == [0, 4]
    assert run.summary.untested == ()
    assert sorted(report.site for report in run.summary.evaluations) == ["A", "B", "C"]


def test_hanging_site_is_late_restarted_and_the_round_completes(tmp_path: Path, give_up_soon: GiveUp) -> None:
    give_up_soon("B", "train", 2)
    run = run_on_ray(fake_config(tmp_path), Fault("B", 2, "train", "hang"))
    assert run.failures() == [("B", 2, "late", "restart")]
    assert run.summary.status == "finished"
    assert run.trained("B") == [1, 3, 4]
    assert run.restored("B") == [0, 1]


def test_site_that_hangs_in_its_push_is_restarted(tmp_path: Path, give_up_soon: GiveUp) -> None:
    give_up_soon("B", "push", 2)
    run = run_on_ray(fake_config(tmp_path), Fault("B", 2, "export", "hang"))
    assert run.failures() == [("B", 2, "late", "restart")]
    check_lost_in_a_push(run)


def test_site_that_dies_in_every_round_is_dropped_and_the_rest_finish(tmp_path: Path) -> None:
    faults = [Fault("B", number, "train", "die") for number in range(1, 5)]
    run = run_on_ray(fake_config(tmp_path), *faults)
    assert [decision for *_, decision in run.failures()] == ["restart", "restart", "drop"]
    assert list(run.summary.dropped) == ["B"]
    assert [run.trained(site) for site in "AC"] == [[1, 2, 3, 4]] * 2


def test_statuses_of_a_restarted_site_are_those_of_its_new_process(tmp_path: Path) -> None:
    with launched(fake_config(tmp_path), "A") as pool:
        start_all(pool, "A")
        assert wait_until(lambda: [status.stage for status in pool.statuses()] == ["ready"])
        pool.restart("A")
        assert pool.statuses() == []
        assert wait_until(lambda: [status.stage for status in pool.statuses()] == ["created"])


def test_push_of_50_mb_is_acknowledged_while_its_receiver_trains(tmp_path: Path) -> None:
    """B holds its training lock until it is released, after the receipt."""
    config = fake_config(tmp_path, sites=("A", "B"))
    with launched(config, "AB", Fault("B", 1, "train", "held"), num_values=12_500_000) as pool:
        start_all(pool, "AB")
        pool.submit("B", "train", TrainOrder(1, "exchange", evaluate=False, checkpoint=False), round_number=1)
        assert wait_until(lambda: [status.stage for status in pool.statuses() if status.site == "B"] == ["train"])
        pool.submit("A", "push", 1, ("B",), 200.0, round_number=1)
        (pushed,) = next_outcomes(pool)
        assert [receipt.accepted for receipt in pushed.result.receipts] == [True]
        release(run_folder(config), "B", 1)
        (trained,) = next_outcomes(pool)
        assert (trained.site, trained.method, trained.failure) == ("B", "train", None)


def test_receiver_that_is_gone_gives_a_refused_receipt_and_is_not_waited_for(tmp_path: Path) -> None:
    with launched(fake_config(tmp_path), "AB") as pool:
        transport = ObjectStoreTransport(pool._handles, label_key=None)
        pool.remove("B")
        assert wait_until(lambda: "site/B/run" not in live_actors())
        (receipt,) = transport.send(*_export(tmp_path), ("B",), timeout_s=200.0)
        assert not receipt.accepted
        assert receipt.reason.startswith("unreachable: ")
        assert "in time" not in receipt.reason


def test_receiver_that_the_sender_does_not_know_yet_gives_a_refused_receipt(tmp_path: Path) -> None:
    """Who has just joined may be in the graph before every site was told of it."""
    transport = ObjectStoreTransport({}, label_key=None)
    (receipt,) = transport.send(*_export(tmp_path), ("B",), timeout_s=5.0)
    assert (receipt.receiver, receipt.accepted) == ("B", False)
    assert receipt.reason == "unreachable: the sender does not know the receiver yet"


def _export(folder: Path) -> tuple[PushHeader, Buffer]:
    config = fake_config(folder)
    trainer = FakeTrainers()(config, "A", folder, use_gpu=False, on_progress=lambda *_: None)
    return trainer.export("run", 1)
