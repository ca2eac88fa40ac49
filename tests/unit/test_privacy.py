"""DP-SGD and its bound against hand computation and against Opacus."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from torch import Tensor, nn

from gcml_ray.config import Config, OptimiserConfig
from gcml_ray.data.site_data import Batch
from gcml_ray.errors import ConfigError
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.model.learner import Learner, Statistics, local_step
from gcml_ray.model.precision import Precision
from gcml_ray.networks.registry import build_network
from gcml_ray.privacy.accounting import epsilon_of, require_opacus
from gcml_ray.privacy.batches import poisson_batches
from gcml_ray.privacy.noise import Noise
from gcml_ray.privacy.training import private_step
from gcml_ray.seeding import numpy_generator
from tests.makers import make_config
from tests.trainer_runs import make_trainer

PRIVATE = {"mode": "dp_sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-2, "seeded": True}
TRUSTING = {"weights": False, "validation": False}  # the made-up pushes of these tests would be refused


def private_config(folder: Path, *, privacy: dict[str, Any] | None = None, **sections: Any) -> Config:
    return make_config(folder, privacy=PRIVATE | (privacy or {}), defence=TRUSTING, **sections)


# --- a step ----------------------------------------------------------------------------------------


def linear_learner(learning_rate: float = 1.0) -> Learner:
    """A model w x with two weights, no bias, both 0; one step of plain SGD subtracts the gradient."""
    learner = Learner(
        nn.Linear(2, 1, bias=False),
        send_buffers=True,
        optimiser=OptimiserConfig(name="sgd", learning_rate=learning_rate),
        precision=Precision("cpu", "none"),
    )
    learner.model.flat.zero_()
    return learner


def half_square(learner: Learner, batch: Batch) -> Statistics:
    """1/2 (w x - y)^2; at w = 0 its gradient is -y x."""
    loss = 0.5 * (learner.model.module(batch.image) - batch.label).square().sum()
    learner.apply_gradients(loss)
    return {"loss": loss.detach()}


def take(
    learners: Sequence[Learner], batch: Batch, *, noise: float = 0.0, max_norm: float = 1.0, size: float = 2.0
) -> Statistics:
    def step(case: Batch) -> Statistics:
        statistics = [half_square(learner, case) for learner in learners]
        return statistics[0]

    return private_step(
        learners,
        step,
        batch,
        max_grad_norm=max_norm,
        noise_multiplier=noise,
        expected_batch=size,
        noise=Noise(torch.device("cpu"), 1),
    )


def two_cases() -> Batch:
    """Gradients at w = 0: -(3, 4), of norm 5, and -(0.3, 0), of norm 0.3."""
    return Batch(image=torch.tensor([[3.0, 4.0], [0.3, 0.0]]), label=torch.tensor([[1.0], [1.0]]))


def test_each_case_is_clipped_on_its_own_and_the_sum_is_divided_by_the_expected_batch_size() -> None:
    """-(3, 4) becomes -(0.6, 0.8); -(0.3, 0) is below the norm 1 and stays: the mean is -(0.45, 0.4)."""
    learner = linear_learner()
    take([learner], two_cases())
    torch.testing.assert_close(learner.model.flat, torch.tensor([0.45, 0.4]))


def test_the_gradients_of_two_models_are_clipped_as_one_vector() -> None:
    """(3, 4, 3, 4) has norm sqrt(50): each model gets (3, 4) / sqrt(50), and (0.3, 0) of norm 0.42 whole."""
    learners = [linear_learner(), linear_learner()]
    take(learners, two_cases())
    expected = (torch.tensor([3.0, 4.0]) / 50**0.5 + torch.tensor([0.3, 0.0])) / 2
    for learner in learners:
        torch.testing.assert_close(learner.model.flat, expected)


def test_statistics_are_means_over_cases_and_the_batch_may_be_larger_than_expected() -> None:
    """Both losses are 1/2 at w = 0; three equal cases at expected size 1 make a step of 3 x (0.6, 0.8)."""
    learner = linear_learner()
    batch = Batch(image=torch.tensor([[3.0, 4.0]] * 3), label=torch.ones(3, 1))
    assert float(take([learner], batch, size=1.0)["loss"]) == 0.5
    torch.testing.assert_close(learner.model.flat, torch.tensor([1.8, 2.4]))


def test_a_case_without_gradient_moves_nothing() -> None:
    learner = linear_learner()
    take([learner], Batch(image=torch.zeros(1, 2), label=torch.ones(1, 1)))
    assert learner.model.flat.tolist() == [0.0, 0.0]


def test_an_empty_batch_is_a_step_of_noise_with_the_variance_that_was_asked_for() -> None:
    """20,000 weights: standard deviation multiplier x norm / expected batch = 3 x 0.5 / 2 = 0.75, mean 0."""
    learner = Learner(
        nn.Linear(20_000, 1, bias=False),
        send_buffers=True,
        optimiser=OptimiserConfig(name="sgd", learning_rate=1.0),
        precision=Precision("cpu", "none"),
    )
    before = learner.model.flat.clone()
    empty = Batch(image=torch.empty(0, 20_000), label=torch.empty(0, 1))
    assert take([learner], empty, noise=3.0, max_norm=0.5) == {}
    noise = learner.model.flat - before
    assert float(noise.std()) == pytest.approx(0.75, rel=0.03)
    assert abs(float(noise.mean())) < 0.02


def test_clipped_gradients_are_those_of_opacus(tmp_path: Path) -> None:
    """A real network with transposed 3D convolutions, against Opacus' per-sample gradients by functorch."""
    config = make_config(tmp_path)
    torch.manual_seed(0)
    network, image = build_network(config.network, config.data), torch.randn(3, 2, 8, 8, 8)
    label, loss = (image[:, :1] > 0).long(), build_segmentation_loss(config.loss, config.data)
    learner = Learner(
        network,
        send_buffers=True,
        optimiser=OptimiserConfig(name="sgd", learning_rate=1.0),
        precision=Precision("cpu", "none"),
    )
    expected = learner.model.flat - clipped_mean_of_opacus(config, learner, loss, image, label)
    private_step(
        [learner],
        lambda case: local_step(learner, case, loss),
        Batch(image=image, label=label),
        max_grad_norm=0.05,
        noise_multiplier=0.0,
        expected_batch=3,
        noise=Noise(torch.device("cpu"), 0),
    )
    torch.testing.assert_close(learner.model.flat, expected, atol=1e-6, rtol=1e-4)


