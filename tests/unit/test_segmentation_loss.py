"""The supervised loss against numbers worked out by hand.

Legend: B batch, C classes, R regions; I intersection and U union of a class, in voxels.
"""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from gcml_ray.config import DataConfig, LossConfig
from gcml_ray.errors import ConfigError
from gcml_ray.losses.segmentation import build_segmentation_loss

# Four voxels: P(foreground), and the label.
FOREGROUND = [0.8, 0.4, 0.3, 0.1]
LABEL = [1, 1, 0, 0]
# Foreground: I = 0.8 + 0.4, U = (0.8 + 0.4 + 0.3 + 0.1) + 2 - I. Background: I = 0.7 + 0.9, U = 2.4 + 2 - I.
JACCARD_1 = 1 - (1.2 + 1) / (2.4 + 1)  # smooth 1
JACCARD_0 = 1 - (1.6 + 1) / (2.8 + 1)
CROSS_ENTROPY = -(log(0.8) + log(0.4) + log(0.7) + log(0.9)) / 4
FOCAL = -(0.2**2 * log(0.8) + 0.6**2 * log(0.4) + 0.3**2 * log(0.7) + 0.1**2 * log(0.9)) / 4


def data(spatial_dims: int = 2, *, regions: int = 0, classes: int = 2) -> DataConfig:
    labels = {f"class{value}": value for value in range(max(classes, regions + 1))}
    return DataConfig.model_validate(
        {
            "datalist": "cases.json",
            "channels": ["t1"],
            "labels": labels,
            "regions": {f"region{i}": [f"class{i + 1}"] for i in range(regions)} or None,
            "spatial_dims": spatial_dims,
            "spacing_is_real": True,
            "patch_size": (8,) * spatial_dims,
        }
    )


def value(heads: list[Tensor], target: Tensor, config: DataConfig, **options: Any) -> float:
    loss = build_segmentation_loss(LossConfig.model_validate(options), config)
    return loss(heads, target).item()


def softmax_case(*spatial: int) -> tuple[Tensor, Tensor]:
    p = torch.tensor(FOREGROUND)
    return torch.stack([1 - p, p]).log().view(1, 2, *spatial), torch.tensor(LABEL).view(1, 1, *spatial)


def sigmoid_case(*spatial: int) -> tuple[Tensor, Tensor]:
    """Region 0 is the foreground above, region 1 its complement."""
    p = torch.tensor(FOREGROUND)
    y = torch.tensor(LABEL)
    return torch.stack([p, 1 - p]).logit().view(1, 2, *spatial), torch.stack([y, 1 - y]).view(1, 2, *spatial)


@pytest.mark.parametrize("spatial", [(2, 2), (1, 2, 2)])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"jaccard_weight": 1.0}, (JACCARD_0 + JACCARD_1) / 2),
        ({"jaccard_weight": 1.0, "include_background": False}, JACCARD_1),
        ({"jaccard_weight": 1.0, "smooth": 10.0}, 1 - (11.2 / 12.4 + 11.6 / 12.8) / 2),
        ({"jaccard_weight": 0.0}, CROSS_ENTROPY),
        ({"jaccard_weight": 0.0, "include_background": False}, CROSS_ENTROPY),
        ({"jaccard_weight": 0.0, "name": "jaccard_focal"}, FOCAL),
        ({"jaccard_weight": 0.0, "name": "jaccard_focal", "focal_gamma": 0.0}, CROSS_ENTROPY),
        ({"jaccard_weight": 0.3}, 0.3 * (JACCARD_0 + JACCARD_1) / 2 + 0.7 * CROSS_ENTROPY),
        ({"name": "jaccard_focal"}, 0.5 * (JACCARD_0 + JACCARD_1) / 2 + 0.5 * FOCAL),
    ],
)
def test_softmax_value_by_hand(options: dict[str, Any], expected: float, spatial: tuple[int, ...]) -> None:
    logits, target = softmax_case(*spatial)
    assert value([logits], target, data(len(spatial)), **options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spatial", [(2, 2), (1, 2, 2)])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"jaccard_weight": 1.0}, (JACCARD_1 + JACCARD_0) / 2),
        ({"jaccard_weight": 0.0}, CROSS_ENTROPY),
        ({"jaccard_weight": 0.0, "name": "jaccard_focal"}, FOCAL),
        ({"jaccard_weight": 0.0, "name": "jaccard_focal", "focal_gamma": 0.0}, CROSS_ENTROPY),
        ({"name": "jaccard_focal"}, 0.5 * (JACCARD_1 + JACCARD_0) / 2 + 0.5 * FOCAL),
    ],
)
def test_sigmoid_value_by_hand(options: dict[str, Any], expected: float, spatial: tuple[int, ...]) -> None:
    """Region 1 is region 0's complement: each region's binary loss is what softmax gave, class for class."""
    logits, target = sigmoid_case(*spatial)
    assert value([logits], target, data(len(spatial), regions=2), **options) == pytest.approx(expected, rel=1e-5)


