"""Deep contrastive mutual learning: every variant against numbers worked out by hand.

Legend: B batch, C output channels, *spatial voxels; P the learner's, Q the peer's probabilities, y the target.
"""

from __future__ import annotations

import itertools
from math import log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcml_ray.config import DcmlConfig
from gcml_ray.config.methods import dcml_keys
from gcml_ray.losses.mutual import mutual_divergences, mutual_weight

every_form = pytest.mark.parametrize(("classwise", "sigmoid"), list(itertools.product([False, True], repeat=2)))
VARIANTS = ("contrast", "contrast_hinge", "contrast_advantage", "contrast_soft", "regional", "mutual")

# Four voxels, foreground against background.
#            v0: both right   v1: peer right   v2: peer wrong   v3: easy background, outside Omega
TARGET = [1, 1, 0, 0]
LEARNER = [0.8, 0.4, 0.3, 0.1]  # P(foreground)
PEER = [0.6, 0.7, 0.9, 0.2]  # Q(foreground)
K0 = 0.6 * log(0.6 / 0.8) + 0.4 * log(0.4 / 0.2)  # KL(Q || P) = 0.1047
K1 = 0.7 * log(0.7 / 0.4) + 0.3 * log(0.3 / 0.6)  # 0.1838
K2 = 0.9 * log(0.9 / 0.3) + 0.1 * log(0.1 / 0.7)  # 0.7942
K3 = 0.2 * log(0.2 / 0.1) + 0.8 * log(0.8 / 0.9)  # 0.0444
BETA = 0.1


def config(variant: str, **options: Any) -> DcmlConfig:
    settings = {"variant": variant, "beta": BETA, "tau": 1.0, **options}
    used = dcml_keys(variant)  # the others are refused, as they would be ignored
    return DcmlConfig.model_validate({key: value for key, value in settings.items() if key in used})


def softmax_case(*spatial: int) -> tuple[Tensor, Tensor, Tensor]:
    """The four voxels as two softmax classes; a constant shift of both logits changes nothing."""

    def logits(foreground: list[float]) -> Tensor:
        p = torch.tensor(foreground, dtype=torch.float64)
        return (torch.stack([1 - p, p]).log() + 3.0).view(1, 2, *spatial)

    return logits(LEARNER), logits(PEER), torch.tensor(TARGET).view(1, 1, *spatial)


def sigmoid_case(*spatial: int) -> tuple[Tensor, Tensor, Tensor]:
    """The four voxels as one sigmoid channel."""

    def logits(foreground: list[float]) -> Tensor:
        return torch.tensor(foreground, dtype=torch.float64).logit().view(1, 1, *spatial)

    return logits(LEARNER), logits(PEER), torch.tensor(TARGET).view(1, 1, *spatial)


MODES = {
    "softmax_2d": (softmax_case(2, 2), False, False),
    "softmax_3d": (softmax_case(2, 1, 2), False, False),
    "softmax_classwise": (softmax_case(2, 2), False, True),
    "sigmoid_2d": (sigmoid_case(2, 2), True, False),
    "sigmoid_3d": (sigmoid_case(1, 2, 2), True, False),
    "sigmoid_classwise": (sigmoid_case(2, 2), True, True),
}

# R+ = {v0, v1}, R- = {v2}, Omega = {v0, v1, v2}; advantage: R+ = {v1}, R- = {v2}.
# Soft: v1 pulls with q_y - p_y = 0.7 - 0.4, v2 pushes with p_y - q_y = 0.7 - 0.1.
EXPECTED = {
    ("contrast", "region"): (K0 + K1) / 2 - BETA * K2,
    ("contrast", "omega"): (K0 + K1) / 3 - BETA * K2 / 3,
    ("contrast", "volume"): (K0 + K1) / 4 - BETA * K2 / 4,
    ("contrast_hinge", "region"): (K0 + K1) / 2 + BETA * (1 - K2),
    ("contrast_hinge", "omega"): (K0 + K1) / 3 + BETA * (1 - K2) / 3,
    ("contrast_hinge", "volume"): (K0 + K1) / 4 + BETA * (1 - K2) / 4,
    ("contrast_advantage", "region"): K1 - BETA * K2,
    ("contrast_advantage", "omega"): K1 / 3 - BETA * K2 / 3,
    ("contrast_advantage", "volume"): K1 / 4 - BETA * K2 / 4,
    ("contrast_soft", "region"): (0.3 * K1 - BETA * 0.6 * K2) / 3,
    ("contrast_soft", "omega"): (0.3 * K1 - BETA * 0.6 * K2) / 3,
    ("contrast_soft", "volume"): (0.3 * K1 - BETA * 0.6 * K2) / 4,
    ("regional", "region"): (K0 + K1) / 2,
    ("regional", "omega"): (K0 + K1) / 3,
    ("regional", "volume"): (K0 + K1) / 4,
    ("mutual", "region"): (K0 + K1 + K2 + K3) / 4,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("variant", "normalise"), EXPECTED)
