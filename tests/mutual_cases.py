"""Four voxels as softmax classes and as a sigmoid channel, and their divergences, for the tests of mutual learning."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from gcml_ray.config import DcmlConfig
from gcml_ray.config.methods import dcml_keys

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
