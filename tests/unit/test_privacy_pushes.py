"""Clipped and noised pushes: what leaves, what stays, and what it costs in epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gcml_ray.config import Config
from gcml_ray.errors import ConfigError
from gcml_ray.privacy.accounting import epsilon_of
from gcml_ray.privacy.noise import Noise
from gcml_ray.privacy.pushes import PushNoise, clipped_and_noised
from gcml_ray.push.wire import checksum
from tests.makers import make_config
from tests.trainer_runs import make_trainer, order, push_from_b, run, weights

NOISED = {"mode": "update_noise", "noise_multiplier": 0.0, "max_update_norm": 1.0, "delta": 1e-2, "seeded": True}


def noised_config(folder: Path, *, privacy: dict[str, Any] | None = None, **sections: Any) -> Config:
    return make_config(folder, privacy=NOISED | (privacy or {}), **sections)


def noise_of(folder: Path, **privacy: Any) -> PushNoise:
    """From the initial weights (0, 0)."""
    return PushNoise(noised_config(folder, privacy=privacy), "A", torch.zeros(2), folder / "site")


def test_an_update_is_clipped_to_its_norm_and_a_smaller_one_stays() -> None:
    """(3, 4) has norm 5: at most 1 leaves (0.6, 0.8)."""
    for update, expected in (((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.0), (0.3, 0.0)), ((0.0, 0.0), (0.0, 0.0))):
        clipped = clipped_and_noised(
            torch.tensor(update), max_norm=1.0, noise_multiplier=0.0, noise=Noise(torch.device("cpu"), 1)
        )
        torch.testing.assert_close(clipped, torch.tensor(expected))


def test_the_noise_has_the_variance_that_was_asked_for() -> None:
    """Multiplier 3 x norm 0.5 = 1.5."""
    noise = clipped_and_noised(
        torch.zeros(20_000), max_norm=0.5, noise_multiplier=3.0, noise=Noise(torch.device("cpu"), 1)
    )
    assert float(noise.std()) == pytest.approx(1.5, rel=0.03)


def test_updates_count_from_the_last_push_and_catch_up_with_the_weights(tmp_path: Path) -> None:
    """Weights (3, 4) are 5 away, each push brings 1: after five rounds they are there."""
    noise = noise_of(tmp_path)
    pushed = [noise.noised(torch.tensor([3.0, 4.0]), number).tolist() for number in (1, 2, 3, 4, 5, 6)]
    np.testing.assert_allclose(pushed, [[0.6 * step, 0.8 * step] for step in (1, 2, 3, 4, 5, 5)], rtol=1e-5)


def test_updates_count_from_the_servers_weights_where_there_are_any(tmp_path: Path) -> None:
    noise = noise_of(tmp_path)
    noise.note_known(torch.tensor([10.0, 0.0]))
    torch.testing.assert_close(noise.noised(torch.tensor([13.0, 4.0]), 1), torch.tensor([10.6, 0.8]))


def test_a_round_is_noised_once_for_all_its_receivers(tmp_path: Path) -> None:
    """Two different noises of one update could be averaged."""
    noise = noise_of(tmp_path, noise_multiplier=1.0, seeded=False)
    first, again, later = (noise.noised(torch.ones(2), number) for number in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert noise.ledger.num_spent == 2


def test_epsilon_is_that_of_as_many_gaussian_mechanisms_and_survives_the_process(tmp_path: Path) -> None:
    """What others know survives too: a new process goes on from the last push."""
    noise = noise_of(tmp_path, noise_multiplier=2.0)
    pushed = [noise.noised(torch.ones(2), number) for number in (1, 2, 3)]
    later = noise_of(tmp_path, noise_multiplier=2.0)
    assert later.epsilon == noise.epsilon == epsilon_of(2.0, sample_rate=1.0, num_steps=3, delta=1e-2)
    assert torch.equal(later.known, pushed[-1])


def exported(trainer: Any, number: int) -> Tensor:
    return torch.from_numpy(trainer.export("run", number)[1].copy())


def test_a_sites_own_model_is_that_of_a_run_without_noise(tmp_path: Path) -> None:
    """Only the copy that is pushed differs; the report says what it has cost."""
    (tmp_path / "plain").mkdir()
    plain = make_trainer(make_config(tmp_path / "plain"))
    noisy = make_trainer(noised_config(tmp_path, privacy={"noise_multiplier": 1.0}))
    for number in (1, 2):
        pushed = exported(noisy, number)
        plain.export("run", number)
        assert not torch.equal(pushed, weights(noisy))
        (report,) = run(noisy, [number], with_pushes=False)
        run(plain, [number], with_pushes=False)
        assert report.privacy_epsilon == epsilon_of(1.0, sample_rate=1.0, num_steps=number, delta=1e-2)
    assert torch.equal(weights(noisy), weights(plain))


def test_the_header_describes_what_is_pushed(tmp_path: Path) -> None:
    """Checksum and size are those of the noised copy: the receiver takes it."""
    header, buffer = make_trainer(noised_config(tmp_path, privacy={"noise_multiplier": 1.0})).export("run", 1)
    assert (header.checksum, header.num_values) == (checksum(buffer), buffer.size)


def test_with_a_server_updates_count_from_what_was_adopted(tmp_path: Path) -> None:
    trainer = make_trainer(noised_config(tmp_path, method={"name": "fedavg"}))
    header, buffer = push_from_b(trainer, 1)
    run(trainer, [1], with_pushes=False)
    trainer.adopt(order(1), [(header, buffer)])
    torch.testing.assert_close(exported(trainer, 2), torch.from_numpy(buffer.copy()))


def test_running_statistics_are_not_noised_but_refused(tmp_path: Path) -> None:
    network = {"name": "unet", "options": {"channels": [4, 8], "strides": [2], "norm": "BATCH"}}
    with pytest.raises(ConfigError, match="a variance may become negative"):
        make_trainer(noised_config(tmp_path, network=network))
