"""Deep contrastive mutual learning: its gradients, its edges, and what holds whatever P (learner) and Q (peer) say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcml_ray.config import DcmlConfig
from gcml_ray.losses.mutual import mutual_divergences, mutual_weight
from tests.mutual_cases import BETA, MODES, config, sigmoid_case

every_form = pytest.mark.parametrize(("classwise", "sigmoid"), list(itertools.product([False, True], repeat=2)))
VARIANTS = ("contrast", "contrast_hinge", "contrast_advantage", "contrast_soft", "regional", "mutual")


# --- gradients ----------------------------------------------------------------------------------


def random_case(
    seed: int, *, sigmoid: bool, shape: tuple[int, ...] = (2, 3, 4, 4), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    learner, peer = (2 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    target_shape = shape if sigmoid else (shape[0], 1, *shape[2:])
    target = torch.randint(0, 2 if sigmoid else shape[1], target_shape, generator=generator)
    return learner, peer, target


@every_form
@pytest.mark.parametrize("variant", [each for each in VARIANTS if each != "contrast_soft"])
def test_gradient_equals_finite_differences(variant: str, classwise: bool, sigmoid: bool) -> None:
    """Not contrast_soft: its weights are constants to the gradient, but not to a difference; see the next test."""
    learner, peer, target = random_case(3, sigmoid=sigmoid, shape=(1, 3, 3, 3))
    dcml = config(variant, classwise=classwise, normalise="omega")

    def loss(logits: Tensor) -> Tensor:
        return mutual_divergences(logits, peer, target, dcml=dcml, sigmoid=sigmoid)[0]

    assert torch.autograd.gradcheck(loss, (learner.requires_grad_(),))


@pytest.mark.parametrize("mode", ["sigmoid_2d", "softmax_2d", "softmax_classwise"])
def test_gradient_of_soft_treats_its_weights_as_constants(mode: str) -> None:
    """Binary KL has the gradient P - Q in its logit: v1 is pulled by 0.3 (0.4 - 0.7), v2 pushed by 0.6 (0.3 - 0.9)."""
    (learner, peer, target), sigmoid, classwise = MODES[mode]
    learner = learner.clone().requires_grad_()
    dcml = config("contrast_soft", classwise=classwise)
    loss, _, _ = mutual_divergences(learner, peer, target, dcml=dcml, sigmoid=sigmoid)
    expected = torch.tensor([0.0, 0.3 * (0.4 - 0.7) / 3, -BETA * 0.6 * (0.3 - 0.9) / 3, 0.0], dtype=torch.float64)
    foreground = torch.autograd.grad(loss, learner)[0][:, -1:]
    torch.testing.assert_close(foreground, expected.view(1, 1, 2, 2))


@every_form
@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_models_have_no_pull_and_no_gradient_of_it(variant: str, classwise: bool, sigmoid: bool) -> None:
    learner, _, target = random_case(5, sigmoid=sigmoid)
    learner.requires_grad_()
    dcml = config(variant, beta=0.0, classwise=classwise)
    loss, _, statistics = mutual_divergences(learner, learner.detach().clone(), target, dcml=dcml, sigmoid=sigmoid)
    assert statistics.pull.item() == 0
    assert torch.autograd.grad(loss, learner)[0].abs().max() < 1e-15


@every_form
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_reaches_the_peer(variant: str, classwise: bool, sigmoid: bool) -> None:
    learner, peer, target = random_case(7, sigmoid=sigmoid)
    learner.requires_grad_()
    peer.requires_grad_()
    dcml = config(variant, classwise=classwise)
    loss, _, _ = mutual_divergences(learner, peer, target, dcml=dcml, sigmoid=sigmoid)
    loss.backward()
    assert peer.grad is None
    assert learner.grad is not None
    assert learner.grad.abs().sum() > 0


def gradient(voxel: int, dcml: DcmlConfig) -> float:
    """Of D in the learner's logit at one of the four voxels."""
    learner, peer, target = sigmoid_case(2, 2)
    loss, _, _ = mutual_divergences(learner.requires_grad_(), peer, target, dcml=dcml, sigmoid=True)
    return torch.autograd.grad(loss, learner)[0].flatten()[voxel].item()


@pytest.mark.parametrize("variant", ["contrast", "contrast_hinge", "contrast_advantage", "contrast_soft"])
def test_nothing_pushes_beyond_tau(variant: str) -> None:
    """Only v2 pushes; K2 = 0.794. Below tau its gradient is not zero, beyond tau it is."""
    assert gradient(2, config(variant, tau=1.0)) > 0  # descent lowers P further below Q = 0.9
    assert gradient(2, config(variant, tau=0.7)) == 0


def test_soft_never_pulls_below_the_learners_own_confidence() -> None:
    """At v0 both are right and the learner is surer (0.8 over 0.6): contrast pulls it down, contrast_soft does not."""
    assert gradient(0, config("contrast")) > 0
    assert gradient(0, config("contrast_soft")) == 0


# --- edges --------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("normalise", ["region", "omega", "volume"])
@pytest.mark.parametrize("variant", [each for each in VARIANTS if each != "mutual"])
def test_empty_region_gives_zero_not_nan(variant: str, normalise: str, classwise: bool, sigmoid: bool) -> None:
    """All background, and both models say so: Omega is empty."""
    learner = torch.full((2, 2, 3, 3), -2.0)
    learner[:, 0] = -1.0
    peer, learner = 2 * learner, learner.requires_grad_()
    target = torch.zeros((2, 2 if sigmoid else 1, 3, 3), dtype=torch.long)
    dcml = config(variant, normalise=normalise, classwise=classwise)
    loss, _, statistics = mutual_divergences(learner, peer, target, dcml=dcml, sigmoid=sigmoid)
    assert loss.item() == 0
    assert statistics.omega_share.item() == 0
    assert torch.autograd.grad(loss, learner)[0].abs().sum() == 0


