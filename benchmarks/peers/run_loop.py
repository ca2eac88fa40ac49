"""The floor: FedAvg as a bare loop in one process and thread. No framework, nothing is sent."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.peers.scenario import SITES, Case
from benchmarks.peers.workload import SiteWork


def main(folder: Path) -> None:
    """Trains site after site, round after round, and averages."""
    case = Case.read(folder)
    works = [SiteWork(folder, site) for site in SITES]
    total = sum(work.num_train for work in works)
    mean = torch.empty_like(works[0].learner.model.flat)
    for number in range(1, case.scenario.rounds + 1):
        for work in works:
            work.train(number)
        mean.zero_()
        for work in works:
            mean.add_(work.learner.model.flat, alpha=work.num_train / total)
        for work in works:
            work.learner.model.load(mean)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
