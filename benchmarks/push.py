"""What a push costs from one site's model to another's, against one memcpy of the same bytes.

Two site actors on one node, or each on a node of its own (two raylets on this machine, so that the weights go through
a socket from one object store to the other). "push": header and checksum, into the object store, the receiver's check,
the acknowledgement; "take": the receiver's copy into its own model. Medians over repeats, in one invocation.

    python -m benchmarks.push --megabytes 1 5 50 200
    python -m benchmarks.push --nodes 2
    python -m benchmarks.push --wire '{sign: true}'
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml
from ray.cluster_utils import Cluster

from actors.cluster import FREE_PERIOD, FREE_PERIOD_MS, connected
from actors.object_store import ObjectStoreTransport
from actors.ray_pool import SiteActor
from gcml_ray.config import Config, ResourcesConfig
from gcml_ray.config.file import parse_config
from gcml_ray.push.wire import WIRE_DTYPE, Buffer, Expectation, PushHeader, TensorSpec, checksum
from gcml_ray.records import EvaluationReport, Peer, SiteInfo, Split, TrainOrder, TrainReport

SITES = ("A", "B")
TIMEOUT_S = 60.0
STORE_BYTES = 2 * 2**30  # of each of two nodes: a few pushes of 500 MB


class BufferTrainer:
    """A model that is nothing but its ``num_values`` weights; ``train_round`` takes what came in."""

    def __init__(self, config: Config, site: str, folder: Path, *, num_values: int, **_: Any) -> None:
        del config, folder
        self.site = site
        self.num_values = num_values
        self.layout = (TensorSpec("weights", (self.num_values,), WIRE_DTYPE, 0),)

    def start(self, *, resume_round: int) -> SiteInfo:
        """Fills the weights."""
        del resume_round
        self.weights: Buffer = np.random.default_rng(0).random(self.num_values, dtype=np.float32)
        self.spare = self.weights.copy()
        return SiteInfo(self.site, 1, 1, 1, self.num_values, 4 * self.num_values, "cpu", "", 0, 0, 0.0)

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """As ``SiteTrainer``: header, checksum, and a view of the weights."""
        digest = checksum(self.weights)
        return PushHeader(
            run_id, round_number, self.site, 1, "", "", self.layout, self.num_values, WIRE_DTYPE, digest
        ), self.weights

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """Any round is fresh."""
        del sender
        return Expectation(run_id, peers, "", "", self.layout, self.num_values, 0, 10**9)

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """Copies what came in into the own weights; the report says how long that and a plain memcpy took."""
        seconds = {"take": _seconds(lambda: self._take(pushes))}
        seconds["memcpy"] = _seconds(lambda: np.copyto(self.spare, self.weights))
        return TrainReport(self.site, order.round_number, (), 0, {}, {}, "", {}, None, False, seconds, 0.0, 0)

    def _take(self, pushes: Sequence[tuple[PushHeader, Buffer]]) -> None:
        for _, buffer in pushes:
            np.copyto(self.weights, buffer)

    def evaluate(self, *, split: Split, model: str) -> EvaluationReport:
        """Nothing to score."""
        return EvaluationReport(self.site, split, model, 0, (), 0.0)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@contextmanager
def two_nodes() -> Iterator[None]:
    """A connection to a cluster of two raylets on this machine, each labelled with the site that it is for."""
    os.environ.setdefault(FREE_PERIOD, FREE_PERIOD_MS)
    with tempfile.TemporaryDirectory(prefix="gcp", ignore_cleanup_errors=True) as folder:  # a socket's path is short
        os.environ["RAY_TMPDIR"] = folder
        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        head = node | {"include_dashboard": False, "labels": {"site": SITES[0]}}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**node, labels={"site": SITES[1]})
            cluster.wait_for_nodes()
            ray.init(cluster.address, namespace="gcml", log_to_driver=False, logging_level=logging.ERROR)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]


def measure(megabytes: int, *, repeats: int, wire: dict[str, Any], nodes: int) -> tuple[float, float, float]:
    """Median seconds of push, take and memcpy."""
    config = _config(wire)
    make_trainer = partial(BufferTrainer, num_values=megabytes * 1_000_000 // 4)
    handles = {
        site: SiteActor.options(num_cpus=0.5, label_selector={"site": site} if nodes > 1 else None).remote(
            config, site, "unused", run_id="push", use_gpu=False, make_trainer=make_trainer
        )
        for site in SITES
    }
    transport = ObjectStoreTransport(handles, label_key=None)
    infos = ray.get([handle.start.remote(transport, SITES, 0) for handle in handles.values()], timeout=TIMEOUT_S)
    peers = {info.site: Peer(info.public_key, info.num_train) for info in infos}
    ray.get([handle.register.remote(transport, peers) for handle in handles.values()], timeout=TIMEOUT_S)
    rows = []
    for number in range(1, repeats + 3):
        push = handles["A"].push.options(concurrency_group="push")
        began = time.perf_counter()
        report = ray.get(push.remote(number, ("B",), TIMEOUT_S), timeout=TIMEOUT_S)
        seconds = time.perf_counter() - began
        if not report.receipts[0].accepted:
            raise RuntimeError(report.receipts[0].reason)
        order = TrainOrder(number, "exchange", evaluate=False, checkpoint=False)
        taken = ray.get(handles["B"].train.remote(order), timeout=TIMEOUT_S).seconds
        rows.append((seconds, taken["take"], taken["memcpy"]))
    for handle in handles.values():
        ray.kill(handle)
    push_s, take_s, memcpy_s = (statistics.median(column) for column in zip(*rows[2:], strict=True))
    return push_s, take_s, memcpy_s


def _config(wire: dict[str, Any]) -> Config:
    """A configuration whose data are never read."""
    return parse_config(
        {
            "name": "push",
            "data": {
                "datalist": "unused",
                "channels": ["c"],
                "labels": {"background": 0, "one": 1},
                "spacing_is_real": False,
                "patch_size": [8, 8, 8],
            },
            "network": {"name": "unet"},
            "optimiser": {"learning_rate": 1e-3},
            "method": {"name": "gossip_avg", "topology": {"name": "ring"}},
            "federation": {"rounds": 1, "local_steps": 1},
            "wire": wire,
            "output": {"folder": "unused"},
        },
        source="benchmarks/push.py",
    )


def main() -> None:
    """Prints a line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 5, 50, 200])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="2: each site on a node of its own")
    parser.add_argument("--wire", type=yaml.safe_load, default={}, help="the wire section of a configuration")
    options = parser.parse_args()
    with two_nodes() if options.nodes > 1 else connected(ResourcesConfig(address="local")):
        for megabytes in options.megabytes:
            push_s, take_s, memcpy_s = measure(
                megabytes, repeats=options.repeats, wire=options.wire, nodes=options.nodes
            )
            print(
                f"{megabytes:4d} MB: push {1e3 * push_s:7.1f} ms, take {1e3 * take_s:6.1f} ms, memcpy "
                f"{1e3 * memcpy_s:6.1f} ms; buffer to model {(push_s + take_s) / memcpy_s:.1f} x one memcpy"
            )


if __name__ == "__main__":
    main()
