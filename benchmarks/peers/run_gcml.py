"""gcml-ray: sites are Ray actors, as in any run; a method by name."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.listener import NullListener
from actors.run import run_federation
from benchmarks.peers.scenario import SITES, Case, config_values
from gcml_ray.config import Config
from gcml_ray.config.file import parse_config

ONE_PEER = {"name": "push_k", "k": 1}  # every site pushes to one other in every round
SHARED = "gcml-ray-shared"  # as many processes of sites as cores, as Flower's simulation has workers
METHODS: dict[str, dict[str, Any]] = {
    "gcml-ray": {"name": "fedavg"},
    SHARED: {"name": "fedavg"},
    "gcml-ray-gossip": {"name": "gossip_avg", "topology": ONE_PEER},
    # mixed before the mutual steps, not chosen by validation after them: nobody validates here
    "gcml-ray-gcml": {"name": "gcml", "topology": ONE_PEER, "merge_first": "size_weighted", "merge": "keep_local"},
}


@functools.cache
def bench() -> Any:
    """What the sites of one process share."""
    from gcml_ray.training.workbench import Workbench  # noqa: PLC0415 - the driver imports no torch

    return Workbench()


def noting_trainer(
    config: Config, site: str, folder: Path, *, use_gpu: bool, on_progress: Callable[[str, int, int], None]
) -> Any:
    """The trainer of every run, whose last step of a round leaves a line in the benchmark's folder."""
    from gcml_ray.lean_imports import import_monai  # noqa: PLC0415 - as any site's process does

    import_monai()
    from benchmarks.peers.run_gcml import bench  # noqa: PLC0415 - one a process: __main__ travels by value
    from benchmarks.peers.workload import note_training  # noqa: PLC0415 - the driver imports no torch
    from gcml_ray.training.trainer import SiteTrainer  # noqa: PLC0415

    rounds = 0

    def note(stage: str, step: int, num_steps: int) -> None:
        nonlocal rounds
        if stage == "train" and step == num_steps:
            rounds += 1
            note_training(folder.parent, site, rounds, trainer.local.model.parameter.detach())
        on_progress(stage, step, num_steps)

    trainer = SiteTrainer(config, site, folder, use_gpu=use_gpu, on_progress=note, bench=bench())
    return trainer


def make_trainer(config: Config, site: str, folder: Path, **options: Any) -> Any:
    """A site's trainer, or the server's, which has nothing to note."""
    from actors.site import trainer_in_own_process  # noqa: PLC0415 - as above
    from gcml_ray.config import SERVER  # noqa: PLC0415

    return (trainer_in_own_process if site == SERVER else noting_trainer)(config, site, folder, **options)


def main(folder: Path) -> None:
    """Runs the case; neither tests nor plots at the end, as nobody else does."""
    case = Case.read(folder)
    values = config_values(case, folder, method=METHODS[case.contender])
    if case.contender == SHARED:
        values["resources"] |= {"cpus_per_site": 1.0, "sites_per_actor": math.ceil(len(SITES) / case.cores)}
    config = parse_config(values, source="benchmarks.peers")
    summary = run_federation(
        config, listener=NullListener(), stop=threading.Event(), make_trainer=make_trainer, test=False
    )
    if summary.status != "finished":
        sys.exit(f"the run ended as {summary.status}: {summary.dropped}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
