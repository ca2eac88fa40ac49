"""Batches for differentially private training: every case takes part in a step or not, by a coin of its own.

Legend: B batch (its size varies, and may be 0), C channels, R regions, *patch = ``data.patch_size``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from gcml_ray.config import DataConfig
from gcml_ray.data.patches import PatchSampler
from gcml_ray.data.site_data import Batch, SiteData


def poisson_batches(
    site_data: SiteData, data: DataConfig, *, num_steps: int, coins: np.random.Generator, patch_seeds: Iterator[int]
) -> Iterator[Batch]:
    """One patch of each drawn case, a step after the other; cases are drawn independently (Poisson sampling).

    The accountant's bound holds for this sampling, not for the epochs of ``SiteData.batches``, and only as long as
    it stays secret which cases were drawn.

    Args:
        site_data: the site's cases.
        data: ``batch_size`` is the expected number of cases a step.
        num_steps: batches.
        coins: draws the cases.
        patch_seeds: a seed for each patch.
    """
    train = site_data.split("train")
    rate = sample_rate(data, num_train=len(train))
    sampler = PatchSampler(data)
    for _ in range(num_steps):
        drawn = [sample for sample, coin in zip(train, coins.random(len(train)), strict=True) if coin < rate]
        yield _batch([sampler.sample(sample, next(patch_seeds)) for sample in drawn], data)


def sample_rate(data: DataConfig, *, num_train: int) -> float:
    """The chance of a case to be in a batch."""
    return data.batch_size / num_train


def _batch(patches: list[tuple[torch.Tensor, torch.Tensor]], data: DataConfig) -> Batch:
    """Patches as a batch; an empty one has the shape that any other has, but for B = 0."""
    kind = torch.float32 if data.is_sigmoid else torch.int64
    if not patches:
        num_targets = data.num_outputs if data.is_sigmoid else 1
        image = torch.empty(0, len(data.channels), *data.patch_size)
        return Batch(image=image, label=torch.empty(0, num_targets, *data.patch_size, dtype=kind))
    return Batch(
        image=torch.stack([image for image, _ in patches]), label=torch.stack([label for _, label in patches]).to(kind)
    )
