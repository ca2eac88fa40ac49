"""Flower's simulation: its FedAvg, one worker a core, evaluation off.

A client lives for one message; cases and network stay in the worker's process (:func:`site_work`), as Flower's own
examples keep their data sets.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers.scenario import SITES, Case
from benchmarks.peers.workload import initial_network, site_work


def client_app(folder: Path) -> ClientApp:
    """What a site does with a message: load, train, answer."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        work = site_work(folder, SITES[int(context.node_config["partition-id"])])
        work.network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        work.train(int(message.content["config"]["server-round"]))
        content = {
            "arrays": ArrayRecord(work.network.state_dict()),
            "metrics": MetricRecord({"num-examples": work.num_train}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def server_app(folder: Path, *, num_rounds: int) -> ServerApp:
    """FedAvg over all sites in every round."""
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        del context
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(SITES), min_available_nodes=len(SITES))
        initial = ArrayRecord(initial_network(folder).state_dict())
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=num_rounds)

    return app


def main(folder: Path) -> None:
    """Runs the case."""
    case = Case.read(folder)
    run_simulation(
        server_app=server_app(folder, num_rounds=case.scenario.rounds),
        client_app=client_app(folder),
        num_supernodes=len(SITES),
        backend_config={"init_args": {"num_cpus": case.cores}, "client_resources": {"num_cpus": 1}},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
