"""How good a prediction is: Dice, HD95 and surface Dice of every foreground class or region.

Legend: K foreground classes (softmax, the background left out) or regions (sigmoid), *spatial = D H W or H W.
Predictions and references are hard: class indices (1, *spatial) under softmax, {0, 1} channels
(K, *spatial) under sigmoid. Scores are about one case; nothing is averaged over voxels of several cases.

| prediction, reference | Dice | surface Dice | HD95 |
|---|---|---|---|
| both empty | 1 | 1 | NaN |
| one of them empty | 0 | 0 | NaN |

The Dice values are those of the BraTS evaluation (and of MONAI's ``compute_dice`` with ``ignore_empty=False``);
surface Dice follows Dice, where MONAI gives NaN for two empty masks. HD95 has no value where a surface is
missing: BraTS puts 0 and the image's diagonal there, numbers that would decide the mean, so here the
distance stays undefined, is left out of the mean, and is counted in ``num_undefined_hd95``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.utils import get_edge_surface_distance
from torch import Tensor

from gcml_ray.records import CaseScore, Split

MOST_FOR_TORCH = 16_000_000
SPACING_NOISE = 1e-3  # of a voxel's size: headers differ by rounding, and for less than this nothing is resampled

# MONAI warns about an argument that it passes to itself; nothing here can change that.
warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*", category=FutureWarning)


@dataclass(frozen=True)
class ScoreSummary:
    """One site, split, model and class over its cases.

    ``sd`` is the sample standard deviation (n - 1), NaN for a single value. HD95 is over the cases where
    it is defined, NaN where there is none.
    """

    site: str
    split: Split
    model: str
    class_name: str
    num_cases: int
    dice_mean: float
    dice_sd: float
    surface_dice_mean: float
    surface_dice_sd: float
    hd95_mean: float
    hd95_sd: float
    num_undefined_hd95: int


# --- one case --------------------------------------------------------------------------------


def dice_per_class(prediction: Tensor, label: Tensor, *, num_foreground: int, sigmoid: bool) -> Tensor:
    """Dice = 2 |P & L| / (|P| + |L|) of each foreground class, without distances: the score of validation.

    Args:
        prediction: hard prediction, (1, *spatial) class indices or (K, *spatial) of 0 and 1.
        label: the reference, in the same form and on the same device.
        num_foreground: K.
        sigmoid: regions rather than classes.

    Returns:
        (K,), float32, on the device of ``prediction``. Two empty masks give 1, one empty mask gives 0.
    """
    predicted = _foreground(prediction, num_foreground=num_foreground, sigmoid=sigmoid).flatten(1)
    reference = _foreground(label, num_foreground=num_foreground, sigmoid=sigmoid).flatten(1)
    overlap = (predicted & reference).sum(dim=1)
    size = predicted.sum(dim=1) + reference.sum(dim=1)
    return torch.where(size > 0, 2.0 * overlap / size.clamp(min=1), 1.0)


def score_case(
    prediction: Tensor,
    label: Tensor,
    *,
    spacing: Sequence[float],
    tolerance: float,
    class_names: Sequence[str],
    sigmoid: bool,
    site: str,
    case: str,
    split: Split,
    model: str,
) -> tuple[CaseScore, ...]:
    """All scores of one case, one record a foreground class, by MONAI's surface distances.

    HD95 is the larger of the two directed 95th percentiles of surface distances (Huttenlocher et al. 1993;
    percentile as in BraTS). Surface Dice (Nikolov et al. 2018, arXiv 1809.04430) is the share of both
    surfaces that lies within ``tolerance`` of the other; a surface is counted in voxels, not in mm^2, as in
    Seidlitz et al. 2022 (arXiv 2111.05408). A surface voxel belongs to the mask and touches, by a face,
    one outside it or the image's border.

    Args:
        prediction: hard prediction, (1, *spatial) class indices or (K, *spatial) of 0 and 1.
        label: the reference, in the same form.
        spacing: size of a voxel on each spatial axis, in mm; ones where spacing is not real.
        tolerance: of surface Dice, in the unit of ``spacing``. A thousandth more is within it, so that a voxel of
            1.0000001 mm counts as one of 1 mm.
        class_names: K names, foreground only, in the order of the classes or channels.
        sigmoid: regions rather than classes.
        site: for the record.
        case: for the record.
        split: for the record.
        model: for the record, e.g. ``personalised``.
    """
    num_foreground = len(class_names)
    dice = dice_per_class(prediction, label, num_foreground=num_foreground, sigmoid=sigmoid).tolist()
    # On the CPU, so that a distance does not depend on whether cuCIM happens to be installed.
    predicted = _foreground(prediction.cpu(), num_foreground=num_foreground, sigmoid=sigmoid)
    reference = _foreground(label.cpu(), num_foreground=num_foreground, sigmoid=sigmoid)
    scores = []
    for index, class_name in enumerate(class_names):
        hd95, surface_dice = _surface_scores(predicted[index], reference[index], spacing=spacing, tolerance=tolerance)
        scores.append(CaseScore(site, case, split, model, class_name, dice[index], hd95, surface_dice))
    return tuple(scores)


def _surface_scores(
    predicted: Tensor, reference: Tensor, *, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """HD95 and surface Dice of two masks (*spatial): MONAI's, from the distances that both of them are made of.

    MONAI's own two functions would work them out twice, and its HD95 fails where a surface has more than
    ``MOST_FOR_TORCH`` voxels, as a model that has learnt little gives in a large volume.
    """
    if not predicted.any() or not reference.any():
        return math.nan, float(not predicted.any() and not reference.any())
    _, distances, _ = get_edge_surface_distance(predicted, reference, spacing=list(spacing), symmetric=True)
    limit = tolerance * (1 + SPACING_NOISE)
    num_close = sum(torch.sum(directed <= limit) for directed in distances)
    surface_dice = num_close / sum(len(directed) for directed in distances)
    return max(_percentile_95(directed) for directed in distances), float(surface_dice)


def _percentile_95(distances: Tensor) -> float:
    """By linear interpolation, as ``torch.quantile``, which takes no more than ``MOST_FOR_TORCH`` numbers."""
    if len(distances) <= MOST_FOR_TORCH:
        return float(torch.quantile(distances, 0.95))
    return float(np.quantile(distances.numpy(), 0.95))


def _foreground(volume: Tensor, *, num_foreground: int, sigmoid: bool) -> Tensor:
    """Masks (K, *spatial), bool, from class indices (1, *spatial) or from {0, 1} channels (K, *spatial)."""
    num_channels = num_foreground if sigmoid else 1
    if len(volume) != num_channels:
        raise ValueError(f"expected {num_channels} channel(s) first, received shape {tuple(volume.shape)}")
    if sigmoid:
        return volume > 0
    classes = torch.arange(1, num_foreground + 1, device=volume.device)
    return volume == classes.view(-1, *[1] * (volume.ndim - 1))


# --- many cases ------------------------------------------------------------------------------


def summarise(scores: Iterable[CaseScore]) -> tuple[ScoreSummary, ...]:
    """Mean and standard deviation by site, split, model and class, in the order of first appearance."""
    groups: dict[tuple[str, Split, str, str], list[CaseScore]] = {}
    for score in scores:
        groups.setdefault((score.site, score.split, score.model, score.class_name), []).append(score)
    return tuple(_summary(group) for group in groups.values())


def _summary(group: Sequence[CaseScore]) -> ScoreSummary:
    defined = [score.hd95 for score in group if not math.isnan(score.hd95)]
    dice_mean, dice_sd = _mean_sd([score.dice for score in group])
    surface_dice_mean, surface_dice_sd = _mean_sd([score.surface_dice for score in group])
    hd95_mean, hd95_sd = _mean_sd(defined)
    first = group[0]
    return ScoreSummary(
        site=first.site,
        split=first.split,
        model=first.model,
        class_name=first.class_name,
        num_cases=len(group),
        dice_mean=dice_mean,
        dice_sd=dice_sd,
        surface_dice_mean=surface_dice_mean,
        surface_dice_sd=surface_dice_sd,
        hd95_mean=hd95_mean,
        hd95_sd=hd95_sd,
        num_undefined_hd95=len(group) - len(defined),
    )


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    mean = float(np.mean(values)) if values else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
