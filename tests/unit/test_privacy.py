"""DP-SGD against hand computation and against Opacus; what a site spends, and what it never forgets."""

from __future__ import annotations

import itertools
import logging
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
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.learner import Learner, Precision, Statistics, local_step
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.methods import METHODS
from gcml_ray.networks.registry import build_network
from gcml_ray.privacy import check_network, private_step
from gcml_ray.privacy_accounting import Ledger, epsilon_of, require_opacus
from gcml_ray.privacy_batches import poisson_batches
from gcml_ray.record_json import from_json, to_json
from gcml_ray.records import TrainReport
from gcml_ray.seeding import numpy_generator
from tests.makers import make_config
from tests.trainer_runs import make_trainer, order, push_from_b, run, weights

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

PRIVATE = {"mode": "dp_sgd", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 1e-2, "seeded": True}
TRUSTING = {"weights": False, "validation": False}  # the made-up pushes of these tests would be refused


def private_config(folder: Path, *, privacy: dict[str, Any] | None = None, **sections: Any) -> Config:
    return make_config(folder, privacy=PRIVATE | (privacy or {}), defence=TRUSTING, **sections)


# --- a step ----------------------------------------------------------------------------------------


def linear_learner(learning_rate: float = 1.0) -> Learner:
    """y = w x with two weights, no bias, both 0; one step of plain SGD subtracts the gradient."""
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
        return [half_square(learner, case) for learner in learners][0]

    return private_step(
        learners,
        step,
        batch,
        max_grad_norm=max_norm,
        noise_multiplier=noise,
        expected_batch=size,
        generator=torch.Generator().manual_seed(1),
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
        generator=torch.Generator(),
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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
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


# --- a site ----------------------------------------------------------------------------------------


def test_training_reports_the_epsilon_of_all_steps_so_far(tmp_path: Path) -> None:
    """Site A: 3 training cases, 2 a step; 2 steps a round."""
    reports = run(make_trainer(private_config(tmp_path)), [1, 2])
    expected = [epsilon_of(1.0, sample_rate=2 / 3, num_steps=steps, delta=1e-2) for steps in (2, 4)]
    assert [report.privacy_epsilon for report in reports] == expected


def test_seeded_training_repeats_itself_and_secret_noise_does_not(tmp_path: Path) -> None:
    def trained(name: str, *, seeded: bool) -> Tensor:
        (tmp_path / name).mkdir()
        trainer = make_trainer(private_config(tmp_path / name, privacy={"seeded": seeded}))
        run(trainer, [1])
        return weights(trainer)

    first = trained("a", seeded=True)
    assert torch.equal(first, trained("b", seeded=True))
    assert not torch.equal(trained("c", seeded=False), trained("d", seeded=False))


def test_mode_none_changes_nothing_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the loop as it was: the step is called on the batch, nothing else."""
    config = make_config(tmp_path)
    trainer = make_trainer(config)
    (report,) = run(trainer, [1])
    monkeypatch.setattr("gcml_ray.trainer.take_plainly", lambda learners, step, batch: step(batch))
    plain = make_trainer(config, folder=tmp_path / "plain")
    run(plain, [1])
    assert torch.equal(weights(trainer), weights(plain))
    assert report.privacy_epsilon is None
    assert not list(Path(config.output.folder).rglob("privacy.json"))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "gml", "topology": {"name": "ring"}},
        {"name": "gcml", "topology": {"name": "ring"}, "merge": "replace"},
        {"name": "defkt", "topology": {"name": "ring"}},
        {"name": "proxyfl", "topology": {"name": "ring"}, "alpha": 0.5, "beta": 0.5},
        {"name": "ditto", "lambda": 0.1},
        {"name": "fedprox", "mu": 0.1},
    ],
    ids=lambda method: method["name"],
)
def test_every_optimiser_step_of_every_model_is_private(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a method trains beside the local model: no learner steps but at the end of a private step."""
    steps: list[bool] = []
    inside: list[int] = []
    plain_step = Learner.take_step

    def private(*arguments: Any, **options: Any) -> Statistics:
        inside.append(1)
        try:
            return private_step(*arguments, **options)
        finally:
            inside.pop()

    def watched(learner: Learner) -> None:
        steps.append(bool(inside) and not learner.is_collecting)
        plain_step(learner)

    monkeypatch.setattr("gcml_ray.privacy.private_step", private)
    monkeypatch.setattr(Learner, "take_step", watched)
    trainer = make_trainer(private_config(tmp_path, method=method))
    has_pushes = method["name"] not in ("ditto", "fedprox")
    (report,) = [trainer.train_round(order(2), [push_from_b(trainer, 2)] if has_pushes else [])]
    num_models = 1 if method["name"] == "fedprox" else 2
    assert steps == [True] * (report.num_steps * num_models)
    assert method["name"] in METHODS


# --- what a site remembers ---------------------------------------------------------------------


def test_epsilon_goes_on_after_a_resume(tmp_path: Path) -> None:
    config = private_config(tmp_path)
    run(make_trainer(config), [1, 2])
    (report,) = run(make_trainer(config, resume_round=None), [3])
    assert report.privacy_epsilon == epsilon_of(1.0, sample_rate=2 / 3, num_steps=6, delta=1e-2)


def test_a_round_that_is_done_again_counts_again(tmp_path: Path) -> None:
    """Round 2 was pushed before the site went back to round 1: what it told is told."""
    config = private_config(tmp_path)
    run(make_trainer(config), [1, 2])
    (report,) = run(make_trainer(config, resume_round=1), [2])
    assert report.privacy_epsilon == epsilon_of(1.0, sample_rate=2 / 3, num_steps=6, delta=1e-2)


def test_a_round_that_broke_off_counts(tmp_path: Path) -> None:
    class EndedError(Exception):
        pass

    def end(stage: str, step: int, num_steps: int) -> None:
        del num_steps
        if (stage, step) == ("train", 1):
            raise EndedError

    config = private_config(tmp_path)
    with pytest.raises(EndedError):
        run(make_trainer(config, on_progress=end), [1])
    assert make_trainer(config).private.ledger.num_spent == 2  # type: ignore[union-attr]


def test_a_ledger_of_another_configuration_does_not_count_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    Ledger(path, identity="one").spend(5)
    assert Ledger(path, identity="one").num_spent == 5
    assert Ledger(path, identity="other").num_spent == 0
    path.write_text("{")
    with pytest.raises(CheckpointError, match="counts the privacy"):
        Ledger(path, identity="one")


def test_a_site_at_its_epsilon_limit_keeps_its_weights_says_so_and_still_pushes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two rounds of two steps fit below the limit, the third does not."""
    limit = epsilon_of(1.0, sample_rate=2 / 3, num_steps=5, delta=1e-2)
    trainer = make_trainer(private_config(tmp_path, privacy={"epsilon_limit": limit}))
    first = run(trainer, [1, 2])
    after_two = weights(trainer)
    with caplog.at_level(logging.WARNING, logger="gcml_ray.privacy"):
        (last,) = run(trainer, [3])
    assert [report.num_steps for report in (*first, last)] == [2, 2, 0]
    assert last.privacy_epsilon == first[-1].privacy_epsilon
    assert "site A stops training at round 3" in caplog.text
    assert torch.equal(weights(trainer), after_two)
    _, buffer = trainer.export("run", 4)
    assert np.array_equal(buffer, after_two.numpy())


# --- what cannot be private --------------------------------------------------------------------


def test_batchnorm_is_refused_by_the_name_of_its_layer(tmp_path: Path) -> None:
    network = {"name": "unet", "options": {"channels": [4, 8], "strides": [2], "norm": "BATCH"}}
    with pytest.raises(ConfigError, match=r"layer model\.0.*BatchNorm3d.*norm: INSTANCE or GROUP"):
        make_trainer(private_config(tmp_path, network=network))


def test_running_statistics_of_instance_norm_are_refused_and_plain_norms_are_not() -> None:
    check_network(nn.Sequential(nn.InstanceNorm3d(2, affine=True), nn.GroupNorm(1, 2)), name="net")
    with pytest.raises(ConfigError, match="layer 0"):
        check_network(nn.Sequential(nn.InstanceNorm3d(2, track_running_stats=True)), name="net")


@pytest.mark.parametrize(
    ("privacy", "sections", "words"),
    [
        ({"max_grad_norm": None}, {}, "dp_sgd needs max_grad_norm"),
        ({"max_update_norm": 1.0}, {}, "max_update_norm would be ignored by mode dp_sgd"),
        ({"mode": "none"}, {}, "would be ignored by mode none"),
        ({"noise_multiplier": 0.0, "epsilon_limit": 3.0}, {}, "epsilon is infinite without noise"),
        ({}, {"resources": {"amp": "fp16"}}, "resources.amp bf16"),
        (
            {"mode": "update_noise", "max_grad_norm": None, "max_update_norm": 1.0},
            {"method": {"name": "local"}},
            "method local pushes nothing",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, privacy: dict[str, Any], sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        private_config(tmp_path, privacy=privacy, **sections)


@pytest.mark.parametrize(
    ("data", "delta", "words"),
    [({"batch_size": 4}, 1e-2, "site A has 3 training cases"), ({}, 0.4, "delta 0.4 promises nothing at site A")],
)
def test_a_site_with_too_few_cases_is_refused(tmp_path: Path, data: dict[str, Any], delta: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_trainer(private_config(tmp_path, privacy={"delta": delta}, data=data))


def test_privacy_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    one, other = (private_config(tmp_path, privacy={"noise_multiplier": sigma}) for sigma in (1.0, 2.0))
    assert len({make_config(tmp_path).identity, one.identity, other.identity}) == 3


def test_reports_of_older_runs_can_be_read_and_infinite_epsilon_is_null(tmp_path: Path) -> None:
    (report,) = run(make_trainer(private_config(tmp_path, privacy={"noise_multiplier": 0.0})), [1])
    text = to_json(report)
    assert report.privacy_epsilon == float("inf")
    assert '"privacy_epsilon": null' in text
    assert from_json(TrainReport, text.replace(', "privacy_epsilon": null', "")).privacy_epsilon is None
