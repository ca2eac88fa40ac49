import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcml_ray.config import DcmlConfig, FederationConfig, OptimiserConfig
from gcml_ray.data.site_data import Batch
from gcml_ray.model.learner import Learner, MeanStatistics, learning_rate, local_step, mutual_step
from gcml_ray.model.precision import Precision
from tests.method_rounds import cross_entropy

PLAIN = DcmlConfig(variant="mutual")
LOCAL_KEYS = {"segmentation", "incoming_segmentation"}
MUTUAL_KEYS = {"mutual", "incoming_mutual", "pull", "push", "region/pull", "region/push", "region/omega"}


def no_segmentation_loss(heads: Sequence[Tensor], label: Tensor) -> Tensor:
    """Leaves the mutual term alone; its gradient is zero but exists."""
    del label
    return 0 * heads[0].sum()


def batch() -> Batch:
    """Two 4x4 patches, foreground where the image is positive."""
    image = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Batch(image=image, label=(image > 0).long())


def make_learner(*, seed: int = 0, **options: Any) -> Learner:
    values: dict[str, Any] = {"name": "adam", "learning_rate": 0.05} | options
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    optimiser = OptimiserConfig(**values)
    return Learner(module, send_buffers=True, optimiser=optimiser, precision=Precision("cpu", "none"))


def flat(learner: Learner) -> Tensor:
    return learner.model.flat.clone()


def mutual(local: Learner, incoming: Learner, **changes: Any) -> dict[str, Tensor]:
    options: dict[str, Any] = {"dcml": PLAIN, "weight": 1.0, "sigmoid": False, "loss": cross_entropy} | changes
    return mutual_step(local, incoming, batch(), options.pop("loss"), **options)


# --- learning rate -------------------------------------------------------------------------------

# 4 rounds of 5 steps: 20 in all. Round 1 step 0 is at progress 0, round 3 step 0 at 10/20, round 4 step 4 at 19/20.
PLACES = {"start": (1, 0), "middle": (3, 0), "end": (4, 4)}


