"""What a site does in every framework: the same cases in memory, network, loss, optimiser and steps.

Frameworks whose workers serve several sites get them from :func:`site_work`, which reads and builds once a process.
Every finished training is one line in the run's folder: site, round, time, and a few weights. From these lines
alone the benchmark knows how long rounds took, and whether everybody did the same work.

Legend: P values of parameters.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.scenario import Case, config_values
from gcml_ray.config import Config
from gcml_ray.config.file import parse_config
from gcml_ray.data.pooling import cases_to_train_on
from gcml_ray.data.site_data import SiteData
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.model.learner import learning_rate, local_step
from gcml_ray.training.site_learner import build_learner

NUM_PROBED = 32


def site_config(folder: Path) -> Config:
    """The configuration of the case in a folder, as FedAvg."""
    return parse_config(config_values(Case.read(folder), folder, method={"name": "fedavg"}), source="benchmarks.peers")


def initial_network(folder: Path) -> nn.Module:
    """The network with the initial weights that all sites and servers share."""
    config = site_config(folder)
    return build_learner(config, "", config.network, torch.device("cpu")).model.module


def note_training(folder: Path, site: str, round_number: int, weights: Tensor) -> None:
    """Leaves a line about a finished training; ``weights`` (P,)."""
    probed = weights[:: max(1, weights.numel() // NUM_PROBED)][:NUM_PROBED].tolist()
    line = json.dumps({"site": site, "round": round_number, "ended": time.monotonic(), "weights": probed})
    with _events(folder, site).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def num_trainings(folder: Path, site: str) -> int:
    """How often a site has trained in this run."""
    path = _events(folder, site)
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def _events(folder: Path, site: str) -> Path:
    return folder / "events" / f"{site}.jsonl"


class SiteWork:
    """One site: its cases in memory, its network, its steps.

    Args:
        folder: the run's folder, with its case.
        site: which site.
    """

    def __init__(self, folder: Path, site: str) -> None:
        torch.set_num_threads(1)
        self.folder, self.site = folder, site
        self.config = site_config(folder)
        self.data = SiteData(site, cases_to_train_on(self.config, site), self.config.data, seed=0)
        self.data.load()
        self.loss = build_segmentation_loss(self.config.loss, self.config.data)
        self.learner = build_learner(self.config, site, self.config.network, torch.device("cpu"))
        self.learner.model.module.train()

    @property
    def network(self) -> nn.Module:
        """The network in training; frameworks read and load its ``state_dict``."""
        return self.learner.model.module

    @property
    def num_train(self) -> int:
        """Training cases: what a mean over sites weighs by."""
        return self.data.num_cases("train")

    def train(self, round_number: int) -> None:
        """The steps of one round (from 1), on batches that seed, site and round decide."""
        federation = self.config.federation
        for step, batch in enumerate(self.data.batches(round_number, federation.local_steps)):
            rate = learning_rate(self.config.optimiser, federation, round_number=round_number, step=step)
            self.learner.set_learning_rate(rate)
            local_step(self.learner, batch, self.loss)
        note_training(self.folder, self.site, round_number, self.learner.model.parameter.detach())


@functools.cache
def site_work(folder: Path, site: str) -> SiteWork:
    """The site's work in this process."""
    return SiteWork(folder, site)
