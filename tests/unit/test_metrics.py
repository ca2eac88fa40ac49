"""Legend: masks are boxes of ones in a volume of zeros; (1, *spatial) class indices unless sigmoid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_dice import compute_surface_dice
from torch import Tensor

from gcml_ray.prediction import metrics
from gcml_ray.prediction.metrics import dice_per_class, score_case, summarise
from gcml_ray.records import CaseScore


def box(shape: Sequence[int], *ranges: tuple[int, int], value: int = 1) -> Tensor:
    """A volume (1, *shape) with ``value`` in one box: ranges of voxels, one an axis."""
    volume = torch.zeros(1, *shape, dtype=torch.int64)
    volume[(0, *(slice(*limits) for limits in ranges))] = value
    return volume


def score(
    prediction: Tensor,
    label: Tensor,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    tolerance: float = 1.0,
    class_names: Sequence[str] = ("tumour",),
    sigmoid: bool = False,
) -> tuple[CaseScore, ...]:
    return score_case(
        prediction,
        label,
        spacing=spacing,
        tolerance=tolerance,
        class_names=class_names,
        sigmoid=sigmoid,
        site="CS",
        case="c1",
        split="test",
        model="personalised",
    )


def numbers(scores: Sequence[CaseScore]) -> list[tuple[float, float, float]]:
    return [(item.dice, item.hd95, item.surface_dice) for item in scores]


SHAPE = (12, 12, 12)
CUBE = box(SHAPE, (2, 6), (2, 6), (2, 6))  # 4^3 voxels, of which 4^3 - 2^3 = 56 are surface
SHIFTED = box(SHAPE, (4, 8), (2, 6), (2, 6))  # two voxels further along the first axis
EMPTY = torch.zeros(1, *SHAPE, dtype=torch.int64)


# --- one case --------------------------------------------------------------------------------


def test_equal_masks_score_perfectly() -> None:
    assert numbers(score(CUBE, CUBE)) == [(1.0, 0.0, 1.0)]


def test_shifted_cube_has_the_dice_of_its_overlap() -> None:
    """Overlap 2 x 4 x 4 = 32 of 64 and 64 voxels: 2 x 32 / 128."""
    assert score(SHIFTED, CUBE)[0].dice == 0.5


def test_shifted_cube_is_two_voxels_away() -> None:
    """The face that leads, 16 of 56 surface voxels, lies 2 voxels beyond the other cube; the rest is nearer."""
    assert score(SHIFTED, CUBE)[0].hd95 == pytest.approx(2.0)


def test_hd95_scales_with_the_spacing_of_the_shifted_axis() -> None:
    assert score(SHIFTED, CUBE, spacing=(3.0, 1.0, 1.0))[0].hd95 == pytest.approx(6.0)
    assert score(SHIFTED, CUBE, spacing=(0.5, 9.0, 9.0))[0].hd95 == pytest.approx(1.0)


def test_surface_dice_counts_surface_voxels_within_the_tolerance() -> None:
    """By layers along the shifted axis, of the leading cube's surface voxels to the other cube's surface.

    Layers 4 and 5 of the leading cube (16 + 12 voxels) against layers 2..5 of the other (16, 12, 12, 16):
    layer 4 keeps its 12 rim voxels at distance 0, its inner 4 are 1 from the rim and from layer 5; layer 5
    is at 0; layer 6 has 12 voxels at 1; layer 7 has 16 at 2. So within 1: 16 + 12 + 12 of 56, within 2: all.
    """
    assert score(SHIFTED, CUBE, tolerance=1.0)[0].surface_dice == pytest.approx(40 / 56)
    assert score(SHIFTED, CUBE, tolerance=2.0)[0].surface_dice == 1.0
    assert score(SHIFTED, CUBE, tolerance=0.5)[0].surface_dice == pytest.approx((12 + 12) / 56)


@pytest.mark.parametrize("side", [1.0000001, 0.9999999, 1.0005])
def test_rounding_of_a_voxel_size_does_not_decide_what_is_within_the_tolerance(side: float) -> None:
    found = score(SHIFTED, CUBE, tolerance=1.0, spacing=(side, side, side))[0].surface_dice
    assert found == pytest.approx(40 / 56)


def test_distance_beyond_the_noise_of_spacings_is_outside_the_tolerance() -> None:
    found = score(SHIFTED, CUBE, tolerance=1.0, spacing=(1.01, 1.01, 1.01))[0].surface_dice
    assert found == pytest.approx((12 + 12) / 56)


def test_tolerance_is_in_the_unit_of_the_spacing() -> None:
    assert score(SHIFTED, CUBE, tolerance=2.0, spacing=(2.0, 2.0, 2.0))[0].surface_dice == pytest.approx(40 / 56)


def test_hd95_leaves_out_a_small_outlier() -> None:
    """One voxel far away among 100 surface voxels of a flat square: 100 distances are 0, the last is no 5 %."""
    square = box((30, 30, 30), (0, 1), (0, 10), (0, 10))
    with_outlier = square.clone()
    with_outlier[0, 25, 5, 5] = 1
    assert score(with_outlier, square)[0].hd95 == 0.0


def test_hd95_takes_the_worse_direction() -> None:
    """Prediction: one of two voxels that lie 8 apart. From it 0; back to it 0 and 8, 95th percentile 7.6."""
    both = box(SHAPE, (1, 2), (1, 2), (1, 2)) + box(SHAPE, (9, 10), (1, 2), (1, 2))
    one = box(SHAPE, (1, 2), (1, 2), (1, 2))
    assert score(one, both)[0].hd95 == pytest.approx(0.95 * 8)
    assert score(both, one)[0].hd95 == pytest.approx(0.95 * 8)


def test_two_dimensions_work_alike() -> None:
    """A 4 x 4 square moved by one pixel: Dice 2 x 12 / 32; the leading edge is 1 pixel = 2.5 units away."""
    square, moved = box((9, 9), (2, 6), (2, 6)), box((9, 9), (2, 6), (3, 7))
    assert numbers(score(moved, square, spacing=(1.0, 2.5), tolerance=1.0))[0][:2] == (0.75, pytest.approx(2.5))


def test_two_empty_masks_are_perfect_with_an_undefined_distance() -> None:
    assert numbers(score(EMPTY, EMPTY)) == [(1.0, pytest.approx(math.nan, nan_ok=True), 1.0)]


@pytest.mark.parametrize(("prediction", "label"), [(CUBE, EMPTY), (EMPTY, CUBE)])
def test_one_empty_mask_scores_zero_with_an_undefined_distance(prediction: Tensor, label: Tensor) -> None:
    assert numbers(score(prediction, label)) == [(0.0, pytest.approx(math.nan, nan_ok=True), 0.0)]


def test_every_foreground_class_is_scored_on_its_own() -> None:
    """Class 1 is hit exactly, class 2 is shifted, class 3 is missing in both."""
    label = CUBE + box(SHAPE, (2, 6), (7, 11), (2, 6), value=2)
    prediction = CUBE + box(SHAPE, (4, 8), (7, 11), (2, 6), value=2)
    scores = score(prediction, label, class_names=("a", "b", "c"))
    assert [item.class_name for item in scores] == ["a", "b", "c"]
    assert [item.dice for item in scores] == [1.0, 0.5, 1.0]
    assert [item.hd95 for item in scores[:2]] == [0.0, pytest.approx(2.0)]


def test_sigmoid_channels_may_overlap() -> None:
    """The second channel lies inside the first one; each is compared with its own reference."""
    label = torch.cat([CUBE, box(SHAPE, (3, 5), (3, 5), (3, 5))]).float()
    prediction = torch.cat([SHIFTED, box(SHAPE, (3, 5), (3, 5), (3, 5))])
    scores = score(prediction, label, class_names=("whole", "core"), sigmoid=True)
    assert [item.dice for item in scores] == [0.5, 1.0]


def test_scores_name_site_case_split_and_model() -> None:
    (item,) = score(CUBE, CUBE)
    assert (item.site, item.case, item.split, item.model) == ("CS", "c1", "test", "personalised")


def test_empty_space_around_the_masks_changes_no_distance() -> None:
    """MONAI looks at the masks' bounding box only; a large empty volume must give the same numbers."""
    generator = torch.Generator().manual_seed(3)
    prediction = (torch.rand(1, 9, 8, 7, generator=generator) < 0.4).long()
    label = (torch.rand(1, 9, 8, 7, generator=generator) < 0.4).long()
    pad = (5, 11, 8, 3, 6, 9)
    padded = [torch.nn.functional.pad(volume, pad) for volume in (prediction, label)]
    spacing = (0.7, 1.3, 2.1)
    assert numbers(score(*padded, spacing=spacing)) == numbers(score(prediction, label, spacing=spacing))


