"""Several sites in one actor: the weights of an actor each, and what happens when the actor dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group_table
from safetensors.numpy import load_file

from actors.ray_pool import RayPool
from gcml_ray.config import Config
from gcml_ray.errors import ClusterError
from gcml_ray.records import RoundRecord, TrainOrder, TrainReport
from tests.cluster.conftest import CPUS, live_actors
from tests.cluster.ray_runs import launched, next_outcomes, ray_pool, run_on_ray, start_all
from tests.fakes import Fault, calls_of, fake_config, final_weights, release, run_folder
from tests.makers import make_config
from tests.runs import RecordingListener, Run, drive, run_locally
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("ray_local")

SITES = "ABCD"
METHOD = {"name": "gcml", "topology": {"name": "matching"}, "merge": "select_best"}
ROUNDS = {"rounds": 4, "local_steps": 2, "warmup_rounds": 1, "cooldown_rounds": 0, "late_factor": None}


def fake(folder: Path, per_actor: int = 2, **sections: Any) -> Config:
    resources = {"sites_per_actor": per_actor} | sections.pop("resources", {})
    return fake_config(folder, sites=SITES, resources=resources, **sections)


def run_where_c_dies(config: Config, *rounds: int) -> Run:
    """C dies in these rounds when its mate A has told of its own: an answer can die with the process that gave it.

    Where A has nothing to tell, C dies all the same, after a while.
    """
    kinds = {"held": 30.0, "die": 0.0}
    faults = [Fault("C", number, "train", kind, seconds) for number in rounds for kind, seconds in kinds.items()]

    def let_die(report: TrainReport) -> None:
        if report.site == "A":
            release(run_folder(config), "C", report.round_number)

    return run_on_ray(config, *faults, listener=RecordingListener(on_trained=let_die))


# --- the same results ----------------------------------------------------------------------------


def test_weights_of_real_sites_in_two_actors_equal_those_of_an_actor_each(tmp_path: Path) -> None:
    runs = {}
    for per_actor in (1, 2):
        (tmp_path / str(per_actor)).mkdir()
        config = make_config(
            tmp_path / str(per_actor),
            num_sites=4,
            spatial_dims=2,
            method=METHOD,
            federation=ROUNDS,
            resources={"sites_per_actor": per_actor},
        )
        runs[per_actor] = drive(config, RayPool(config, config.output.folder, run_id="run"))
    assert [len({info.pid for info in run.summary.infos}) for run in runs.values()] == [4, 2]
    assert any(report.merge for report in runs[2].listener.trained)
    for site in SITES:
        name = f"checkpoints/{site}/round_00004.safetensors"
        alone, together = (load_file(run.folder.path / name) for run in runs.values())
        assert alone.keys() == together.keys()
        for key, values in alone.items():
            np.testing.assert_array_equal(together[key], values, err_msg=f"{site} {key}")


@pytest.mark.parametrize("method", ["gcml", "fedavg"])
def test_weights_of_fake_sites_equal_those_of_the_local_pool(tmp_path: Path, method: str) -> None:
    sections = {} if method == "gcml" else {"method": {"name": method}}
    on_ray = final_weights(run_on_ray(fake(tmp_path / "ray", **sections)).folder)
    locally = final_weights(run_locally(fake(tmp_path / "local", 1, **sections)).folder)
    assert on_ray.keys() == locally.keys()
    for site, weights in locally.items():
        np.testing.assert_array_equal(on_ray[site], weights)


def test_pushes_between_sites_of_one_actor_are_counted_and_signed_as_any_other(tmp_path: Path) -> None:
    run = run_on_ray(fake(tmp_path, 4, wire={"sign": True}))
    assert len({info.pid for info in run.summary.infos}) == 1
    assert len({info.public_key for info in run.summary.infos}) == 4
    pushes = [push for record in run.folder.rounds() for push in record.pushes]
    assert len(pushes) == 16
    assert all(push.accepted and push.size_bytes == 32 for push in pushes)


# --- the end of an actor -----------------------------------------------------------------------


@pytest.mark.usefixtures("waits_for_returns")
def test_a_kill_takes_its_mates_along_and_both_are_back_from_their_checkpoints(tmp_path: Path) -> None:
    """A and C share an actor and A trains first, so C has not trained when it ends."""
    config = fake(tmp_path).model_copy(update={"chaos": "kill:A@r2"})
    run = run_on_ray(config.model_copy(update={"resources": config.resources.model_copy(update={"pool": "ray"})}))
    assert run.summary.status == "finished"
    assert [(f.site, f.round_number, f.culprit) for f, _ in run.listener.failures] == [("A", 2, ""), ("C", 2, "A")]
    assert [run.restored(site) for site in SITES] == [[0, 1], [0], [0, 1], [0]]
    assert [run.trained(site) for site in SITES] == [[1, 3, 4], [1, 2, 3, 4], [1, 3, 4], [1, 2, 3, 4]]
    assert run.summary.dropped == {}


@pytest.mark.usefixtures("waits_for_returns")
def test_a_mate_that_had_done_its_round_is_started_again_too(tmp_path: Path) -> None:
    """C trains after A: A's round 2 is whole, and its checkpoint is where it goes on."""
    run = run_where_c_dies(fake(tmp_path), 2)
    assert [(f.site, f.round_number, f.culprit) for f, _ in run.listener.failures] == [("C", 2, "")]
    assert [run.restored(site) for site in SITES] == [[0, 2], [0], [0, 1], [0]]
    assert [calls_of(run.folder, site, "train") for site in SITES] == [[1, 2, 3, 4]] * 4
    assert run.trained("A") == [1, 2, 3, 4]


