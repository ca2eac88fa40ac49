"""Small federations with real training for the attacks: discs in noisy pictures, sites of different contrast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from gcml_ray.config import Config
from gcml_ray.prediction.averages import mean
from gcml_ray.records import PERSONALISED, Judgement
from tests.runs import Run, run_real

SITES = ("A", "B", "C", "D", "E", "F", "G", "H")
SIDE = 24
SPLITS = ["train"] * 4 + ["validation"] * 3 + ["test"] * 4
OFF = {"weights": False, "validation": False}


def make_pictures(folder: Path, *, num_sites: int) -> Path:
    """Writes pictures and their datalist. Each site has a contrast, a brightness and a noise of its own."""
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    entries = []
    for index, site in enumerate(SITES[:num_sites]):
        for number, split in enumerate(SPLITS):
            name = f"cases/{site}{number}"
            image, label = _picture(np.random.default_rng([index, number]), index)
            _write(folder / f"{name}.png", image)
            _write(folder / f"{name}_seg.png", label)
            entry = {"site": site, "case": f"c{number}", "image": f"{name}.png", "label": f"{name}_seg.png"}
            entries.append(entry | {"split": split})
    path = folder / "datalist.json"
    path.write_text(json.dumps({"cases": entries}))
    return path


def _picture(random: np.random.Generator, site: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A bright disc, and a bright bar that is none: it takes some learning to tell them apart."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centre, radius = random.integers(7, SIDE - 7, 2), random.uniform(3, 5)
    disc = np.hypot(rows - centre[0], columns - centre[1]) <= radius
    bar = columns == random.integers(1, SIDE - 1)
    contrast, base = 60 + 8 * (site % 4), 60 + 10 * (site % 3)
    image = base + contrast * (disc | bar) + random.normal(0, 24 + 2 * (site % 5), disc.shape)
    return image, disc.astype(np.uint8)


def _write(path: Path, values: npt.NDArray[Any]) -> None:
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path)


def attack_config(folder: Path, *, name: str, **sections: Any) -> Config:
    """A federation over such pictures in which each site pushes in every round but the first two."""
    values: dict[str, Any] = {
        "name": name,
        "data": {
            "datalist": str(folder / "datalist.json"),
            "channels": ["grey"],
            "labels": {"background": 0, "disc": 1},
            "spatial_dims": 2,
            "spacing_is_real": False,
            "normalise": "all",
            "patch_size": [16, 16],
            "batch_size": 4,
        },
        "network": {"name": "unet", "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1}},
        "optimiser": {"learning_rate": 1e-2},
        "method": {
            "name": "gcml",
            "topology": {"name": "push_k", "k": 1},
            "merge_first": "size_weighted",
            "merge": "keep_local",
        },
        "federation": {"rounds": 10, "local_steps": 6, "warmup_rounds": 2, "cooldown_rounds": 0, "seed": 3},
        "evaluation": {"window_size": [SIDE, SIDE]},
        "resources": {"pool": "local"},
        "tracking": {"enabled": False},
        "output": {"folder": str(folder / name), "num_overlays": 0, "checkpoint_every": 10},
    }
    for key, value in sections.items():
        merges = isinstance(value, dict) and key != "method"
        values[key] = {**values.get(key, {}), **value} if merges else value
    return Config.model_validate(values)


@dataclass(frozen=True)
class Attacked:
    """What came of a run: the honest sites' Dice on their test cases, and what was made of every push."""

    run: Run
    honest: tuple[str, ...]

    @property
    def dice(self) -> float:
        """Mean over the honest sites."""
        return mean(
            score.dice
            for report in self.run.listener.evaluated
            for score in report.scores
            if score.model == PERSONALISED and score.site in self.honest
        )

    @property
    def mean_validation(self) -> float:
        """Mean over honest sites and exchange rounds of what they validated: the best round cannot hide the others."""
        return mean(
            report.validation_dice
            for record in self.run.listener.rounds
            if record.plan.phase == "exchange"
            for report in record.trained
            if report.site in self.honest and report.validation_dice is not None
        )

    def judged(self, senders: Sequence[str]) -> list[Judgement]:
        """What honest receivers made of these senders' models."""
        return [
            judgement
            for record in self.run.listener.rounds
            for report in record.trained
            if report.site in self.honest
            for judgement in report.judged
            if judgement.sender in senders
        ]

    def refused_unopened(self, words: str) -> int:
        """Pushes that were refused on the wire, with these words."""
        return sum(words in push.reason for record in self.run.listener.rounds for push in record.pushes)


def run_attack(folder: Path, *, num_sites: int, name: str, liars: Sequence[str] = (), **sections: Any) -> Attacked:
    """Runs a federation; the liars are left out of its result."""
    config = attack_config(folder, name=name, **sections)
    run = run_real(config)
    return Attacked(run, tuple(site for site in SITES[:num_sites] if site not in liars))
