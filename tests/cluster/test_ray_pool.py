"""The driver over Ray actors of fake trainers: results, placement, clean ends."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import memory_summary

from actors.cluster import check_capacity, nodes
from actors.ray_pool import RayPool, SiteActor
from actors.run import run_federation
from gcml_ray.config import Config
from gcml_ray.errors import ClusterError, SiteError
from gcml_ray.records import WAITS_FOR_ROOM, RoundRecord, SiteStatus
from tests.cluster.conftest import live_actors, placement_groups
from tests.cluster.ray_runs import launched, run_on_ray
from tests.fakes import FakeTrainers, Fault, fake_config, final_weights
from tests.runs import RecordingListener, drive, run_locally
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("ray_local")


def test_weights_of_fake_trainers_equal_those_of_the_local_pool(tmp_path: Path) -> None:
    on_ray = final_weights(run_on_ray(fake_config(tmp_path / "ray")).folder)
    locally = final_weights(run_locally(fake_config(tmp_path / "local")).folder)
    for site in "ABC":
        np.testing.assert_array_equal(on_ray[site], locally[site])


def test_sites_are_processes_of_their_own(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path, federation={"rounds": 1}))
    assert len({info.pid for info in run.summary.infos}) == 3


def test_actor_never_repeats_a_call_and_always_restarts() -> None:
    options: Any = SiteActor._default_options
    assert (options["max_task_retries"], options["max_restarts"]) == (0, -1)


@pytest.mark.parametrize("placement", ["none", "pg"])
def test_placement_without_labels_runs(tmp_path: Path, placement: str) -> None:
    seen: list[int] = []
    listener = RecordingListener(on_end=lambda _: seen.append(placement_groups()))
    config = fake_config(tmp_path, federation={"rounds": 1}, resources={"placement": placement})
    run = run_on_ray(config, listener=listener)
    assert run.summary.status == "finished"
    assert seen == [1 if placement == "pg" else 0]


def test_malformed_push_is_refused_across_processes(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path, federation={"rounds": 2}), Fault("A", 2, "export", "nan"))
    (refused,) = [push for record in run.folder.rounds() for push in record.pushes if not push.accepted]
    assert (refused.sender, refused.receiver, refused.reason.split(":")[0]) == ("A", "B", "not finite")
    assert run.summary.status == "finished"


def test_site_that_raises_is_told_with_its_own_words(tmp_path: Path) -> None:
    run = run_on_ray(fake_config(tmp_path, federation={"rounds": 2}), Fault("B", 1, "train", "raise"))
    failure = run.folder.rounds()[0].failures[0]
    assert (failure.kind, failure.error_type, failure.message) == (
        "raised",
        "ValueError",
        "broken train of B in round 1",
    )
    assert "in _fail" in failure.traceback
    assert run.trained("B") == [2]


def test_start_failures_are_reported_together(tmp_path: Path) -> None:
    faults = [Fault("A", 0, "start", "raise"), Fault("C", 0, "start", "die")]
    with pytest.raises(SiteError, match=r"(?s)site A: broken start of A in round 0.*site C: "):
        run_on_ray(fake_config(tmp_path), *faults)


# --- a cluster that others use -----------------------------------------------------------------


@ray.remote(num_cpus=7)
class OtherJob:
    """Leaves room for one of three sites."""

    def is_there(self) -> bool:
        return True


@pytest.fixture
def other_job(ray_local: None) -> Iterator[Any]:  # noqa: ARG001 - it has to be there first
    job = OtherJob.remote()
    try:
        assert ray.get(job.is_there.remote(), timeout=120)
        yield job
    finally:
        ray.kill(job)


@pytest.mark.usefixtures("other_job")
def test_start_that_finds_no_room_says_that_others_have_it(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"start_timeout_s": 8})
    with pytest.raises(SiteError, match=r"site \w, \w.*: no answer within 8 s: it has no process yet; other jobs hold"):
        run_on_ray(config)  # the third finds room, and has its process where the machine is fast


def test_run_begins_as_soon_as_there_is_room(tmp_path: Path, other_job: Any) -> None:
    waited: set[str] = set()

    class Patient(RecordingListener):
        def on_status(self, statuses: Sequence[SiteStatus]) -> None:
            waited.update(status.site for status in statuses if status.stage == WAITS_FOR_ROOM)
            if len(waited) >= 2:
                ray.kill(other_job)

    run = run_on_ray(fake_config(tmp_path, federation={"rounds": 1}), listener=Patient())
    assert run.summary.status == "finished"
    assert len(waited) >= 2  # the third has room, and is counted where its process starts slowly


class CannotTravel(FakeTrainers):
    """Trainers that no other process can load: as if a module were missing there."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


