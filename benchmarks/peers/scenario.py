"""What every framework is given: sites, rounds, steps, network. Knows no framework, imports no torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SITES = ("site1", "site2", "site3", "site4")
CASES_PER_SITE = 6
SHAPE = (36, 32, 20)  # of the phantom's volumes, voxels
CASE_FILE = "case.json"


@dataclass(frozen=True)
class Scenario:
    """One piece of work. ``patch``: voxels of a training patch; ``channels`` and ``strides`` of MONAI's 3D UNet."""

    name: str
    title: str
    rounds: int
    steps: int
    patch: tuple[int, int, int]
    batch_size: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]


SCENARIOS = {
    "steps": Scenario("steps", "4 sites, 10 steps per round, 35,318 parameters", 10, 10, SHAPE, 2, (8, 16, 32), (2, 2)),
    "large": Scenario(
        "large",
        "4 sites, 1 step per round, 31 M parameters (124 MB)",
        5,
        1,
        (16, 16, 16),
        1,
        (8, 32, 768, 1295),
        (2, 2, 2),
    ),
}


@dataclass(frozen=True)
class Case:
    """One run of one contender: what its process finds in its folder. ``cores``: how many it may use."""

    contender: str
    scenario: Scenario
    datalist: str
    cores: int

    def write(self, folder: Path) -> None:
        """Leaves the case in the folder of a run."""
        folder.mkdir(parents=True)
        (folder / "events").mkdir()
        (folder / CASE_FILE).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Case:
        """The case in the folder of a run."""
        values = json.loads((folder / CASE_FILE).read_text(encoding="utf-8"))
        scenario = values.pop("scenario")
        for key in ("patch", "channels", "strides"):
            scenario[key] = tuple(scenario[key])
        return cls(scenario=Scenario(**scenario), **values)


def config_values(case: Case, folder: Path, *, method: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the case for gcml-ray; the other frameworks' sites read data, network and optimiser of it.

    Plain SGD has no state, so that frameworks whose clients live for one call need not carry any. No validation
    and no checkpoint before the last round.
    """
    scenario = case.scenario
    return {
        "name": f"peers_{scenario.name}",
        "data": {
            "datalist": case.datalist,
            "channels": ["t1", "flair"],
            "labels": {"background": 0, "lesion": 1},
            "spacing_is_real": True,
            "patch_size": list(scenario.patch),
            "batch_size": scenario.batch_size,
        },
        "network": {
            "name": "unet",
            "options": {"channels": list(scenario.channels), "strides": list(scenario.strides), "num_res_units": 1},
        },
        "optimiser": {"name": "sgd", "learning_rate": 1e-2, "schedule": "constant"},
        "method": method,
        "federation": {
            "rounds": scenario.rounds,
            "local_steps": scenario.steps,
            "warmup_rounds": 0,
            "cooldown_rounds": 0,
            "evaluate_every": scenario.rounds,
        },
        "resources": {"cpus_per_site": min(1.0, case.cores / len(SITES)), "address": "local"},
        "tracking": {"enabled": False},
        "output": {"folder": str(folder / "run"), "checkpoint_every": scenario.rounds, "num_overlays": 0},
    }
