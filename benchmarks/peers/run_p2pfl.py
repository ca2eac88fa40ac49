"""p2pfl's simulation: nodes in one process over its in-memory protocol, training in its pool of Ray actors.

All nodes are connected to each other and all are in every round's train set, so that its FedAvg is a mean over all.
Settings are p2pfl's own for one machine (``set_standalone_settings``), with a worker a core and longer timeouts: while
large models are packed its nodes are late with their heartbeats, and who is taken for dead is lost for good.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from p2pfl.communication.protocols.protobuff.memory import MemoryCommunicationProtocol
from p2pfl.learning.dataset.p2pfl_dataset import P2PFLDataset
from p2pfl.learning.frameworks import Framework
from p2pfl.learning.frameworks.learner import Learner
from p2pfl.learning.frameworks.p2pfl_model import P2PFLModel
from p2pfl.node import Node
from p2pfl.settings import Settings
from p2pfl.utils.topologies import TopologyFactory, TopologyType
from p2pfl.utils.utils import set_standalone_settings, wait_convergence, wait_to_finish

from benchmarks.peers.scenario import SITES, Case
from benchmarks.peers.workload import initial_network, num_trainings, site_work

LIMIT_S = 3600  # the benchmark's own limit comes first


class Weights(P2PFLModel):  # type: ignore[misc]
    """A model as p2pfl moves it: ``model`` holds the weights by name."""

    model: dict[str, np.ndarray[Any, Any]]

    def get_parameters(self) -> list[np.ndarray[Any, Any]]:
        """The weights, in order."""
        return list(self.model.values())

    def set_parameters(self, params: list[np.ndarray[Any, Any]] | bytes) -> None:
        """Takes over weights, encoded or not."""
        if isinstance(params, bytes):
            params, info = self.decode_parameters(params)
            self.additional_info.update(info)
        self.model = dict(zip(self.model, params, strict=True))

    def get_framework(self) -> str:
        """What p2pfl calls PyTorch."""
        return str(Framework.PYTORCH.value)


class SiteLearner(Learner):  # type: ignore[misc]
    """Trains a site's round; p2pfl ships it to a worker and takes the model that comes back."""

    def __init__(self, folder: Path, site: str) -> None:
        super().__init__()
        self.folder, self.site = folder, site

    def fit(self) -> P2PFLModel:
        """One round."""
        work, model = site_work(self.folder, self.site), self.get_model()
        work.network.load_state_dict({name: torch.from_numpy(value) for name, value in model.model.items()})
        work.train(num_trainings(self.folder, self.site) + 1)
        model.set_parameters([value.numpy() for value in work.network.state_dict().values()])
        model.set_contribution([self.addr], work.num_train)
        return model

    def interrupt_fit(self) -> None:
        """Nothing to interrupt."""

    def evaluate(self) -> dict[str, float]:
        """Off, as everywhere here."""
        return {}

    def get_framework(self) -> str:
        """What p2pfl calls PyTorch."""
        return str(Framework.PYTORCH.value)


def start_nodes(folder: Path) -> list[Node]:
    """A node a site, each with the initial weights, all connected."""
    weights = {name: value.numpy() for name, value in initial_network(folder).state_dict().items()}
    nodes = []
    for site in SITES:
        node = Node(
            Weights({name: value.copy() for name, value in weights.items()}),
            P2PFLDataset(Dataset.from_dict({"unused": [0]})),
            addr=site,
            learner=SiteLearner(folder, site),
            protocol=MemoryCommunicationProtocol(),
        )
        node.start()
        nodes.append(node)
    TopologyFactory.connect_nodes(TopologyFactory.generate_matrix(TopologyType.FULL, len(nodes)), nodes)
    wait_convergence(nodes, len(nodes) - 1, only_direct=False, wait=60)
    return nodes


def main(folder: Path) -> None:
    """Runs the case."""
    case = Case.read(folder)
    set_standalone_settings()
    Settings.training.RAY_ACTOR_POOL_SIZE = case.cores
    Settings.training.AGGREGATION_TIMEOUT = LIMIT_S
    Settings.training.VOTE_TIMEOUT = LIMIT_S
    Settings.heartbeat.TIMEOUT = LIMIT_S
    nodes = start_nodes(folder)
    try:
        nodes[0].set_start_learning(rounds=case.scenario.rounds, epochs=1, trainset_size=len(nodes))
        wait_to_finish(nodes, timeout=LIMIT_S)
    finally:
        for node in nodes:
            node.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