def test_process_that_cannot_be_set_up_says_why(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    pool = RayPool(config, config.output.folder, run_id="run", make_trainer=CannotTravel([]))
    with pytest.raises(SiteError, match=r"site A, B, C: its process could not be set up: ValueError: .*'no number'"):
        drive(config, pool)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_alive_when_the_driver_is_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupt(_: RoundRecord) -> None:
        assert len(live_actors()) == 3
        assert placement_groups() == 1
        raise error

    config = fake_config(tmp_path, resources={"pool": "ray", "placement": "pg"})
    listener = RecordingListener(on_end=interrupt)
    with pytest.raises(error):
        run_federation(config, listener=listener, stop=threading.Event(), make_trainer=FakeTrainers())


def test_plasma_does_not_grow_with_the_rounds(tmp_path: Path) -> None:
    """30 rounds put 90 buffers of 1 MB. This Ray frees once a second; then at most the last round's 3 are left."""

    def measure(record: RoundRecord) -> None:
        if record.plan.round_number == 30:
            assert wait_until(lambda: plasma_objects() <= 3)

    config = fake_config(tmp_path, federation={"rounds": 30})
    run = run_on_ray(config, listener=RecordingListener(on_end=measure), num_values=250_000)
    assert run.summary.status == "finished"
    pushes = [push for record in run.folder.rounds() for push in record.pushes]
    assert [(push.accepted, push.size_bytes) for push in pushes] == [(True, 1_000_000)] * 90


def plasma_objects() -> int:
    """Objects in the store of this node."""
    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    found = re.search(r"Plasma memory usage \d+ MiB, (\d+) objects", summary)
    assert found, summary
    return int(found.group(1))


# --- what does not fit -------------------------------------------------------------------------


def refusal_of(config: Config) -> str:
    """The message of a launch that must fail before any site is waited for, which would be another error."""
    with pytest.raises(ClusterError) as error:
        run_on_ray(config)
    return str(error.value)


def test_more_gpus_than_there_are_is_refused_at_once(tmp_path: Path) -> None:
    message = refusal_of(fake_config(tmp_path, resources={"gpus_per_site": 1.0}))
    assert "the cluster has 8 CPU and 2 GPU on 1 node(s), room for 2 site(s)" in message
    assert "--set resources.gpus_per_site=0.5" in message


def test_label_that_no_node_has_is_refused_at_once(tmp_path: Path) -> None:
    message = refusal_of(fake_config(tmp_path, resources={"placement": "label", "label_key": "hospital"}))
    assert "no living node has the label hospital=A" in message


@pytest.fixture
def crowded(ray_local: None) -> Iterator[None]:  # noqa: ARG001 - it comes first
    """A cluster of which another job holds nearly all CPUs."""

    @ray.remote(num_cpus=7)
    class Other:
        def hold(self) -> None:
            """Being there is enough."""

    other = Other.remote()
    try:
        ray.get(other.hold.remote(), timeout=120)
        yield
    finally:
        ray.kill(other)


@pytest.mark.usefixtures("crowded")
def test_places_that_others_hold_are_refused_after_the_start_timeout(tmp_path: Path) -> None:
    config = fake_config(tmp_path, resources={"placement": "pg"}, federation={"start_timeout_s": 1.0})
    check_capacity(config.resources, "ABC", nodes())
    with pytest.raises(ClusterError, match=r"did not free 3 x .* within 1 s"):
        run_on_ray(config)


@pytest.mark.usefixtures("crowded")
def test_a_run_that_waits_for_places_can_be_stopped(tmp_path: Path) -> None:
    config = fake_config(tmp_path, resources={"pool": "ray", "placement": "pg"}, federation={"start_timeout_s": 500.0})
    listener = RecordingListener()

    def stop_once_it_waits() -> None:
        if wait_until(lambda: placement_groups() == 1):
            listener.stop.set()

    threading.Thread(target=stop_once_it_waits, daemon=True).start()
    summary = run_federation(config, listener=listener, stop=listener.stop, make_trainer=FakeTrainers())
    assert summary.status == "stopped"
    assert placement_groups() == 0


def test_a_run_keeps_the_connection_to_ray_that_there_was(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 1}, resources={"pool": "ray"})
    listener = RecordingListener()
    summary = run_federation(config, listener=listener, stop=listener.stop, make_trainer=FakeTrainers())
    assert summary.status == "finished"
    assert ray.is_initialized()


def test_pool_can_be_shut_down_twice(tmp_path: Path) -> None:
    with launched(fake_config(tmp_path), "A") as pool:
        pool.shutdown()
    assert pool.statuses() == []
