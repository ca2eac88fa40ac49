"""Legend: C channels or classes, R regions, *spatial = D H W or H W; images (C, *spatial)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gcml_ray.prediction.inference import Amp, predict_labels, predict_logits


class Scale(nn.Module):
    """Multiplies by 1: a network that must give the image back. Remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, windows: Tensor) -> Tensor:
        self.shapes.append(tuple(windows.shape))
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        return windows * self.factor


class TwoHeads(nn.Module):
    def forward(self, windows: Tensor) -> list[Tensor]:
        return [windows + 1.0, windows - 1.0]


class Broken(nn.Module):
    def forward(self, windows: Tensor) -> Tensor:
        raise RuntimeError(f"cannot work on {tuple(windows.shape)}")


def random_image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def predict(
    module: nn.Module,
    image: Tensor,
    *,
    patch_size: Sequence[int] = (8, 8, 8),
    overlap: float = 0.25,
    window_batch: int = 4,
    amp: Amp = "none",
) -> Tensor:
    return predict_logits(
        module,
        image,
        patch_size=patch_size,
        overlap=overlap,
        window_batch=window_batch,
        device=torch.device("cpu"),
        amp=amp,
    )


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("window_batch", [1, 4])
def test_identity_gives_back_a_volume_that_the_patch_does_not_divide(overlap: float, window_batch: int) -> None:
    image = random_image(2, 13, 9, 17)
    logits = predict(Scale(), image, overlap=overlap, window_batch=window_batch)
    assert logits.shape == image.shape
    torch.testing.assert_close(logits, image)


def test_identity_gives_back_a_picture() -> None:
    image = random_image(3, 21, 34)
    torch.testing.assert_close(predict(Scale(), image, patch_size=(16, 16)), image)


def test_volume_smaller_than_the_patch_keeps_its_shape_and_is_seen_whole() -> None:
    module, image = Scale(), random_image(1, 5, 20, 3)
    torch.testing.assert_close(predict(module, image), image)
    assert {shape[2:] for shape in module.shapes} == {(8, 8, 8)}


def test_overlapping_windows_are_blended_with_most_trust_in_their_centre() -> None:
    """Windows [0, 8) and [4, 12) of a row; each predicts its own distance from its start, 0..7.

    At voxel 7 the first window says 7 from its edge, the second 3 from near its centre. A plain mean
    would say 5; the Gaussian (sigma 1 = 8 / 8, centre 3.5) weighs them exp(-3.5^2/2) to exp(-0.5^2/2).
    """

    class Position(nn.Module):
        def forward(self, windows: Tensor) -> Tensor:
            return torch.arange(8.0).view(1, 1, 1, 8) + 0 * windows

    row = predict(Position(), torch.zeros(1, 8, 12), patch_size=(8, 8), overlap=0.5)[0, 4]
    edge, centre = torch.exp(torch.tensor([-(3.5**2) / 2, -(0.5**2) / 2]))
    expected = (7 * edge + 3 * centre) / (edge + centre)
    assert float(row[7]) == pytest.approx(float(expected), abs=0.02)


def test_windows_come_in_batches_of_the_given_size() -> None:
    """24 voxels without overlap are three windows of 8: a batch of 2 and one of 1."""
    module = Scale()
    predict(module, random_image(1, 8, 8, 24), overlap=0.0, window_batch=2)
    assert [shape[0] for shape in module.shapes] == [2, 1]


def test_network_runs_in_eval_and_inference_mode() -> None:
    module = Scale()
    predict(module, random_image(1, 8, 8, 8))
    assert set(module.modes) == {(False, True)}


def test_training_flags_come_back_one_by_one() -> None:
    """A part that was frozen in eval mode stays there."""
    module = nn.Sequential(Scale(), nn.BatchNorm3d(1), Scale()).train()
    module[1].eval()
    predict(module, random_image(1, 8, 8, 8))
    assert [part.training for part in (module, *module)] == [True, True, False, True]


def test_training_flags_come_back_after_an_error() -> None:
    module = Broken().train()
    with pytest.raises(RuntimeError, match="cannot work on"):
        predict(module, random_image(1, 8, 8, 8))
    assert module.training


def test_batch_norm_statistics_are_left_alone() -> None:
    module = nn.BatchNorm3d(1).train()
    predict(module, 5 + random_image(1, 8, 8, 8))
    assert module.state_dict()["running_mean"].tolist() == [0.0]


def test_prediction_is_repeatable_and_leaves_the_image_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv3d(4, 2, 1)).train()
    image = random_image(1, 13, 9, 17)
    before = image.clone()
    first, second = (predict(module, image) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(image, before)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_reduced_precision_has_no_effect_on_a_cpu(amp: Amp) -> None:
    torch.manual_seed(0)
    module, image = nn.Conv3d(1, 2, 3, padding=1), random_image(1, 8, 8, 8)
    assert torch.equal(predict(module, image, amp=amp), predict(module, image))


def test_only_the_main_head_is_used() -> None:
    image = random_image(1, 8, 8, 8)
    torch.testing.assert_close(predict(TwoHeads(), image), image + 1.0)


def test_integer_image_gives_float_logits() -> None:
    image = torch.randint(0, 255, (1, 9, 8, 8), dtype=torch.uint8)
    logits = predict(Scale(), image)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, image.float())


# --- hard predictions ------------------------------------------------------------------------


def test_softmax_label_is_the_highest_logit_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, -1.0, 2.0], [1.0, -3.0, 2.0], [0.5, -2.0, 1.0]]).view(3, 1, 3)
    labels = predict_labels(logits, sigmoid=False)
    assert labels.tolist() == [[[1, 0, 0]]]
    assert labels.dtype == torch.int64


def test_sigmoid_region_begins_above_probability_one_half() -> None:
    """sigmoid(0) = 0.5 is not above it."""
    logits = torch.tensor([[-1.0, 0.0, 0.01], [3.0, -3.0, 3.0]]).view(2, 1, 3)
    assert predict_labels(logits, sigmoid=True).tolist() == [[[0, 0, 1]], [[1, 0, 1]]]