def clipped_mean_of_opacus(config: Config, learner: Learner, loss: Any, image: Tensor, label: Tensor) -> Tensor:
    """(P,) mean of the gradients of three cases, each clipped to norm 0.05."""
    copy = build_network(config.network, config.data)
    copy.load_state_dict(learner.model.module.state_dict())
    hooked = GradSampleModule(copy, loss_reduction="sum", force_functorch=True)
    heads = hooked(image)
    sum(loss([heads[case : case + 1]], label[case : case + 1]) for case in range(3)).backward()
    gradients = torch.cat([parameter.grad_sample.flatten(1) for parameter in hooked.parameters()], dim=1)
    norms = gradients.norm(dim=1, keepdim=True)
    assert float(norms.min()) > 0.05, "else nothing is clipped"
    return (gradients * (0.05 / norms)).sum(0) / 3


# --- the bound -------------------------------------------------------------------------------------


def test_epsilon_is_that_of_opacus_accountant_fed_step_by_step() -> None:
    accountant = RDPAccountant()
    for _ in range(30):
        accountant.step(noise_multiplier=1.1, sample_rate=0.2)
    assert epsilon_of(1.1, sample_rate=0.2, num_steps=30, delta=1e-3) == accountant.get_epsilon(1e-3)


def test_epsilon_without_sampling_is_the_closed_form_of_the_gaussian_mechanism() -> None:
    """Renyi: T alpha / (2 sigma^2), converted by eq. 20 of Balle et al. 2020, minimised over alpha."""
    sigma, steps, delta = 4.0, 10, 1e-5
    alpha = np.arange(1.01, 60, 0.001)
    renyi = steps * alpha / (2 * sigma**2)
    bound = renyi + np.log((alpha - 1) / alpha) - (np.log(delta) + np.log(alpha)) / (alpha - 1)
    assert epsilon_of(sigma, sample_rate=1.0, num_steps=steps, delta=delta) == pytest.approx(bound.min(), rel=1e-3)


def test_epsilon_is_zero_before_the_first_step_and_infinite_without_noise() -> None:
    assert epsilon_of(1.0, sample_rate=0.5, num_steps=0, delta=1e-3) == 0
    assert epsilon_of(0.0, sample_rate=0.5, num_steps=1, delta=1e-3) == float("inf")


def test_a_missing_opacus_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"gcml-ray\[dp\]"):
        require_opacus()


# --- sampling --------------------------------------------------------------------------------------


def batch_sizes(folder: Path, *, batch_size: int, num_steps: int) -> list[int]:
    config = private_config(folder, data={"batch_size": batch_size})
    data = make_trainer(config, site="B").data  # 4 training cases
    coins = numpy_generator(3, "coins")
    return [
        len(batch.image)
        for batch in poisson_batches(data, config.data, num_steps=num_steps, coins=coins, patch_seeds=itertools.count())
    ]


def test_cases_are_drawn_independently_at_the_rate_batch_size_over_cases(tmp_path: Path) -> None:
    """4 cases at rate 1/2: sizes are binomial, mean 2 and variance 1; their errors over 600 steps 0.04 and 0.06."""
    sizes = np.array(batch_sizes(tmp_path, batch_size=2, num_steps=600))
    assert sizes.mean() == pytest.approx(2.0, abs=0.15)
    assert sizes.var() == pytest.approx(1.0, abs=0.2)


def test_an_empty_batch_has_the_shape_of_any_other_but_no_case(tmp_path: Path) -> None:
    config = private_config(tmp_path, data={"batch_size": 1})
    data = make_trainer(config).data
    coins = numpy_generator(3, "coins")
    batches = list(poisson_batches(data, config.data, num_steps=40, coins=coins, patch_seeds=itertools.count()))
    empty = next(batch for batch in batches if len(batch.image) == 0)
    full = next(batch for batch in batches if len(batch.image) > 0)
    assert empty.image.shape == (0, 2, 8, 8, 8)
    assert (empty.image.shape[1:], empty.label.shape[1:]) == (full.image.shape[1:], full.label.shape[1:])
    assert (empty.image.dtype, empty.label.dtype) == (full.image.dtype, full.label.dtype)
