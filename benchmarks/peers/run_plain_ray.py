"""A plain loop over Ray actors: gossip averaging with one flat buffer a push, and nothing else.

What the mechanics of Ray cost at least: no checks, no records, no checkpoints, and whatever goes wrong ends it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray

from benchmarks.peers.scenario import SITES, Case

WAIT_S = 300.0


@ray.remote(concurrency_groups={"inbox": 1})
class PlainSite:
    """A site that pushes, receives and trains."""

    def __init__(self, folder: Path, site: str) -> None:
        from gcml_ray.lean_imports import import_monai  # noqa: PLC0415 - as any site's process does

        import_monai()
        from benchmarks.peers.workload import SiteWork  # noqa: PLC0415 - the driver imports no torch

        self.work = SiteWork(folder, site)
        self.incoming: Any = None

    def push(self, receiver: Any) -> None:
        """Sends the weights to another site."""
        buffer = ray.put(self.work.learner.model.flat.numpy())
        ray.get(receiver.receive.options(concurrency_group="inbox").remote(buffer, self.work.num_train), timeout=WAIT_S)

    def receive(self, buffer: Any, num_train: int) -> None:
        """Keeps what came in until the next training."""
        self.incoming = buffer, num_train

    def train(self, round_number: int) -> None:
        """The mean of both, weighted by training cases; then the round's steps."""
        import torch  # noqa: PLC0415 - as above

        if self.incoming is not None:
            buffer, num_train = self.incoming
            share = num_train / (num_train + self.work.num_train)
            self.work.learner.model.flat.lerp_(torch.from_numpy(buffer), share)
            self.incoming = None
        self.work.train(round_number)


def main(folder: Path) -> None:
    """Runs the case: every site pushes to one other in every round, as the topology ``push_k`` does."""
    case = Case.read(folder)
    share = min(1.0, case.cores / len(SITES))
    ray.init("local", num_cpus=case.cores, include_dashboard=False, log_to_driver=False)
    try:
        sites = [PlainSite.options(num_cpus=share).remote(folder, site) for site in SITES]  # type: ignore[attr-defined]
        for number in range(1, case.scenario.rounds + 1):
            step = 1 + number % (len(sites) - 1)
            pushes = [site.push.remote(sites[(place + step) % len(sites)]) for place, site in enumerate(sites)]
            ray.get(pushes, timeout=WAIT_S)
            ray.get([site.train.remote(number) for site in sites], timeout=WAIT_S)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
