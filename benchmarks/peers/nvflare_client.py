"""A site under NVFlare: receives the model, trains, sends it back, as NVFlare's client API has it."""

from __future__ import annotations

import sys
from pathlib import Path

import nvflare.client as flare

from benchmarks.peers.workload import site_work


def main(folder: Path) -> None:
    """Serves the rounds of the job."""
    flare.init()
    work = site_work(folder, flare.get_site_name())
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        work.network.load_state_dict(model.params)
        work.train(model.current_round + 1)
        weights = {name: value.detach().clone() for name, value in work.network.state_dict().items()}
        flare.send(flare.FLModel(params=weights, meta={"NUM_STEPS_CURRENT_ROUND": work.num_train}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
