"""The supervised loss: Jaccard + cross-entropy or focal, over all heads, built on MONAI's losses.

The mixture and the head weights follow the public training code of SA-Net (Yuan, arXiv 2011.03188 and its
successors); soft Jaccard and focal loss are MONAI's (Milletari 2016; Lin 2017, arXiv 1708.02002).

Legend:
    B batch, C classes with background (softmax), R regions (sigmoid), *spatial = (H, W) or (D, H, W).
    A head is a tensor of logits (B, C or R, *spatial); the main head comes first, others may be smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from torch import Tensor

from gcml_ray.config import DataConfig, LossConfig
from gcml_ray.errors import ConfigError

SegmentationLoss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(heads, target) -> 0-dim loss; see :func:`build_segmentation_loss`."""

_HeadLoss = Callable[[Tensor, Tensor], Tensor]

_DEFAULT_FOCAL_GAMMA = 2.0  # Lin 2017, and the BraTS recipe


def build_segmentation_loss(loss: LossConfig, data: DataConfig) -> SegmentationLoss:
    """The loss (heads, target) -> 0-dim tensor of one configuration.

    One head's loss is w x Jaccard + (1 - w) x voxel loss, with w = ``jaccard_weight``:

    - Jaccard of a class is 1 - (I + smooth) / (U + smooth), with I and U in voxels, summed over the batch too
      if ``batch_sums``; the mean over classes. ``include_background: false`` leaves class 0 out of this term only
      (the voxel loss always sees every class, else nothing would teach the background).
    - The voxel loss is cross-entropy or focal loss (``focal_gamma``, default 2): the mean over voxels, in
      sigmoid mode the binary form and the mean over voxels and regions. Focal with gamma 0 is cross-entropy.
    - ``class_weights`` are relative: scaled to mean 1 over the outputs (for the Jaccard term over the classes
      it counts), in both terms. Equal weights are the same as none.

    Under deep supervision the losses of the heads are averaged with ``head_weights`` (relative; given for
    every head), or equally. A head smaller than the target gets the target downsampled by nearest neighbour.

    The loss is computed in float32 outside autocast. The target is (B, 1, *spatial) integer labels (softmax) or
    (B, R, *spatial) of {0, 1} (sigmoid); the loss raises ValueError where shapes do not belong together and
    ConfigError where ``head_weights`` does not match the number of heads.

    Args:
        loss: which terms, and their weights.
        data: says softmax or sigmoid, and the number of outputs.

    Raises:
        ConfigError: where ``class_weights`` or ``head_weights`` do not fit or are all 0.
    """
    head_loss = _build_head_loss(loss, data)
    if loss.head_weights is not None and sum(loss.head_weights) == 0:
        raise ConfigError(f"loss.head_weights {list(loss.head_weights)} are all 0: at least one must be above 0")

    def segmentation_loss(heads: Sequence[Tensor], target: Tensor) -> Tensor:
        _check_shapes(heads, target, data)
        weights = _head_weights(loss.head_weights, len(heads))
        with torch.autocast(device_type=target.device.type, enabled=False):
            parts = [
                weight * head_loss(head.float(), _resize(target, head))
                for weight, head in zip(weights, heads, strict=True)
                if weight > 0
            ]
            return torch.stack(parts).sum()

    return segmentation_loss


def _build_head_loss(loss: LossConfig, data: DataConfig) -> _HeadLoss:
    """Jaccard and voxel term of one head."""
    jaccard, voxel = _build_jaccard(loss, data), _build_voxel_loss(loss, data)
    share = loss.jaccard_weight
    if share == 0:
        return voxel
    if share == 1:
        return jaccard
    return lambda logits, target: share * jaccard(logits, target) + (1 - share) * voxel(logits, target)


def _build_jaccard(loss: LossConfig, data: DataConfig) -> _HeadLoss:
    without_background = not data.is_sigmoid and not loss.include_background
    # MONAI forms (2 I + smooth_nr) / (2 U + smooth_dr): twice our smooth makes it (I + smooth) / (U + smooth).
    terms = DiceLoss(
        include_background=not without_background,
        to_onehot_y=not data.is_sigmoid,
        sigmoid=data.is_sigmoid,
        softmax=not data.is_sigmoid,
        jaccard=True,
        reduction="none",
        smooth_nr=2 * loss.smooth,
        smooth_dr=2 * loss.smooth,
        batch=loss.batch_sums,
    )
    weights = _relative_weights(loss.class_weights, data, skip=1 if without_background else 0)

    def jaccard(logits: Tensor, target: Tensor) -> Tensor:
        each: Tensor = terms(logits, target.to(logits.dtype) if data.is_sigmoid else target)
        # (C, 1, ...) with batch sums, (B, C, 1, ...) without
        return _weighted(each.reshape(-1, data.num_outputs - without_background), weights).mean()

    return jaccard


