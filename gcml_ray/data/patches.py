"""The random part of the data: a patch out of a sample, flipped and changed in intensity.

Legend: C channels, R regions (or 1 for class indices), *patch = ``data.patch_size``.
"""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms.croppad.array import SpatialCrop, SpatialPad
from monai.transforms.intensity.array import RandGaussianNoise, RandScaleIntensity, RandShiftIntensity
from monai.transforms.utils import generate_pos_neg_label_crop_centers
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor

from gcml_ray.config import DataConfig
from gcml_ray.data.loading import Sample


class PatchSampler:
    """Cuts training patches; what comes out depends on the sample and the seed alone.

    MONAI's generators choose centre and intensities. The cut itself and the flips are plain tensor
    operations: MONAI's record of each operation would take longer than the operations. One instance serves
    one thread.
    """

    def __init__(self, data: DataConfig) -> None:
        augment = data.augment
        self._data = data
        self._pad = SpatialPad(data.patch_size)
        self._intensity = [
            RandScaleIntensity(augment.intensity_scale, prob=augment.intensity_probability),
            RandShiftIntensity(augment.intensity_shift, prob=augment.intensity_probability),
            RandGaussianNoise(prob=augment.noise_probability, std=augment.noise_std),
        ]

    def sample(self, sample: Sample, generator_seed: int) -> tuple[Tensor, Tensor]:
        """One random patch.

        The centre is a foreground voxel with probability ``data.foreground_share``, else a background voxel;
        where a sample has only one kind, that one. A sample smaller than the patch is padded with 0 (the mean
        of a normalised image; background of the label).

        Args:
            sample: a training case, with its foreground and background indices.
            generator_seed: from :func:`gcml_ray.seeding.derive_seed`.

        Returns:
            image (C, *patch) float32 and label, (1, *patch) uint8 or (R, *patch) float32.
        """
        state = np.random.RandomState(np.random.MT19937(generator_seed))
        where = self._slices(sample, state)
        image, label = sample.image[where], sample.label[where]
        axes = self._flipped_axes(state)
        image, label = torch.flip(image, axes), torch.flip(label, axes)
        for transform in self._intensity:
            transform.set_random_state(state=state)
            image = transform(image)
        if tuple(image.shape[1:]) != tuple(self._data.patch_size):
            image, label = self._pad(image), self._pad(label)
        return convert_to_tensor(image, track_meta=False), convert_to_tensor(label, track_meta=False)

    def _slices(self, sample: Sample, state: np.random.RandomState) -> tuple[slice, ...]:
        foreground = sample.foreground if sample.foreground.numel() else sample.background
        background = sample.background if sample.background.numel() else sample.foreground
        shape = tuple(sample.image.shape[1:])
        size = tuple(min(wanted, length) for wanted, length in zip(self._data.patch_size, shape, strict=True))
        centres = generate_pos_neg_label_crop_centers(
            size, 1, self._data.foreground_share, shape, foreground, background, rand_state=state
        )
        return (slice(None), *SpatialCrop.compute_slices(roi_center=centres[0], roi_size=size))

    def _flipped_axes(self, state: np.random.RandomState) -> list[int]:
        """Tensor axes to flip; axis 0 of the configuration is the first spatial one."""
        augment = self._data.augment
        return [axis + 1 for axis in augment.flip_axes if state.random_sample() < augment.flip_probability]