def test_single_region_is_allowed() -> None:
    logits, target = sigmoid_case(2, 2)
    loss = value([logits[:, :1]], target[:, :1], data(regions=1), jaccard_weight=1.0, class_weights=[2.0])
    assert loss == pytest.approx(JACCARD_1)


# --- class weights ------------------------------------------------------------------------------

# Weights 1 and 3 become 0.5 and 1.5. Voxels 0 and 1 are foreground, 2 and 3 background.
WEIGHTED_JACCARD = (0.5 * JACCARD_0 + 1.5 * JACCARD_1) / 2
WEIGHTED_CROSS_ENTROPY = -(1.5 * log(0.8) + 1.5 * log(0.4) + 0.5 * log(0.7) + 0.5 * log(0.9)) / 4
WEIGHTED_FOCAL = -(1.5 * (0.04 * log(0.8) + 0.36 * log(0.4)) + 0.5 * (0.09 * log(0.7) + 0.01 * log(0.9))) / 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"jaccard_weight": 1.0}, WEIGHTED_JACCARD),
        ({"jaccard_weight": 1.0, "include_background": False}, JACCARD_1),
        ({"jaccard_weight": 0.0}, WEIGHTED_CROSS_ENTROPY),
        ({"jaccard_weight": 0.0, "name": "jaccard_focal"}, WEIGHTED_FOCAL),
    ],
)
def test_softmax_class_weights_by_hand(options: dict[str, Any], expected: float) -> None:
    logits, target = softmax_case(2, 2)
    assert value([logits], target, data(), class_weights=[1.0, 3.0], **options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["jaccard_ce", "jaccard_focal"])
def test_sigmoid_class_weights_weigh_the_regions(name: str) -> None:
    """Weights 1 and 3 of two regions: 0.25 and 0.75 of the loss that each one has alone."""
    logits, target = sigmoid_case(2, 2)
    logits[:, 1] += 0.7  # so that the regions' losses differ
    alone = [value([logits[:, i : i + 1]], target[:, i : i + 1], data(regions=1), name=name) for i in range(2)]
    both = value([logits], target, data(regions=2), name=name, class_weights=[1.0, 3.0])
    assert alone[0] != pytest.approx(alone[1])
    assert both == pytest.approx(0.25 * alone[0] + 0.75 * alone[1], rel=1e-5)


@pytest.mark.parametrize("name", ["jaccard_ce", "jaccard_focal"])
def test_equal_class_weights_are_the_same_as_none(name: str) -> None:
    logits, target = softmax_case(2, 2)
    weighted = value([logits], target, data(), name=name, class_weights=[5.0, 5.0])
    assert weighted == pytest.approx(value([logits], target, data(), name=name))


def test_patch_of_a_class_with_weight_zero_is_not_nan() -> None:
    logits, _ = softmax_case(2, 2)
    target = torch.zeros((1, 1, 2, 2), dtype=torch.long)
    assert value([logits], target, data(), jaccard_weight=0.0, class_weights=[0.0, 1.0]) == 0


# --- batch --------------------------------------------------------------------------------------


def test_batch_sums_add_up_intersections_before_dividing() -> None:
    """Sample 0 is the case above, sample 1 predicts 0.5 everywhere and is all background.

    Foreground: I = 1.2 + 0, U = 2.4 + 2. Background: I = 1.6 + 2, U = 2.8 + (2 + 4 - 2).
    """
    logits, target = softmax_case(2, 2)
    logits = torch.cat([logits, torch.zeros_like(logits)])
    target = torch.cat([target, torch.zeros_like(target)])
    together = 1 - ((1.2 + 1) / (4.4 + 1) + (3.6 + 1) / (6.8 + 1)) / 2
    second = 1 - ((0 + 1) / (2 + 1) + (2 + 1) / (4 + 1)) / 2
    apart = ((JACCARD_0 + JACCARD_1) / 2 + second) / 2
    assert value([logits], target, data(), jaccard_weight=1.0, batch_sums=True) == pytest.approx(together)
    assert value([logits], target, data(), jaccard_weight=1.0, batch_sums=False) == pytest.approx(apart)


# --- heads --------------------------------------------------------------------------------------


def test_heads_count_equally_by_default() -> None:
    logits, target = softmax_case(2, 2)
    other = torch.zeros_like(logits)
    expected = (CROSS_ENTROPY + log(2)) / 2
    assert value([logits, other], target, data(), jaccard_weight=0.0) == pytest.approx(expected)