def test_distances_agree_with_a_search_over_all_pairs() -> None:
    """Surface = voxels with a face neighbour outside; distances by brute force over all pairs of them."""
    rng = np.random.default_rng(4)
    masks = [rng.random((7, 6, 5)) < 0.6 for _ in range(2)]
    spacing = np.array([0.7, 1.3, 2.1])
    points = []
    for mask in masks:
        padded = np.pad(mask, 1)
        inside = np.all([np.roll(padded, s, a) for a in range(3) for s in (1, -1)], axis=0)[1:-1, 1:-1, 1:-1]
        points.append(np.argwhere(mask & ~inside) * spacing)
    pairs = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    to_label, to_prediction = pairs.min(axis=1), pairs.min(axis=0)
    expected_hd95 = max(np.percentile(to_label, 95), np.percentile(to_prediction, 95))
    expected_surface = np.mean(np.concatenate([to_label, to_prediction]) <= 1.0)
    prediction, label = (torch.from_numpy(mask[None]).long() for mask in masks)
    (item,) = score(prediction, label, spacing=spacing.tolist(), tolerance=1.0)
    assert (item.hd95, item.surface_dice) == (pytest.approx(expected_hd95), pytest.approx(expected_surface))


def test_wrong_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 2 channel\(s\) first, received shape \(1, 12, 12, 12\)"):
        score(CUBE, CUBE, class_names=("a", "b"), sigmoid=True)
    with pytest.raises(ValueError, match=r"expected 1 channel\(s\) first"):
        score(torch.cat([CUBE, CUBE]), CUBE)


