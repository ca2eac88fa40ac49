from typing import Any

import numpy as np
import pytest
import torch

from gcml_ray.config import AugmentConfig, DataConfig
from gcml_ray.data.loading import Sample
from gcml_ray.data.patches import PatchSampler

STILL = AugmentConfig(flip_probability=0.0, intensity_probability=0.0, noise_probability=0.0)


def config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "datalist": "x.json",
        "channels": ("mr", "index"),
        "labels": {"background": 0, "a": 1},
        "spacing_is_real": False,
        "patch_size": (4, 3, 2),
        "augment": STILL,
    }
    return DataConfig(**(values | changes))


def make_sample(*shape: int, foreground: tuple[int, ...] = (40, 41)) -> Sample:
    """Channel 1 counts the voxels, so a patch shows where it was cut; the label is 1 at ``foreground``."""
    size = int(np.prod(shape))
    label = torch.zeros(size, dtype=torch.uint8)
    label[list(foreground)] = 1
    index = torch.arange(size, dtype=torch.float32)
    return Sample(
        case="p",
        image=torch.stack([label.to(torch.float32), index]).reshape(2, *shape),
        label=label.reshape(1, *shape),
        spacing=(1.0,) * len(shape),
        foreground=label.nonzero().flatten().to(torch.int32),
        background=(label == 0).nonzero().flatten().to(torch.int32),
    )


def test_patch_is_a_piece_of_the_volume_with_its_label() -> None:
    sample = make_sample(6, 5, 4)
    image, label = PatchSampler(config()).sample(sample, 3)
    assert image.shape == (2, 4, 3, 2)
    assert label.shape == (1, 4, 3, 2)
    torch.testing.assert_close(image[0], label[0].to(torch.float32))
    start = np.unravel_index(int(image[1, 0, 0, 0]), (6, 5, 4))
    where = tuple(slice(s, s + p) for s, p in zip(start, (4, 3, 2), strict=True))
    torch.testing.assert_close(image[1], sample.image[(1, *where)])


def test_seed_alone_decides() -> None:
    """A fresh sampler, or one that was used before, gives the same patch for the same seed."""
    data = config(augment=AugmentConfig(flip_axes=(0, 1, 2), noise_probability=1.0))
    sample, used = make_sample(6, 5, 4), PatchSampler(data)
    first = [used.sample(sample, seed) for seed in range(8)]
    for seed in (5, 0, 7):
        for got, expected in zip(PatchSampler(data).sample(sample, seed), first[seed], strict=True):
            assert torch.equal(got, expected)
    assert len({float(image.sum()) for image, _ in first}) == 8


def test_flips_move_image_and_label_together() -> None:
    data = config(augment=AugmentConfig(flip_axes=(0, 2), flip_probability=1.0, intensity_probability=0.0))
    sample = make_sample(6, 5, 4)
    for seed in range(5):
        image, label = PatchSampler(data).sample(sample, seed)
        still_image, still_label = PatchSampler(config()).sample(sample, seed)
        assert torch.equal(image, still_image.flip(1, 3))
        assert torch.equal(label, still_label.flip(1, 3))


@pytest.mark.parametrize(("share", "expected"), [(1.0, True), (0.0, False)])
def test_foreground_share_decides_the_centre(share: float, expected: bool) -> None:
    """With a patch of one voxel the centre is the patch."""
    data = config(patch_size=(1, 1, 1), foreground_share=share)
    labels = [bool(PatchSampler(data).sample(make_sample(6, 5, 4), seed)[1].item()) for seed in range(30)]
    assert labels == [expected] * 30


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("foreground", [(), tuple(range(120))])
def test_sample_with_one_kind_of_voxel_gives_patches(foreground: tuple[int, ...]) -> None:
    image, label = PatchSampler(config(foreground_share=0.5)).sample(make_sample(6, 5, 4, foreground=foreground), 1)
    assert image.shape == (2, 4, 3, 2)
    assert bool(label.any()) == bool(foreground)


def test_smaller_volume_is_padded_with_zeros() -> None:
    """A 2x5x1 volume in a 4x3x2 patch: 2 x 3 x 1 voxels of it, the other 18 are zero in image and label."""
    sample = make_sample(2, 5, 1, foreground=tuple(range(10)))
    image, label = PatchSampler(config()).sample(sample, 0)
    assert image.shape == (2, 4, 3, 2)
    assert image[0].sum() == label.sum() == 6
    torch.testing.assert_close(image[0], label[0].to(torch.float32))


def test_intensity_changes_stay_within_scale_and_shift() -> None:
    """Voxels of 1 become 1 * (1 + s) + t with |s| <= 0.1 and |t| <= 0.2; labels stay."""
    augment = AugmentConfig(flip_probability=0.0, intensity_probability=1.0, intensity_scale=0.1, intensity_shift=0.2)
    sample = make_sample(6, 5, 4, foreground=tuple(range(120)))
    values = []
    for seed in range(30):
        image, label = PatchSampler(config(augment=augment)).sample(sample, seed)
        assert label.min() == 1
        values.append(float(image[0, 0, 0, 0]))
    assert 0.7 <= min(values) < 0.95
    assert 1.05 < max(values) <= 1.3


def test_sample_itself_is_never_changed() -> None:
    data = config(augment=AugmentConfig(flip_probability=1.0, intensity_probability=1.0, noise_probability=1.0))
    sample, untouched = make_sample(4, 3, 2, foreground=(3,)), make_sample(4, 3, 2, foreground=(3,))
    image, label = PatchSampler(data).sample(sample, 1)
    image.zero_()
    label.zero_()
    assert torch.equal(sample.image, untouched.image)
    assert torch.equal(sample.label, untouched.label)


def test_patches_are_plain_tensors_in_2d_too() -> None:
    image, label = PatchSampler(config(spatial_dims=2, patch_size=(8, 8))).sample(make_sample(10, 12), 0)
    assert type(image) is type(label) is torch.Tensor
    assert image.shape == (2, 8, 8)
