"""A cluster of several nodes on this machine: the driver on its own, one node a site."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.experimental.locations import get_object_locations

from actors import sync_rounds
from actors.object_store import ObjectStoreTransport
from actors.ray_pool import SiteActor
from benchmarks import push
from gcml_ray.errors import ClusterError
from gcml_ray.push.wire import PushHeader
from gcml_ray.records import PushReceipt, RoundRecord, SiteStatus
from tests.cluster.conftest import live_actors
from tests.cluster.ray_runs import run_on_ray
from tests.fakes import FakeTrainers, fake_config
from tests.runs import RecordingListener
from tests.waiting import wait_until

SITES = ("A", "B")
LABELLED = {"resources": {"placement": "label"}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Head without CPUs for the driver, a node of 2 CPUs a site; replaces the cluster of the other tests."""
    ray.shutdown()
    head = {"num_cpus": 0, "labels": {"site": "driver"}, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": 200 * 2**20})
    for site in SITES:
        made.add_node(num_cpus=2, labels={"site": site}, object_store_memory=300 * 2**20)
    made.wait_for_nodes()
    ray.init(made.address, namespace="gcml", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(autouse=True)
def _leaves_no_actor(cluster: Cluster) -> Iterator[None]:
    del cluster
    yield
    assert wait_until(lambda: not live_actors()), f"left alive: {live_actors()}"


def node_ids() -> dict[str, str]:
    """The id of every node by its label."""
    return {node["Labels"]["site"]: node["NodeID"] for node in ray.nodes()}


class RecordingTransport(ObjectStoreTransport):
    """Writes down where a pushed buffer lies after its receivers have answered; Ray may hear of it later than they."""

    def __init__(self, *arguments: Any, file: Path, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._file = file

    def _send_reference(
        self, header: PushHeader, reference: Any, receivers: Sequence[str], *, size_bytes: int, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        receipts = super()._send_reference(header, reference, receivers, size_bytes=size_bytes, timeout_s=timeout_s)

        def nodes() -> list[str]:
            return list(get_object_locations([reference])[reference]["node_ids"])

        assert wait_until(lambda: len(nodes()) > len(receivers)), f"Ray knows of no more copies than {nodes()}"
        line = {"sender": header.sender, "receivers": list(receivers), "nodes": nodes()}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return receipts


@pytest.mark.parametrize("num_values", [8, 12_500_000], ids=["32-bytes", "50-MB"])
def test_pushed_weights_are_never_on_the_drivers_node(tmp_path: Path, num_values: int) -> None:
    """Small objects are the ones that Ray would otherwise carry inside messages through the driver."""
    file = tmp_path / "locations.jsonl"
    config = fake_config(tmp_path, sites=SITES, federation={"rounds": 2}, **LABELLED)
    run = run_on_ray(config, num_values=num_values, make_transport=partial(RecordingTransport, file=file))
    ids = node_ids()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert ids["driver"] not in line["nodes"]
        assert set(line["nodes"]) == {ids[line["sender"]], *(ids[name] for name in line["receivers"])}
    assert all(push.accepted and push.size_bytes == 4 * num_values for push in run.folder.transfers())


def test_site_on_the_node_of_another_refuses_to_touch_its_data(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=SITES, **LABELLED)
    actor = SiteActor.options(num_cpus=1, label_selector={"site": "B"}).remote(
        config, "A", config.output.folder, run_id="run", use_gpu=False, make_trainer=FakeTrainers()
    )
    with pytest.raises(ClusterError, match="site A was placed on a node labelled site=B"):
        ray.get(actor.start.remote(ObjectStoreTransport({}, label_key="site"), SITES, 0), timeout=120)
    assert not (tmp_path / "run").exists()
    ray.kill(actor)


def test_site_whose_label_has_no_node_is_refused_before_any_site_starts(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no living node has the label site=C.*there are: \['A', 'B'.*'driver'\]"):
        run_on_ray(fake_config(tmp_path, sites=(*SITES, "C"), **LABELLED))


def test_site_whose_node_is_lost_is_dropped_after_the_rejoin_timeout_and_the_rest_finish(
    tmp_path: Path, cluster: Cluster
) -> None:
    """Its data are there and nowhere else, so it can only wait for the node."""
    lost = cluster.add_node(num_cpus=2, labels={"site": "C"}, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()

    def lose(record: RoundRecord) -> None:
        if record.plan.round_number == 1:
            cluster.remove_node(lost)

    config = fake_config(tmp_path, sites=(*SITES, "C"), federation={"rejoin_timeout_s": 6.0}, **LABELLED)
    run = run_on_ray(config, listener=RecordingListener(on_end=lose))
    assert run.summary.status == "finished"
    assert list(run.summary.dropped) == ["C"]
    assert [run.trained(site) for site in (*SITES, "C")] == [[1, 2, 3, 4], [1, 2, 3, 4], [1]]


def test_site_whose_node_is_lost_for_a_while_goes_on_there_from_its_checkpoint(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve seconds are more than the first few attempts to reach it take."""
    monkeypatch.setattr(sync_rounds, "RETURN_PATIENCE", 1e4)  # rounds of fakes are over in milliseconds
    lost = cluster.add_node(num_cpus=2, labels={"site": "D"}, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()

    class Engineer(RecordingListener):
        """Takes the node away after round 1, and brings it back when that has been long enough."""

        lost_at = 0.0

        def on_round_end(self, record: RoundRecord) -> None:
            super().on_round_end(record)
            if record.plan.round_number == 1:
                cluster.remove_node(lost, allow_graceful=False)
                self.lost_at = time.monotonic()

        def on_status(self, statuses: Sequence[SiteStatus]) -> None:
            super().on_status(statuses)
            if self.lost_at and time.monotonic() > self.lost_at + 12:
                self.lost_at = 0.0
                cluster.add_node(num_cpus=2, labels={"site": "D"}, object_store_memory=100 * 2**20)

    config = fake_config(tmp_path, sites=(*SITES, "D"), federation={"rejoin_timeout_s": 120.0, "rounds": 6}, **LABELLED)
    run = run_on_ray(config, listener=Engineer())
    assert (run.summary.status, run.summary.dropped) == ("finished", {})
    assert run.trained("D")[-1] == 6
    assert run.restored("D") == [0, 1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_benchmark_of_pushes_works_on_one_node_and_on_two(cluster: Cluster, nodes: int) -> None:
    del cluster
    push_s, take_s, memcpy_s = push.measure(1, repeats=1, wire={}, nodes=nodes)
    assert push_s > take_s > 0
    assert memcpy_s > 0
