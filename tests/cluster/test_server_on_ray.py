"""A federation with a server over real Ray: the same weights as in one process, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.local_pool import LocalPool
from actors.ray_pool import RayPool
from gcml_ray.config import Config
from tests.cluster.ray_runs import run_on_ray
from tests.fakes import Fault, calls_of, fake_config
from tests.makers import make_config
from tests.runs import drive

pytestmark = pytest.mark.usefixtures("ray_local")

ROUNDS = {"rounds": 3, "local_steps": 2, "warmup_rounds": 1, "cooldown_rounds": 0, "late_factor": None}


def config_of(folder: Path) -> Config:
    folder.mkdir()
    return make_config(folder, num_sites=3, spatial_dims=2, method={"name": "fedavg"}, federation=ROUNDS)


def test_fedavg_on_ray_gives_the_weights_of_the_local_pool(tmp_path: Path) -> None:
    config, local_config = config_of(tmp_path / "ray"), config_of(tmp_path / "local")
    on_ray = drive(config, RayPool(config, config.output.folder, run_id="run"))
    locally = drive(local_config, LocalPool(local_config, local_config.output.folder, run_id="run"))
    assert [len(record.pushes) for record in on_ray.folder.rounds()] == [0, 6, 6]
    assert all(push.accepted for push in on_ray.folder.transfers())
    for name in ("A", "B", "C", "server"):
        file = f"checkpoints/{name}/round_00003.safetensors"
        mine, other = load_file(on_ray.folder.path / file), load_file(locally.folder.path / file)
        assert mine.keys() == other.keys()
        for key, values in mine.items():
            np.testing.assert_array_equal(other[key], values, err_msg=f"{name} {key}")


def test_a_killed_server_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    """Its process ends while it forms the mean of round 2: nobody hears of that mean, the next rounds are whole."""
    config = fake_config(tmp_path, method={"name": "fedavg"})
    run = run_on_ray(config, Fault("server", 2, "train", "die"))
    assert run.summary.status == "finished"
    ((name, number, kind, decision),) = run.failures()
    assert (name, number, decision) == ("server", 2, "restart")
    assert kind in ("died", "unreachable")
    assert [len(record.pushes) for record in run.folder.rounds()] == [6, 3, 6, 6]
    assert calls_of(run.folder, "server", "train") == [1, 2, 3, 4]
