"""A federation of given cases and costs, for the tests of forecasts."""

from typing import Any

from gcml_ray.config import Config
from gcml_ray.doctor.forecast_costs import Place, SiteCases, SiteCosts

ONE_PROCESS = Place(slots=1, sites_per_machine=2, interpreter_bytes=1_000_000, one_process=True)
MATCHING = {"name": "gcml", "topology": {"name": "matching"}}


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "name": "forecast",
        "data": {
            "datalist": "data.json",
            "channels": ["t1", "t2"],
            "labels": {"background": 0, "lesion": 1},
            "spacing_is_real": True,
            "patch_size": [10, 10, 10],
        },
        "network": {"name": "unet"},
        "optimiser": {"learning_rate": 1e-3},
        "method": MATCHING,
        "federation": {"rounds": 10, "local_steps": 5, "warmup_rounds": 1, "cooldown_rounds": 2, "seed": 3},
        "evaluation": {"window_overlap": 0.5},
        "output": {"folder": "/run"},
    }
    for name, section in sections.items():
        values[name] = section if name == "method" else values.get(name, {}) | section
    return Config.model_validate(values)


def cases(site: str, *, num_train: int = 3) -> SiteCases:
    """Some training, two validation and one test case of 10 x 10 x 10 voxels: one window each."""
    splits = ["train"] * num_train + ["validation", "validation", "test"]
    return SiteCases(site, tuple((split, (10, 10, 10)) for split in splits))  # type: ignore[misc]


def costs(site: str, **changes: Any) -> SiteCosts:
    values: dict[str, Any] = {
        "num_parameters": 1000,
        "num_values": 1100,
        "num_sent": 1100,
        "local_step_s": 0.1,
        "mutual_step_s": 0.3,
        "window_s": 0.05,
        "load_s": 0.001,
        "score_s": 0.002,
        "checkpoint_s": 0.01,
        "activation_bytes": 5_000_000,
        "on_gpu": False,
    }
    return SiteCosts(site=site, **(values | changes))
