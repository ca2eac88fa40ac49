"""Deep contrastive mutual learning: every variant against numbers worked out by hand.

Legend: B batch, C output channels, *spatial voxels; P the learner's, Q the peer's probabilities, y the target.
"""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from gcml_ray.losses.mutual import mutual_divergences
from tests.mutual_cases import BETA, K0, K1, K2, K3, MODES, config, softmax_case

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