def test_every_variant_and_normalisation_gives_the_hand_computed_value(variant: str, normalise: str, mode: str) -> None:
    (learner, peer, target), sigmoid, classwise = MODES[mode]
    dcml = config(variant, normalise=normalise, classwise=classwise)
    loss, _, _ = mutual_divergences(learner, peer, target, dcml=dcml, sigmoid=sigmoid)
    assert loss.item() == pytest.approx(EXPECTED[variant, normalise], abs=1e-12)


@pytest.mark.parametrize(("variant", "push"), [("contrast", -0.5), ("contrast_hinge", 0.0)])
def test_tau_bounds_the_push(variant: str, push: float) -> None:
    """K2 = 0.794 is beyond tau = 0.5: contrast counts tau, the hinge has nothing left to ask for."""
    learner, peer, target = softmax_case(2, 2)
    loss, _, _ = mutual_divergences(learner, peer, target, dcml=config(variant, tau=0.5), sigmoid=False)
    assert loss.item() == pytest.approx((K0 + K1) / 2 + BETA * push)


def test_none_is_zero_and_has_no_graph() -> None:
    learner, peer, target = softmax_case(2, 2)
    loss, _, statistics = mutual_divergences(learner.requires_grad_(), peer, target, dcml=config("none"), sigmoid=False)
    assert loss.item() == 0
    assert not loss.requires_grad
    assert statistics.omega_share.item() == 0


# --- three classes, two channels ----------------------------------------------------------------

# Three classes, three voxels; columns are voxels. y = (1, 2, 0), p^ = (1, 0, 1), q^ = (1, 2, 0).
THREE_P = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.6], [0.1, 0.4, 0.1]], dtype=torch.float64)
THREE_Q = torch.tensor([[0.1, 0.2, 0.5], [0.6, 0.2, 0.4], [0.3, 0.6, 0.1]], dtype=torch.float64)
THREE_TARGET = torch.tensor([1, 2, 0]).view(1, 1, 1, 3)


def three_class_logits() -> tuple[Tensor, Tensor]:
    return THREE_P.log().view(1, 3, 1, 3), THREE_Q.log().view(1, 3, 1, 3)


def bernoulli(q: float, p: float) -> float:
    return q * log(q / p) + (1 - q) * log((1 - q) / (1 - p))


def test_three_classes_contrast_sums_the_divergence_over_all_classes() -> None:
    """The peer is right everywhere; v2 is in Omega because the learner sees class 1 there."""
    v0 = 0.1 * log(0.1 / 0.2) + 0.6 * log(0.6 / 0.7) + 0.3 * log(0.3 / 0.1)
    v1 = 0.2 * log(0.2 / 0.5) + 0.2 * log(0.2 / 0.1) + 0.6 * log(0.6 / 0.4)
    v2 = 0.5 * log(0.5 / 0.3) + 0.4 * log(0.4 / 0.6) + 0.1 * log(0.1 / 0.1)
    learner, peer = three_class_logits()
    loss, _, _ = mutual_divergences(learner, peer, THREE_TARGET, dcml=config("contrast"), sigmoid=False)
    assert loss.item() == pytest.approx((v0 + v1 + v2) / 3)


