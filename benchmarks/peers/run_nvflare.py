"""NVFlare's simulator, a process a site: its FedAvg recipe, and its swarm recipe, where a site aggregates.

Tensors are exchanged as PyTorch tensors, without conversion to NumPy; no model selection.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.app_opt.pt.recipes.swarm import SwarmLearningRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv

from benchmarks.peers.scenario import SITES, Case
from benchmarks.peers.workload import initial_network, site_config

CLIENT = str(Path(__file__).with_name("nvflare_client.py"))


def network_arguments(folder: Path) -> dict[str, Any]:
    """The network as NVFlare wants it: a class and its arguments."""
    options = site_config(folder).network.options
    arguments = {"spatial_dims": 3, "in_channels": 2, "out_channels": 2, **options}
    return {"class_path": "monai.networks.nets.UNet", "args": arguments}


def main(folder: Path) -> None:
    """Runs the case."""
    case = Case.read(folder)
    weights = folder / "initial.pt"
    torch.save(initial_network(folder).state_dict(), weights)
    common: dict[str, Any] = {
        "name": "peers",
        "model": network_arguments(folder),
        "initial_ckpt": str(weights),
        "num_rounds": case.scenario.rounds,
        "min_clients": len(SITES),
        "train_script": CLIENT,
    }
    if case.contender == "nvflare":
        recipe = FedAvgRecipe(**common, train_args=str(folder), server_expected_format=ExchangeFormat.PYTORCH)
    else:
        recipe = SwarmLearningRecipe(
            **common,
            train_args={"script_args": str(folder)},
            aggregation_format=ExchangeFormat.PYTORCH,
            key_metric=None,
        )
    recipe.execute(SimEnv(clients=list(SITES), num_threads=len(SITES), workspace_root=str(folder / "workspace")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
