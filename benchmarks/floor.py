"""How much of a federation's time is its training time.

The floor is the bare PyTorch loop of all sites' steps, divided by the cores that the sites may use. The same
steps are then run as a federation (each site a Ray actor, gossip averaging: every site pushes every round);
efficiency = floor / wall time of its rounds. Both are run in turn, several times, in one invocation.

    python -m benchmarks.floor --sites 4 --rounds 10 --steps 10 --repeats 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from actors.federation import ray_session, run_federation
from actors.listener import NullListener
from gcml_ray.config import Config
from gcml_ray.config_file import parse_config
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom
from gcml_ray.records import TrainOrder
from gcml_ray.run_folder import RunFolder
from gcml_ray.trainer import SiteTrainer

SHAPE = (36, 32, 20)


def make_config(folder: Path, *, num_sites: int, rounds: int, steps: int, cores: int, run: str) -> Config:
    """A federation that only trains and pushes: no validation before the end, no checkpoint before the end."""
    datalist = folder / "datalist.json"
    if not datalist.exists():
        names = [f"site{number}" for number in range(1, num_sites + 1)]
        cases = prepare_phantom(folder / "volumes", sites=names, cases_per_site=6, shape=SHAPE, seed=0)
        write_datalist(datalist, cases, description="benchmark")
    return parse_config(
        {
            "name": "floor",
            "data": {
                "datalist": str(datalist),
                "channels": ["t1", "flair"],
                "labels": {"background": 0, "lesion": 1},
                "spacing_is_real": True,
                "patch_size": list(SHAPE),
                "batch_size": 2,
            },
            "network": {"name": "unet", "options": {"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1}},
            "optimiser": {"learning_rate": 1e-3},
            "method": {"name": "gossip_avg", "topology": {"name": "push_k", "k": 1}},
            "federation": {
                "rounds": rounds,
                "local_steps": steps,
                "warmup_rounds": 0,
                "cooldown_rounds": 0,
                "evaluate_every": rounds,
            },
            "resources": {"cpus_per_site": cores / num_sites if cores < num_sites else 1.0, "address": "local"},
            "tracking": {"enabled": False},
            "output": {"folder": str(folder / run), "checkpoint_every": rounds, "num_overlays": 0},
        },
        source="benchmarks/floor.py",
    )


def bare_loop(config: Config, sites: list[str], folder: Path) -> float:
    """Seconds of all sites' steps in one process and thread, without rounds, pushes, validation or checkpoints."""
    total = 0.0
    for site in sites:
        trainer = SiteTrainer(config, site, folder / "bare", use_gpu=False, on_progress=lambda *_: None)
        trainer.start(resume_round=0)
        began = time.perf_counter()
        for number in range(1, config.federation.rounds + 1):
            trainer.train_round(TrainOrder(number, "exchange", evaluate=False, checkpoint=False), [])
        total += time.perf_counter() - began
    return total


def federation(config: Config) -> float:
    """Seconds of the same steps as a federation, the last round's validation and checkpoint taken off."""
    run_federation(config, listener=NullListener(), stop=threading.Event())
    rounds = RunFolder(Path(config.output.folder)).rounds()
    extra = max(report.seconds["validate"] + report.seconds["checkpoint"] for report in rounds[-1].trained)
    return sum(record.seconds for record in rounds) - extra


def main() -> None:
    """Runs both in turn and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sites", 4), ("rounds", 10), ("steps", 10), ("repeats", 5), ("cores", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def config_for(run: str) -> Config:
            return make_config(
                folder,
                num_sites=options.sites,
                rounds=options.rounds,
                steps=options.steps,
                cores=options.cores,
                run=run,
            )

        sites = [f"site{number}" for number in range(1, options.sites + 1)]
        with ray_session(config_for("session")):
            for repeat in range(options.repeats):
                bare = bare_loop(config_for("bare"), sites, folder)
                wall = federation(config_for(f"run{repeat}"))
                floor = bare / min(options.cores, options.sites)
                rows.append((floor, wall, floor / wall))
                print(f"run {repeat + 1}: floor {floor:.2f} s, federation {wall:.2f} s, efficiency {floor / wall:.3f}")
    floor, wall, efficiency = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"median of {options.repeats}: floor {floor:.2f} s, federation {wall:.2f} s, efficiency {efficiency:.3f} "
        f"({options.sites} sites, {options.rounds} rounds x {options.steps} steps, {options.cores} cores)"
    )


if __name__ == "__main__":
    main()