def test_head_weights_are_relative() -> None:
    """2 and 1 are two thirds and one third."""
    logits, target = softmax_case(2, 2)
    expected = CROSS_ENTROPY * 2 / 3 + log(2) / 3
    heads = [logits, torch.zeros_like(logits)]
    assert value(heads, target, data(), jaccard_weight=0.0, head_weights=[2.0, 1.0]) == pytest.approx(expected)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_smaller_head_is_compared_with_the_downsampled_target(sigmoid: bool) -> None:
    """A 2 x 2 head certain of what each quarter of a 4 x 4 target holds loses nothing."""
    quarters = torch.tensor([[1, 0], [0, 1]])
    target = quarters.repeat_interleave(2, 0).repeat_interleave(2, 1).view(1, 1, 4, 4)
    config = data(regions=1) if sigmoid else data()

    def certain(label: Tensor) -> Tensor:
        foreground = 40.0 * (2 * label - 1)
        return foreground if sigmoid else torch.cat([-foreground, foreground], dim=1)

    heads = [certain(target), certain(quarters.view(1, 1, 2, 2))]
    assert value(heads, target, config) == pytest.approx(0, abs=1e-6)
    assert value([heads[0], -heads[1]], target, config) > 1


def test_number_of_head_weights_must_be_the_number_of_heads() -> None:
    logits, target = softmax_case(2, 2)
    with pytest.raises(ConfigError, match=r"head_weights has 2 numbers, the network returned 1 head"):
        value([logits], target, data(), head_weights=[1.0, 0.5])


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("name", ["jaccard_ce", "jaccard_focal"])
def test_perfect_prediction_loses_nothing_and_the_opposite_much(name: str, sigmoid: bool) -> None:
    label = torch.tensor([0, 1, 2, 1, 0, 0, 2, 1]).view(1, 1, 2, 2, 2)
    one_hot = torch.cat([label == c for c in range(3)], dim=1).long()
    config, target = (data(3, regions=3), one_hot) if sigmoid else (data(3, classes=3), label)
    logits = 40.0 * (2 * one_hot - 1)
    assert value([logits], target, config, name=name) == pytest.approx(0, abs=1e-6)
    assert value([-logits], target, config, name=name) > 1


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("name", ["jaccard_ce", "jaccard_focal"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradient_is_finite_and_not_zero(scale: float, name: str, sigmoid: bool) -> None:
    logits = (scale * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    target = torch.randint(0, 2, (2, 3 if sigmoid else 1, 4, 4), generator=torch.Generator().manual_seed(1))
    config = data(regions=3) if sigmoid else data(classes=3)
    build_segmentation_loss(LossConfig(name=name), config)([logits], target).backward()  # type: ignore[arg-type]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("regions", [0, 2])
def test_half_precision_heads_give_the_float32_loss_even_under_autocast(regions: int) -> None:
    logits, target = sigmoid_case(2, 2) if regions else softmax_case(2, 2)
    logits, config = logits.bfloat16(), data(regions=regions)
    loss = build_segmentation_loss(LossConfig(), config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss([logits], target)
    assert got.dtype == torch.float32
    assert got.item() == loss([logits.float()], target).item()


@pytest.mark.parametrize(
    ("head_shape", "target_shape", "regions"),
    [
        ((1, 3, 4, 4), (1, 1, 4, 4), 0),  # too many classes
        ((1, 2, 4, 4), (1, 2, 4, 4), 0),  # one-hot target in softmax mode
        ((1, 2, 4, 4), (1, 1, 4, 4), 2),  # label map in sigmoid mode
        ((2, 2, 4, 4), (1, 1, 4, 4), 0),  # another batch
        ((1, 2, 2, 2), (1, 1, 4, 4), 0),  # a smaller main head
        ((1, 2, 4, 4, 4), (1, 1, 4, 4, 4), 0),  # 3D tensors in a 2D federation
        ((1, 2, 4, 4), (1, 4, 4), 0),  # no channel axis
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    head_shape: tuple[int, ...], target_shape: tuple[int, ...], regions: int
) -> None:
    with pytest.raises(ValueError, match="head 0 has shape") as caught:
        value([torch.zeros(head_shape)], torch.zeros(target_shape, dtype=torch.long), data(regions=regions))
    assert str(head_shape) in str(caught.value)
    assert str(target_shape) in str(caught.value)


def test_bare_tensor_instead_of_heads_is_refused() -> None:
    logits, target = softmax_case(2, 2)
    with pytest.raises(ValueError, match="list of at least one tensor"):
        build_segmentation_loss(LossConfig(), data())(logits, target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_weights": [1.0, 1.0, 1.0]}, "3 numbers for 2 outputs"),
        ({"class_weights": [0.0, 0.0]}, "no class that counts"),
        ({"class_weights": [1.0, 0.0], "include_background": False}, "no class that counts"),
        ({"head_weights": [0.0, 0.0]}, "all 0"),
    ],
)
def test_weights_that_leave_nothing_to_learn_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_segmentation_loss(LossConfig.model_validate(options), data())