# --- Dice alone ------------------------------------------------------------------------------


def test_dice_alone_equals_monai_on_random_volumes() -> None:
    """Class 4 of 5 occurs in neither volume, class 3 only in the prediction."""
    generator = torch.Generator().manual_seed(5)
    prediction = torch.randint(0, 4, (1, 6, 5, 4), generator=generator)
    label = torch.randint(0, 3, (1, 6, 5, 4), generator=generator).to(torch.uint8)
    predicted, reference = (
        torch.nn.functional.one_hot(v[0].long(), 5).movedim(-1, 0)[None] for v in (prediction, label)
    )
    expected = compute_dice(predicted, reference, include_background=False, ignore_empty=False)[0]
    found = dice_per_class(prediction, label, num_foreground=4, sigmoid=False)
    assert found.tolist() == pytest.approx(expected.tolist())
    assert found[2:].tolist() == [0.0, 1.0]


def test_dice_alone_reads_sigmoid_channels() -> None:
    prediction, label = torch.cat([SHIFTED, EMPTY]), torch.cat([CUBE, CUBE]).float()
    assert dice_per_class(prediction, label, num_foreground=2, sigmoid=True).tolist() == [0.5, 0.0]


# --- many cases ------------------------------------------------------------------------------


def record(case: str, class_name: str, dice: float, hd95: float = 1.0, *, site: str = "CS") -> CaseScore:
    return CaseScore(site, case, "test", "personalised", class_name, dice, hd95, dice / 2)


def test_summary_has_mean_and_sample_deviation() -> None:
    """Dice 0.2, 0.4, 0.9: mean 0.5, variance (0.09 + 0.01 + 0.16) / 2 = 0.13; HD95 1, 2, 6: mean 3, variance 7."""
    cases = [record("1", "a", 0.2, 1.0), record("2", "a", 0.4, 2.0), record("3", "a", 0.9, 6.0)]
    (summary,) = summarise(cases)
    assert (summary.num_cases, summary.num_undefined_hd95) == (3, 0)
    assert (summary.dice_mean, summary.dice_sd) == (pytest.approx(0.5), pytest.approx(math.sqrt(0.13)))
    assert (summary.hd95_mean, summary.hd95_sd) == (pytest.approx(3.0), pytest.approx(math.sqrt(7.0)))
    assert (summary.surface_dice_mean, summary.surface_dice_sd) == (
        pytest.approx(0.25),
        pytest.approx(math.sqrt(0.13) / 2),
    )


def test_undefined_distances_are_counted_and_left_out_of_the_mean() -> None:
    cases = [record("1", "a", 0.5, 4.0), record("2", "a", 0.0, math.nan), record("3", "a", 0.5, 2.0)]
    (summary,) = summarise(cases)
    assert (summary.hd95_mean, summary.num_undefined_hd95) == (pytest.approx(3.0), 1)
    assert summary.dice_mean == pytest.approx(1 / 3)


def test_single_case_has_no_deviation_and_no_distance_has_no_mean() -> None:
    (summary,) = summarise([record("1", "a", 0.5, math.nan)])
    assert summary.dice_mean == 0.5
    assert all(math.isnan(value) for value in (summary.dice_sd, summary.hd95_mean, summary.hd95_sd))


def test_summary_keeps_sites_and_classes_apart_in_order() -> None:
    cases = [record("1", "b", 0.5), record("1", "a", 0.5), record("2", "b", 0.1), record("9", "b", 1.0, site="DU")]
    summaries = summarise(cases)
    assert [(item.site, item.class_name, item.num_cases) for item in summaries] == [
        ("CS", "b", 2),
        ("CS", "a", 1),
        ("DU", "b", 1),
    ]
    assert (summaries[0].split, summaries[0].model) == ("test", "personalised")


# --- beside MONAI --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(17, 23), (9, 14, 11)], ids=["2D", "3D"])
@pytest.mark.parametrize("seed", range(5))
def test_surface_scores_are_those_of_monai(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], seed: int) -> None:
    """Blobs and single voxels; the second time surfaces are "too large" for torch's quantile."""
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.4, 3.0, size=len(shape)).tolist()
    masks = [torch.as_tensor(rng.random(shape) < share) for share in (0.02, 0.4)]
    batch = [mask[None, None] for mask in masks]
    hd95 = compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=spacing).item()
    limit = 1.2 * (1 + metrics.SPACING_NOISE)
    dice = compute_surface_dice(*batch, class_thresholds=[limit], include_background=True, spacing=spacing).item()
    assert metrics._surface_scores(*masks, spacing=spacing, tolerance=1.2) == (hd95, dice)
    monkeypatch.setattr(metrics, "MOST_FOR_TORCH", 3)
    assert metrics._surface_scores(*masks, spacing=spacing, tolerance=1.2) == pytest.approx((hd95, dice), rel=1e-6)