def test_three_classes_classwise_is_the_mean_over_one_against_rest() -> None:
    """Class 1: Omega = {v0, v2} (y, p^). Class 2: Omega = {v1}. The peer is right in both."""
    class_1 = (bernoulli(0.6, 0.7) + bernoulli(0.4, 0.6)) / 2
    class_2 = bernoulli(0.6, 0.4)
    learner, peer = three_class_logits()
    dcml = config("contrast", classwise=True)
    loss, _, _ = mutual_divergences(learner, peer, THREE_TARGET, dcml=dcml, sigmoid=False)
    assert loss.item() == pytest.approx((class_1 + class_2) / 2)


def test_classwise_counts_only_classes_that_occur_in_the_target() -> None:
    """Without class 2 in the target, class 1 alone counts; now Omega of class 1 is {v0, v1, v2}."""
    target = torch.tensor([1, 1, 0]).view(1, 1, 1, 3)
    pull = (bernoulli(0.6, 0.7) + bernoulli(0.4, 0.6)) / 2  # v0 and v2: the peer says 1 and not-1, rightly
    push = bernoulli(0.2, 0.1)  # v1: the peer says not-1, wrongly
    learner, peer = three_class_logits()
    loss, _, _ = mutual_divergences(learner, peer, target, dcml=config("contrast", classwise=True), sigmoid=False)
    assert loss.item() == pytest.approx(pull - BETA * push)


# Two nested channels, two voxels. Channel 0: y = (1, 1). Channel 1: y = (1, 0).
CHANNELS_P = torch.tensor([[0.9, 0.4], [0.3, 0.6]], dtype=torch.float64).logit().view(1, 2, 1, 2)
CHANNELS_Q = torch.tensor([[0.8, 0.7], [0.6, 0.7]], dtype=torch.float64).logit().view(1, 2, 1, 2)
CHANNELS_TARGET = torch.tensor([[1, 1], [1, 0]]).view(1, 2, 1, 2)
PULLS = (bernoulli(0.8, 0.9), bernoulli(0.7, 0.4), bernoulli(0.6, 0.3))  # channel 0: two voxels; channel 1: v0
PUSH = bernoulli(0.7, 0.6)  # channel 1, v1: predicted, but absent


def test_sigmoid_masked_mean_runs_over_voxels_and_channels_together() -> None:
    loss, _, _ = mutual_divergences(CHANNELS_P, CHANNELS_Q, CHANNELS_TARGET, dcml=config("contrast"), sigmoid=True)
    assert loss.item() == pytest.approx(sum(PULLS) / 3 - BETA * PUSH)


def test_sigmoid_classwise_is_the_mean_over_channels() -> None:
    dcml = config("contrast", classwise=True)
    loss, _, _ = mutual_divergences(CHANNELS_P, CHANNELS_Q, CHANNELS_TARGET, dcml=dcml, sigmoid=True)
    channel_0, channel_1 = (PULLS[0] + PULLS[1]) / 2, PULLS[2] - BETA * PUSH
    assert loss.item() == pytest.approx((channel_0 + channel_1) / 2)


def test_classwise_volume_is_the_number_of_voxels_of_one_class() -> None:
    dcml = config("contrast", classwise=True, normalise="volume")
    loss, _, _ = mutual_divergences(CHANNELS_P, CHANNELS_Q, CHANNELS_TARGET, dcml=dcml, sigmoid=True)
    channel_0, channel_1 = (PULLS[0] + PULLS[1]) / 2, (PULLS[2] - BETA * PUSH) / 2
    assert loss.item() == pytest.approx((channel_0 + channel_1) / 2)


# --- statistics ---------------------------------------------------------------------------------


def test_statistics_give_the_terms_and_the_shares_of_the_regions() -> None:
    learner, peer, target = softmax_case(2, 2)
    _, _, statistics = mutual_divergences(
        learner.requires_grad_(), peer, target, dcml=config("contrast"), sigmoid=False
    )
    values = [value.item() for value in vars(statistics).values()]
    assert values == pytest.approx([(K0 + K1) / 2, K2, 2 / 4, 1 / 4, 3 / 4])
    assert not any(value.requires_grad for value in vars(statistics).values())


def test_soft_shares_count_the_voxels_with_weight() -> None:
    learner, peer, target = softmax_case(2, 2)
    _, _, statistics = mutual_divergences(learner, peer, target, dcml=config("contrast_soft"), sigmoid=False)
    assert statistics.pull_share.item() == 1 / 4
    assert statistics.push_share.item() == 1 / 4


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