@pytest.mark.usefixtures("waits_for_returns")
def test_an_actor_killed_between_rounds_is_found_and_all_its_sites_return(tmp_path: Path) -> None:
    pool = ray_pool(fake(tmp_path))

    def kill(record: RoundRecord) -> None:
        if record.plan.round_number == 1:
            ray.kill(pool._handles["A"].actor, no_restart=False)
            assert wait_until(lambda: is_replaced(pool))

    run = drive(fake(tmp_path), pool, listener=RecordingListener(on_end=kill))
    assert run.summary.status == "finished"
    assert [run.restored(site) for site in SITES] == [[0, 1], [0], [0, 1], [0]]
    assert [run.trained(site)[-2:] for site in SITES] == [[3, 4]] * 4


def is_replaced(pool: RayPool) -> bool:
    """Whether a new process of the first actor answers."""
    try:
        return not ray.get(pool._hosts[0].statuses.options(concurrency_group="control").remote(), timeout=10)
    except ray.exceptions.RayError:
        return False


@pytest.mark.usefixtures("waits_for_returns")
def test_a_hanging_site_is_late_and_its_mates_do_not_wait_for_their_own_timeouts(
    tmp_path: Path, give_up_soon: Callable[[str, str, int], None]
) -> None:
    give_up_soon("A", "train", 2)
    run = run_on_ray(fake(tmp_path), Fault("A", 2, "train", "hang"))
    kinds = [(f.site, f.kind, f.culprit) for f, _ in run.listener.failures]
    assert kinds == [("A", "late", ""), ("C", "unreachable", "A")]
    assert run.summary.status == "finished"
    assert [run.restored(site) for site in SITES] == [[0, 1], [0], [0, 1], [0]]


@pytest.mark.usefixtures("waits_for_returns")
def test_only_the_site_that_dies_in_every_round_is_dropped(tmp_path: Path) -> None:
    run = run_where_c_dies(fake(tmp_path), 1, 2, 3, 4)
    assert list(run.summary.dropped) == ["C"]
    assert run.summary.status == "finished"
    assert [run.trained(site)[-1] for site in "ABD"] == [4, 4, 4]


# --- small calls, room, placement ----------------------------------------------------------------


def test_small_calls_and_pushes_do_not_wait_for_a_mate_that_trains(tmp_path: Path) -> None:
    """Its own status, a push to A, and a push of its mate C, come through before A has trained."""
    config = fake(tmp_path)
    with launched(config, SITES, Fault("A", 1, "train", "held")) as pool:
        start_all(pool, SITES)
        pool.submit("A", "train", TrainOrder(1, "exchange", evaluate=False, checkpoint=False), round_number=1)
        assert wait_until(lambda: [each.stage for each in pool.statuses() if each.site == "A"] == ["train"])
        for sender, receiver in (("C", "A"), ("B", "C")):
            pool.submit(sender, "push", 1, (receiver,), 200.0, round_number=1)
            (pushed,) = next_outcomes(pool)
            assert [receipt.accepted for receipt in pushed.result.receipts] == [True]
        release(run_folder(config), "A", 1)
        (trained,) = next_outcomes(pool)
        assert (trained.site, trained.method, trained.failure) == ("A", "train", None)


def test_room_is_counted_in_actors(tmp_path: Path) -> None:
    """More sites than CPUs: refused with an actor each, fine in two."""
    names = [f"site{number:02d}" for number in range(CPUS + 4)]
    rounds = {"rounds": 1}
    with pytest.raises(ClusterError, match=f"{len(names)} sites"):
        run_on_ray(fake_config(tmp_path / "alone", sites=names, federation=rounds))
    seen: list[int] = []
    listener = RecordingListener(on_end=lambda _: seen.append(len(live_actors())))
    config = fake_config(tmp_path / "two", sites=names, federation=rounds, resources={"sites_per_actor": 6})
    assert run_on_ray(config, listener=listener).summary.status == "finished"
    assert seen == [2]


def test_a_placement_group_has_a_bundle_an_actor(tmp_path: Path) -> None:
    def note(_: RoundRecord) -> None:
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        seen.extend(len(group["bundles"]) for group in groups)

    seen: list[int] = []
    config = fake(tmp_path, federation={"rounds": 1}, resources={"placement": "pg", "cpus_per_site": CPUS / 2})
    assert run_on_ray(config, listener=RecordingListener(on_end=note)).summary.status == "finished"
    assert seen == [2]


@pytest.mark.usefixtures("waits_for_returns")
def test_a_site_can_leave_and_come_back_while_its_mate_goes_on(tmp_path: Path) -> None:
    schedule = {"C": {"joins": 1, "leaves": 3}, "D": {"joins": 3}}
    run = run_on_ray(fake(tmp_path, federation={"rounds": 5, "schedule": schedule}))
    assert run.summary.status == "finished"
    assert run.trained("A") == [1, 2, 3, 4, 5]
    assert run.trained("C") == [1, 2]
    assert run.trained("D")[-1] == 5
    assert calls_of(run.folder, "A", "start") == [0]
