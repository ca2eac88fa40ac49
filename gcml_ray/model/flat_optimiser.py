"""SGD, Adam and AdamW over one flat vector: PyTorch's own functions, without the classes around them.

``torch.optim``'s classes load PyTorch's compiler as soon as the first one is made, though nothing is compiled here: a
third of a site's start, and 70 MB (docs/performance.md).

Legend: P values of parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from gcml_ray.config import OptimiserConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8  # PyTorch's defaults


class FlatOptimiser:
    """Steps of the configured optimiser, element by element: the same on one vector as on the tensors it is made of.

    Args:
        parameter: (P,) with its gradient in ``grad``.
        config: name and constants.

    Attributes:
        learning_rate: of the next step.
        moments: what it remembers, by PyTorch's names: (P,) each, and the number of steps; none before the first step.
        param_groups: where ``torch.amp.GradScaler`` looks for gradients.
    """

    def __init__(self, parameter: nn.Parameter, config: OptimiserConfig) -> None:
        self.learning_rate = config.learning_rate
        self.moments: dict[str, Tensor] = {}
        self.param_groups: list[dict[str, Any]] = [{"params": [parameter]}]
        self._parameter = parameter
        self._config = config
        self._step_supports_amp_scaling = config.name != "sgd"  # a GradScaler asks: fused steps unscale by themselves

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradient."""
        if self._config.name == "sgd":
            self._sgd_step()
        else:
            self._adam_step()

    def forget(self) -> None:
        """Resets moments and step count to 0, and keeps their memory."""
        for moment in self.moments.values():
            moment.zero_()

    def _sgd_step(self) -> None:
        momenta = [self.moments.get("momentum_buffer")]
        sgd(
            [self._parameter],
            [self._gradient],
            momenta,
            weight_decay=self._config.weight_decay,
            momentum=self._config.momentum or 0.0,
            lr=self.learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if momenta[0] is not None:
            self.moments["momentum_buffer"] = momenta[0]

    def _adam_step(self) -> None:
        amsgrad = self._config.amsgrad
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
        if not self.moments:
            self.moments = {name: torch.zeros_like(self._parameter) for name in names}
            self.moments["step"] = self._parameter.new_zeros(())
        first, second, *largest = ([self.moments[name]] for name in names)
        function = adamw if self._config.name == "adamw" else adam
        function(
            [self._parameter],
            [self._gradient],
            first,
            second,
            largest[0] if amsgrad else [],
            [self.moments["step"]],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),  # a GradScaler sets these two for the length of a step
            found_inf=getattr(self, "found_inf", None),
            amsgrad=amsgrad,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.learning_rate,
            weight_decay=self._config.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    @property
    def _gradient(self) -> Tensor:
        assert self._parameter.grad is not None
        return self._parameter.grad
