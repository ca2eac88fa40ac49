"""The real trainer over Ray gives, bit for bit, what it gives in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.ray_pool import RayPool
from gcml_ray.config import Config
from tests.makers import make_config
from tests.runs import Run, drive, run_real

pytestmark = pytest.mark.usefixtures("ray_local")

METHOD = {"name": "gcml", "topology": {"name": "matching"}, "merge": "select_best"}
ROUNDS = {"rounds": 4, "local_steps": 2, "warmup_rounds": 1, "cooldown_rounds": 0, "late_factor": None}


def config_of(folder: Path, **sections: Any) -> Config:
    folder.mkdir()
    return make_config(folder, num_sites=3, method=METHOD, federation=ROUNDS, **sections)


def run_on_ray(config: Config) -> Run:
    return drive(config, RayPool(config, config.output.folder, run_id="run"))


def assert_same_weights(first: Run, second: Run) -> None:
    """Weights, counters and optimiser state of the last round's checkpoints."""
    for site in "ABC":
        name = f"checkpoints/{site}/round_00004.safetensors"
        mine, other = load_file(first.folder.path / name), load_file(second.folder.path / name)
        assert mine.keys() == other.keys()
        for key, values in mine.items():
            np.testing.assert_array_equal(other[key], values, err_msg=f"{site} {key}")


def assert_models_were_exchanged(run: Run) -> None:
    """Else equal weights would say little."""
    assert any(report.merge for report in run.listener.trained)
    assert all(push.accepted for record in run.listener.rounds for push in record.pushes)


def test_2d_weights_equal_those_of_the_local_pool_and_of_a_second_run(tmp_path: Path) -> None:
    first, second, locally = (tmp_path / name for name in ("first", "second", "local"))
    on_ray = run_on_ray(config_of(first, spatial_dims=2))
    assert_models_were_exchanged(on_ray)
    assert_same_weights(on_ray, run_real(config_of(locally, spatial_dims=2)))
    assert_same_weights(on_ray, run_on_ray(config_of(second, spatial_dims=2)))


def test_3d_weights_with_a_granted_gpu_that_does_not_exist_are_those_of_the_cpu(tmp_path: Path) -> None:
    """The cluster's GPUs are logical: sites get half of one each, find no CUDA, say so and train on the CPU."""
    on_ray = run_on_ray(config_of(tmp_path / "ray", resources={"gpus_per_site": 0.5}))
    assert_models_were_exchanged(on_ray)
    for info in on_ray.summary.infos:
        assert info.device == "cpu"
        assert info.notes == ("a GPU was granted but CUDA is not available: training on the CPU",)
    assert_same_weights(on_ray, run_real(config_of(tmp_path / "local")))
