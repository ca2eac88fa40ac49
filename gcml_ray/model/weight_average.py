"""A moving average of a model's weights over its optimiser steps, beside the weights that are trained.

Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30(4), 1992; as an
exponential average in Tarvainen and Valpola, "Mean teachers", NeurIPS 2017, arXiv 1703.01780. Our reading: the average
is what a site validates, keeps and tests; it follows what is done to the weights between two steps.

Legend: F all values of a model (parameters and floating-point buffers), S values of a push, the first of F.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decay_at(num_steps: int, decay: float) -> float:
    """EMA decay at a step: min(decay, (1 + n) / (10 + n)), small at first, when the average is still the start weights.

    Args:
        num_steps: n, the steps averaged so far.
        decay: the limit, reached after many steps.
    """
    return min(decay, (1 + num_steps) / (10 + num_steps))


class WeightAverage:
    """The average of one model, beginning with the weights it has.

    Running statistics are averaged as parameters are: those of the last weights do not belong to averaged weights.

    Args:
        flat: (F,) the model's values.
        decay: what the average keeps of itself at a step, 0 to below 1.

    Attributes:
        values: (F,) the average.
        num_steps: the steps it has seen since it began or began anew.
    """

    def __init__(self, flat: Tensor, *, decay: float) -> None:
        self.decay = decay
        self.values = flat.detach().clone()
        self.num_steps = 0

    def follow(self, flat: Tensor) -> None:
        """Updates the average after a step; ``flat`` (F,) are the model's values after it."""
        self.values.lerp_(flat, 1.0 - decay_at(self.num_steps, self.decay))
        self.num_steps += 1

    def replace(self, weights: Tensor) -> None:
        """Begins anew with weights (S,) that took the place of the model's own."""
        self.values[: weights.numel()].copy_(weights)
        self.num_steps = 0

    def mix(self, other: Tensor, *, own_share: float) -> None:
        """Takes in other weights (S,) with the share that the model itself takes of them."""
        self.values[: other.numel()].lerp_(other, 1.0 - own_share)

    def restore(self, values: Tensor, num_steps: int) -> None:
        """Back to an earlier average, (F,)."""
        self.values.copy_(torch.as_tensor(values))
        self.num_steps = num_steps