def _build_voxel_loss(loss: LossConfig, data: DataConfig) -> _HeadLoss:
    weights = _relative_weights(loss.class_weights, data, skip=0)
    gamma = _DEFAULT_FOCAL_GAMMA if loss.focal_gamma is None else loss.focal_gamma
    focal = FocalLoss(gamma=gamma, use_softmax=not data.is_sigmoid, to_onehot_y=not data.is_sigmoid, reduction="none")

    def focal_softmax(logits: Tensor, target: Tensor) -> Tensor:
        # Each voxel's loss stands in its true class's channel, the others are 0: sum over channels, not mean.
        each: Tensor = focal(logits, target)
        return _weighted(each, weights).sum(1).mean()

    def focal_sigmoid(logits: Tensor, target: Tensor) -> Tensor:
        each: Tensor = focal(logits, target.to(logits.dtype))
        return _weighted(each, weights).mean()

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        weight = None if weights is None else weights.to(logits.device, non_blocking=True)
        # Not torch's weighted mean: that one is 0 / 0 on a patch whose only class has weight 0.
        return F.cross_entropy(logits, target.squeeze(1).long(), weight=weight, reduction="none").mean()

    def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return _weighted(each, weights).mean()

    if loss.name == "jaccard_focal":
        return focal_sigmoid if data.is_sigmoid else focal_softmax
    return binary_cross_entropy if data.is_sigmoid else cross_entropy


def _relative_weights(class_weights: Sequence[float] | None, data: DataConfig, *, skip: int) -> Tensor | None:
    """Weights of the outputs after the first ``skip``, scaled to mean 1; None where all count the same."""
    if class_weights is None:
        return None
    if len(class_weights) != data.num_outputs:
        raise ConfigError(f"loss.class_weights has {len(class_weights)} numbers for {data.num_outputs} outputs")
    used = torch.tensor(class_weights[skip:], dtype=torch.float32)
    if used.sum() == 0:
        raise ConfigError(f"loss.class_weights {list(class_weights)}: no class that counts has a weight above 0")
    return used / used.mean()


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values (B or 1, C) or (B, C, *spatial) times their class weights."""
    if weights is None:
        return values
    return values * weights.to(values.device, non_blocking=True).view(1, -1, *[1] * (values.ndim - 2))


def _head_weights(head_weights: Sequence[float] | None, num_heads: int) -> list[float]:
    """Weights of the heads, which sum to 1."""
    if head_weights is None:
        return [1 / num_heads] * num_heads
    if len(head_weights) != num_heads:
        raise ConfigError(
            f"loss.head_weights has {len(head_weights)} numbers, the network returned {num_heads} head(s) in training: "
            "give one number a head, main head first, or leave it out"
        )
    return [weight / sum(head_weights) for weight in head_weights]


def _resize(target: Tensor, head: Tensor) -> Tensor:
    """The target at the head's size."""
    if target.shape[2:] == head.shape[2:]:
        return target
    return F.interpolate(target.float(), size=head.shape[2:], mode="nearest-exact").to(target.dtype)


def _check_shapes(heads: Sequence[Tensor], target: Tensor, data: DataConfig) -> None:
    """Raise ValueError with the shapes at odds."""
    if isinstance(heads, Tensor) or not heads:
        raise ValueError("heads must be a list of at least one tensor of logits, main head first")
    channels = data.num_outputs if data.is_sigmoid else 1
    for index, head in enumerate(heads):
        belongs = (
            head.ndim == target.ndim == data.spatial_dims + 2
            and head.shape[:2] == (target.shape[0], data.num_outputs)
            and target.shape[1] == channels
            and all(size <= whole for size, whole in zip(head.shape[2:], target.shape[2:], strict=True))
        )
        if not belongs or (index == 0 and head.shape[2:] != target.shape[2:]):
            raise ValueError(
                f"head {index} has shape {tuple(head.shape)}, target {tuple(target.shape)}: expected logits "
                f"(B, {data.num_outputs}, *spatial) and a target (B, {channels}, *spatial) with "
                f"{data.spatial_dims} spatial axes; only heads after the first may be smaller"
            )
