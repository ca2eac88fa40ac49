"""Starting and running one site's trainer on a tiny federation; shared by the tests of its module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gcml_ray.config import Config
from gcml_ray.push.wire import WIRE_DTYPE, Buffer, PushHeader, checksum
from gcml_ray.records import SiteInfo, TrainOrder, TrainReport
from gcml_ray.training.trainer import SiteTrainer
from tests.makers import make_config

RING = {"name": "ring"}
TROUBLESOME = {  # everything that could make a resumed round differ: dropout, running statistics, counters
    "name": "unet",
    "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "BATCH", "dropout": 0.2},
}
OTHER_NETWORK = {"name": "unet", "options": {"channels": [4, 4], "strides": [2], "num_res_units": 0}}
Push = tuple[PushHeader, Buffer]


def no_progress(stage: str, step: int, num_steps: int) -> None:
    del stage, step, num_steps


def make_trainer(
    config: Config,
    *,
    site: str = "A",
    folder: Path | None = None,
    resume_round: int = 0,
    use_gpu: bool = False,
    on_progress: Callable[[str, int, int], None] = no_progress,
) -> SiteTrainer:
    trainer, _ = started(
        config, site=site, folder=folder, resume_round=resume_round, use_gpu=use_gpu, on_progress=on_progress
    )
    return trainer


def started(
    config: Config, *, site: str = "A", folder: Path | None = None, resume_round: int = 0, **options: Any
) -> tuple[SiteTrainer, SiteInfo]:
    options = {"use_gpu": False, "on_progress": no_progress} | options
    trainer = SiteTrainer(config, site, folder or Path(config.output.folder), **options)
    return trainer, trainer.start(resume_round=resume_round)


def order(round_number: int, *, evaluate: bool = True, checkpoint: bool = True) -> TrainOrder:
    phase = "warmup" if round_number == 1 else "exchange"
    return TrainOrder(round_number, phase, evaluate=evaluate, checkpoint=checkpoint)  # type: ignore[arg-type]


def push_from_b(trainer: SiteTrainer, round_number: int) -> Push:
    """Made-up weights of B's architecture, small and positive (as variances must be); read-only as on the wire."""
    expected = trainer.expectation("run", "B", peers=frozenset("B"))
    random = np.random.default_rng(round_number)
    buffer = np.abs(random.normal(0, 0.1, expected.num_values)).astype(np.float32)
    buffer.flags.writeable = False
    header = PushHeader(
        run_id="run",
        round_number=round_number,
        sender="B",
        num_train=4,
        fingerprint=expected.fingerprint,
        contract=expected.contract,
        layout=expected.layout,
        num_values=expected.num_values,
        dtype=WIRE_DTYPE,
        checksum=checksum(buffer),
    )
    return header, buffer


def run(trainer: SiteTrainer, rounds: Sequence[int], *, with_pushes: bool = True) -> list[TrainReport]:
    """Trains the rounds; B's push comes in from round 2 on."""
    return [
        trainer.train_round(order(number), [push_from_b(trainer, number)] if with_pushes and number > 1 else [])
        for number in rounds
    ]


def weights(trainer: SiteTrainer) -> Tensor:
    return trainer.local.model.flat.clone()


def without_clocks(report: TrainReport) -> TrainReport:
    """What must be the same in a repeated round."""
    return replace(report, seconds={}, peak_memory_bytes=0)


def two_networks(folder: Path, **changes: Any) -> Config:
    """Site B trains another network than A."""
    method = {"name": "gcml", "topology": RING, "merge": "keep_local"}
    return make_config(folder, site_networks={"B": OTHER_NETWORK}, method=method, **changes)
