"""One model in training, and the two kinds of optimiser step: local and mutual.

Legend: B batch, C classes or regions, D H W voxels. A step never synchronises with the device: its
statistics stay tensors until the round is over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gcml_ray.config import DcmlConfig, FederationConfig, OptimiserConfig
from gcml_ray.data.site_data import Batch
from gcml_ray.losses.mutual import mutual_divergences
from gcml_ray.losses.segmentation import SegmentationLoss
from gcml_ray.model.compilation import compile_ahead, compiled_forward
from gcml_ray.model.flat_optimiser import FlatOptimiser
from gcml_ray.model.precision import Precision
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import forward_heads

Statistics = dict[str, Tensor]


class Learner:
    """A flat model with its optimiser.

    Args:
        module: the network, already on its device.
        send_buffers, keep_norms: see :class:`gcml_ray.model.weights.FlatModel`.
        optimiser: name and constants; the learning rate is set before each step.
        precision: AMP or not.
        is_compiled: forward and backward passes by ``torch.compile``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        send_buffers: bool,
        optimiser: OptimiserConfig,
        precision: Precision,
        keep_norms: bool = False,
        is_compiled: bool = False,
    ) -> None:
        self._heads = compiled_forward() if is_compiled else forward_heads
        self.model = FlatModel(module, send_buffers=send_buffers, keep_norms=keep_norms)
        self.optimiser = FlatOptimiser(self.model.parameter, optimiser)
        self.clip_norm = optimiser.clip_norm
        self.precision = precision
        self.scaler = precision.scaler()
        self.is_collecting = False

    def forward(self, image: Tensor) -> list[Tensor]:
        """Logits of every head, main head first, for images (B, C, *spatial)."""
        with self.precision.autocast():
            return self._heads(self.model.module, image)

    def compile_ahead(self, shape: tuple[int, ...]) -> None:
        """Compiles for patches (B, C, *spatial) of a shape; see :func:`gcml_ray.model.compilation.compile_ahead`."""
        image = torch.zeros(shape, device=self.model.flat.device)
        compile_ahead(self.model.module, image, autocast=self.precision.autocast())

    def apply_gradients(self, loss: Tensor) -> None:
        """Backward, then :meth:`take_step`, unless ``is_collecting``: then :mod:`gcml_ray.privacy` takes it."""
        self.model.gradient.zero_()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not self.is_collecting:
            self.take_step()

    def take_step(self) -> None:
        """Clip, one optimiser step; the average of the weights follows."""
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)  # type: ignore[arg-type]  # has what a scaler needs
            nn.utils.clip_grad_norm_([self.model.parameter], self.clip_norm)
        self.scaler.step(self.optimiser)  # type: ignore[arg-type]
        self.scaler.update()
        if self.model.average is not None:
            self.model.average.follow(self.model.flat)

    def set_learning_rate(self, learning_rate: float) -> None:
        """The rate of the next steps."""
        self.optimiser.learning_rate = learning_rate


def learning_rate(optimiser: OptimiserConfig, federation: FederationConfig, *, round_number: int, step: int) -> float:
    """The rate of one step, as a function of its place in the whole run.

    ``cosine`` falls to 1 % of the start value, ``polynomial`` is (1 - progress)^0.9 (nnU-Net's habit).

    Args:
        optimiser: start value and schedule.
        federation: rounds and local steps, which make up the run.
        round_number: 1-based.
        step: 0-based step within the round.
    """
    total = federation.rounds * federation.local_steps
    progress = ((round_number - 1) * federation.local_steps + step) / total
    if optimiser.schedule == "cosine":
        return optimiser.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
    if optimiser.schedule == "polynomial":
        return optimiser.learning_rate * float((1 - progress) ** 0.9)
    return optimiser.learning_rate


def local_step(learner: Learner, batch: Batch, loss: SegmentationLoss) -> Statistics:
    """One supervised step on a batch of (B, C, *spatial) patches."""
    value = loss(learner.forward(batch.image), batch.label)
    learner.apply_gradients(value)
    return {"segmentation": value.detach()}


def proximal_step(
    learner: Learner, batch: Batch, loss: SegmentationLoss, *, anchor: Tensor, weight: float
) -> Statistics:
    """One supervised step with weight/2 |w - anchor|^2 in the loss (FedProx, arXiv 1812.06127; Ditto, 2012.04221).

    Args:
        learner: holds w.
        batch: patches (B, C, *spatial) and their targets.
        loss: the segmentation loss.
        anchor: (P,) the parameters that w is pulled to; buffers are not pulled.
        weight: mu of FedProx, lambda of Ditto.
    """
    value = loss(learner.forward(batch.image), batch.label)
    pull = 0.5 * weight * (learner.model.parameter - anchor).square().sum()
    learner.apply_gradients(value + pull)
    return {"segmentation": value.detach(), "proximal": pull.detach()}


def mutual_step(
    local: Learner,
    incoming: Learner,
    batch: Batch,
    loss: SegmentationLoss,
    *,
    dcml: DcmlConfig,
    weight: float,
    sigmoid: bool,
) -> Statistics:
    """One DCML step (arXiv 2503.03883): both models learn from the labels and from each other.

    Both see the same augmented patch in train mode; each has its own backward pass, clipping and
    optimiser step, and neither's gradient reaches the other.

    Args:
        local: the receiver's model.
        incoming: the sender's model, trained here on the receiver's data.
        batch: patches (B, C, *spatial) and their targets.
        loss: the segmentation loss.
        dcml: variant and constants of the divergence.
        weight: lambda of this round (after ramp-up).
        sigmoid: nested sigmoid channels rather than softmax classes.
    """
    local_heads, incoming_heads = local.forward(batch.image), incoming.forward(batch.image)
    local_loss = loss(local_heads, batch.label)
    incoming_loss = loss(incoming_heads, batch.label)
    statistics = {"segmentation": local_loss.detach(), "incoming_segmentation": incoming_loss.detach()}
    if dcml.variant != "none" and weight > 0:
        local_term, incoming_term, seen = mutual_divergences(
            local_heads[0], incoming_heads[0], batch.label, dcml=dcml, sigmoid=sigmoid
        )
        local_loss = local_loss + weight * local_term
        incoming_loss = incoming_loss + weight * incoming_term
        statistics |= {"mutual": local_term.detach(), "incoming_mutual": incoming_term.detach()}
        statistics |= {"pull": seen.pull, "push": seen.push}
        statistics |= {"region/pull": seen.pull_share, "region/push": seen.push_share, "region/omega": seen.omega_share}
    local.apply_gradients(local_loss)
    incoming.apply_gradients(incoming_loss)
    return statistics


class MeanStatistics:
    """Running sums of step statistics on the device, read once at the end of a round."""

    def __init__(self) -> None:
        self._sums: Statistics = {}
        self._counts: dict[str, int] = {}

    def add(self, statistics: Statistics) -> None:
        """Adds one step's values; a key may be missing in some steps."""
        for name, value in statistics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean by name: the one synchronisation of a round."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}