@every_form
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_logits_stay_finite(variant: str, classwise: bool, sigmoid: bool) -> None:
    """Certain predictions, in float32: 1 - P rounds to 0 there."""
    learner, peer, target = random_case(11, sigmoid=sigmoid, dtype=torch.float32)
    learner, peer = (100 * learner.sign()).requires_grad_(), 100 * peer.sign()
    dcml = config(variant, classwise=classwise)
    loss, _, _ = mutual_divergences(learner, peer, target, dcml=dcml, sigmoid=sigmoid)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, learner)[0]).all()


def test_certain_and_wrong_classwise_costs_the_distance_of_the_logits() -> None:
    """Learner certain of 0, peer certain of 1, logits 100 apart: KL = log 1/P(1) = 100, not infinity."""
    learner = torch.tensor([100.0, 0.0, 0.0]).view(1, 3, 1, 1)
    peer = torch.tensor([0.0, 100.0, 0.0]).view(1, 3, 1, 1)
    target = torch.ones((1, 1, 1, 1), dtype=torch.long)
    loss, _, _ = mutual_divergences(learner, peer, target, dcml=config("contrast", classwise=True), sigmoid=False)
    assert loss.item() == pytest.approx(100.0)


def test_half_precision_logits_are_compared_in_float32_even_under_autocast() -> None:
    learner, peer, target = random_case(13, sigmoid=False, dtype=torch.float32)
    learner, peer = learner.bfloat16(), peer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = mutual_divergences(learner, peer, target, dcml=config("contrast"), sigmoid=False)
    expected, _, _ = mutual_divergences(learner.float(), peer.float(), target, dcml=config("contrast"), sigmoid=False)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()


def test_models_that_predict_different_classes_are_refused() -> None:
    learner, peer, target = (torch.zeros(1, channels, 4, 4) for channels in (2, 3, 1))
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and peer logits \(1, 3, 4, 4\)"):
        mutual_divergences(learner, peer, target, dcml=config("contrast"), sigmoid=False)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_target_of_another_shape_is_refused(sigmoid: bool) -> None:
    logits, target = torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"target \(1, 3, 4, 4\) does not belong to logits \(1, 2, 4, 4\)"):
        mutual_divergences(logits, logits, target, dcml=config("contrast"), sigmoid=sigmoid)


def test_softmax_over_one_class_is_refused() -> None:
    logits = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="softmax needs the background"):
        mutual_divergences(logits, logits, torch.zeros(1, 1, 4, 4), dcml=config("mutual"), sigmoid=False)


# --- properties ---------------------------------------------------------------------------------

cases = st.tuples(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from(["region", "omega", "volume"]))


@settings(max_examples=40, deadline=None)
@given(cases, st.sampled_from(["contrast_hinge", "regional", "mutual"]))
def test_hinge_regional_and_mutual_are_never_negative(case: tuple[int, bool, bool, str], variant: str) -> None:
    """Beyond the rounding of float32, which shows where models are nearly equal."""
    seed, sigmoid, classwise, normalise = case
    learner, peer, target = random_case(seed, sigmoid=sigmoid, dtype=torch.float32)
    dcml = config(variant, classwise=classwise, normalise=normalise)
    for other in (peer, learner + 1e-4 * peer):
        assert mutual_divergences(learner, other, target, dcml=dcml, sigmoid=sigmoid)[0].item() >= -1e-6


@every_form
@pytest.mark.parametrize("variant", [each for each in VARIANTS if each != "contrast_advantage"])  # here without any
def test_gradient_of_nearly_equal_models_is_as_exact_as_float32(variant: str, classwise: bool, sigmoid: bool) -> None:
    """Models that differ by a thousandth: their divergence is of the size of its rounding, its gradient is not."""
    learner, noise, target = random_case(5, sigmoid=sigmoid, shape=(2, 3, 8, 8))
    dcml, gradients = config(variant, classwise=classwise), []
    for dtype in (torch.float32, torch.float64):
        logits = learner.to(dtype, copy=True).requires_grad_()
        peer = learner.to(dtype) + 1e-3 * noise.to(dtype)
        mutual_divergences(logits, peer, target, dcml=dcml, sigmoid=sigmoid)[0].backward()
        assert logits.grad is not None
        gradients.append(logits.grad.double())
    single, exact = gradients
    assert exact.norm() > 0
    assert (single - exact).norm() < 1e-3 * exact.norm()


@settings(max_examples=40, deadline=None)
@given(cases, st.sampled_from(VARIANTS))
def test_order_of_the_batch_does_not_matter(case: tuple[int, bool, bool, str], variant: str) -> None:
    seed, sigmoid, classwise, normalise = case
    tensors = random_case(seed, sigmoid=sigmoid, shape=(3, 3, 3, 3))
    dcml = config(variant, classwise=classwise, normalise=normalise)
    loss, _, _ = mutual_divergences(*tensors, dcml=dcml, sigmoid=sigmoid)
    turned, _, _ = mutual_divergences(*(tensor[[2, 0, 1]] for tensor in tensors), dcml=dcml, sigmoid=sigmoid)
    torch.testing.assert_close(turned, loss)


def test_weight_ramps_up_linearly_and_stays() -> None:
    dcml = DcmlConfig.model_validate({"lambda": 0.4, "ramp_up_rounds": 3})
    assert [mutual_weight(dcml, index) for index in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_weight_without_ramp_up_is_lambda_from_the_start() -> None:
    assert mutual_weight(DcmlConfig.model_validate({"lambda": 0.4}), 0) == 0.4


def test_negative_round_index_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        mutual_weight(DcmlConfig(), -1)