@pytest.mark.parametrize(
    ("schedule", "place", "expected"),
    [
        ("constant", "start", 0.2),
        ("constant", "end", 0.2),
        ("cosine", "start", 0.2),
        ("cosine", "middle", 0.2 * (0.01 + 0.99 * 0.5)),  # cos(pi / 2) = 0
        ("cosine", "end", 0.2 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.95)))),
        ("polynomial", "start", 0.2),
        ("polynomial", "middle", 0.2 * 0.5**0.9),
        ("polynomial", "end", 0.2 * 0.05**0.9),
    ],
)
def test_learning_rate_at_known_places_of_a_run(schedule: str, place: str, expected: float) -> None:
    optimiser = OptimiserConfig(learning_rate=0.2, schedule=schedule)  # type: ignore[arg-type]
    federation = FederationConfig(rounds=4, local_steps=5)
    round_number, step = PLACES[place]
    rate = learning_rate(optimiser, federation, round_number=round_number, step=step)
    assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_learning_rate_falls_with_every_step_and_stays_positive(schedule: str) -> None:
    optimiser = OptimiserConfig(learning_rate=0.2, schedule=schedule)  # type: ignore[arg-type]
    federation = FederationConfig(rounds=4, local_steps=5)
    rates = [learning_rate(optimiser, federation, round_number=1 + n // 5, step=n % 5) for n in range(20)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert rates[-1] > 0


def test_set_learning_rate_is_the_rate_of_the_next_step() -> None:
    """SGD moves by rate x gradient: ten times the rate, ten times the way."""
    ways = []
    for rate in (0.01, 0.1):
        learner = make_learner(name="sgd")
        before = flat(learner)
        learner.set_learning_rate(rate)
        local_step(learner, batch(), cross_entropy)
        ways.append(flat(learner) - before)
    torch.testing.assert_close(ways[1], 10 * ways[0], rtol=1e-3, atol=1e-6)


# --- local step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_local_steps_lower_the_loss_of_a_fixed_batch(name: str) -> None:
    learner = make_learner(name=name)
    losses = [float(local_step(learner, batch(), cross_entropy)["segmentation"]) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_local_step_reports_the_loss_before_its_update() -> None:
    learner = make_learner()
    expected = cross_entropy(learner.forward(batch().image), batch().label)
    statistics = local_step(learner, batch(), cross_entropy)
    assert set(statistics) == {"segmentation"}
    assert torch.equal(statistics["segmentation"], expected.detach())
    assert not statistics["segmentation"].requires_grad


def test_gradients_do_not_pile_up_over_steps() -> None:
    learner = make_learner(learning_rate=1e-12, name="sgd")
    local_step(learner, batch(), cross_entropy)
    first = learner.model.gradient.clone()
    local_step(learner, batch(), cross_entropy)
    torch.testing.assert_close(learner.model.gradient, first)


def test_clipping_bounds_the_norm_of_the_whole_gradient() -> None:
    """SGD with rate 1 moves by the gradient itself, here much longer than 0.001 before it is clipped."""
    learner = make_learner(name="sgd", clip_norm=0.001)
    learner.set_learning_rate(1.0)
    before = flat(learner)
    local_step(learner, batch(), cross_entropy)
    assert float((flat(learner) - before).norm()) == pytest.approx(0.001, rel=1e-3)


def test_autocast_is_off_on_a_cpu() -> None:
    with Precision("cpu", "bf16").autocast():
        assert not torch.is_autocast_enabled("cpu")


# --- mutual step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"weight": 0.0}, {"dcml": DcmlConfig(variant="none")}])
def test_without_the_mutual_term_two_separate_local_steps_are_left(change: dict[str, Any]) -> None:
    local, incoming = make_learner(seed=1), make_learner(seed=2)
    alone, peer_alone = make_learner(seed=1), make_learner(seed=2)
    for _ in range(3):
        statistics = mutual(local, incoming, **change)
        local_step(alone, batch(), cross_entropy)
        local_step(peer_alone, batch(), cross_entropy)
    assert torch.equal(flat(local), flat(alone))
    assert torch.equal(flat(incoming), flat(peer_alone))
    assert set(statistics) == LOCAL_KEYS


def test_mutual_step_reports_losses_terms_and_regions() -> None:
    statistics = mutual(make_learner(seed=1), make_learner(seed=2), dcml=DcmlConfig(variant="contrast"))
    assert set(statistics) == LOCAL_KEYS | MUTUAL_KEYS
    assert not any(value.requires_grad for value in statistics.values())
    assert float(statistics["region/pull"] + statistics["region/push"]) == pytest.approx(
        float(statistics["region/omega"])
    )


@pytest.mark.parametrize("variant", ["contrast", "contrast_soft", "regional", "mutual"])
def test_each_models_gradient_is_that_of_its_own_loss_with_the_other_held_fixed(variant: Any) -> None:
    """The oracle: autograd over one model's weights alone, the other one's logits being constants."""
    from gcml_ray.losses.mutual import mutual_divergences  # noqa: PLC0415 - the oracle's part of this file

    dcml = DcmlConfig(variant=variant)
    local, incoming = make_learner(seed=1), make_learner(seed=2)
    logits = [make_learner(seed=seed).forward(batch().image)[0] for seed in (1, 2)]
    expected = []
    for own, other, seed in ((0, 1, 1), (1, 0, 2)):
        module = make_learner(seed=seed).model.module
        heads = [module(batch().image)]
        peer = logits[other].detach().clone()
        assert torch.equal(heads[0], logits[own])
        term, _, _ = mutual_divergences(heads[0], peer, batch().label, dcml=dcml, sigmoid=False)
        loss = cross_entropy(heads, batch().label) + 0.7 * term
        expected.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))]))
    mutual(local, incoming, dcml=dcml, weight=0.7)
    torch.testing.assert_close(local.model.gradient, expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(incoming.model.gradient, expected[1], rtol=1e-5, atol=1e-7)


def test_both_models_learn_from_each_other() -> None:
    """Without labels, mutual steps alone bring two models' predictions together."""
    local, incoming = make_learner(seed=1, learning_rate=0.01), make_learner(seed=2, learning_rate=0.01)
    start = flat(local), flat(incoming)
    terms = [float(mutual(local, incoming, loss=no_segmentation_loss)["mutual"]) for _ in range(60)]
    assert terms[-1] < 0.2 * terms[0]
    assert not torch.equal(flat(local), start[0])
    assert not torch.equal(flat(incoming), start[1])


def test_identical_models_have_nothing_to_tell_each_other() -> None:
    local, incoming, alone = make_learner(name="sgd"), make_learner(name="sgd"), make_learner(name="sgd")
    statistics = mutual(local, incoming)
    local_step(alone, batch(), cross_entropy)
    assert float(statistics["mutual"]) == 0
    torch.testing.assert_close(flat(local), flat(alone), rtol=0, atol=1e-7)
    assert torch.equal(flat(incoming), flat(local))


def test_each_model_is_clipped_by_its_own_norm() -> None:
    local, incoming = (make_learner(seed=seed, name="sgd", learning_rate=1.0, clip_norm=0.001) for seed in (1, 2))
    before = flat(local), flat(incoming)
    mutual(local, incoming)
    for learner, start in zip((local, incoming), before, strict=True):
        assert float((flat(learner) - start).norm()) == pytest.approx(0.001, rel=1e-3)


# --- statistics ----------------------------------------------------------------------------------


def test_a_mean_counts_only_the_steps_that_had_the_value() -> None:
    statistics = MeanStatistics()
    statistics.add({"a": torch.tensor(1.0)})
    statistics.add({"a": torch.tensor(2.0), "b": torch.tensor(10.0)})
    statistics.add({"a": torch.tensor(6.0)})
    assert statistics.means() == {"a": 3.0, "b": 10.0}


def test_adding_statistics_changes_nobody_elses_tensors() -> None:
    statistics, value = MeanStatistics(), torch.tensor(1.0)
    statistics.add({"a": value})
    statistics.add({"a": torch.tensor(5.0)})
    assert value.item() == 1.0


def test_no_steps_give_no_means() -> None:
    assert MeanStatistics().means() == {}


# --- forgetting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9},
        {"name": "adam", "amsgrad": True},
        {"name": "adamw", "weight_decay": 0.1},
    ],
)
def test_a_forgotten_optimiser_steps_as_a_fresh_one_bit_for_bit(options: dict[str, Any]) -> None:
    used, fresh = make_learner(**options), make_learner(**options)
    start = flat(used)
    for _ in range(3):
        local_step(used, batch(), cross_entropy)
    used.model.flat.copy_(start)
    used.optimiser.forget()
    for _ in range(3):
        local_step(used, batch(), cross_entropy)
        local_step(fresh, batch(), cross_entropy)
    assert torch.equal(flat(used), flat(fresh))


def test_forgetting_before_the_first_step_does_nothing() -> None:
    learner, fresh = make_learner(), make_learner()
    learner.optimiser.forget()
    local_step(learner, batch(), cross_entropy)
    local_step(fresh, batch(), cross_entropy)
    assert torch.equal(flat(learner), flat(fresh))
