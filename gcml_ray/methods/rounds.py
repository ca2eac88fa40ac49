"""What every method works with in a round, and the two training loops that methods are made of.

Legend: S values of a push.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from gcml_ray.config import DcmlConfig, Method
from gcml_ray.data.site_data import Batch
from gcml_ray.learner import Learner, MeanStatistics, SegmentationLoss, local_step, mutual_step


@dataclass(frozen=True)
class IncomingModel:
    """An accepted push: (S,) read-only weights on the CPU. Never written to: others read the same memory."""

    sender: str
    num_train: int
    weights: Tensor


@dataclass(frozen=True)
class RoundContext:
    """One site's round: its data order, its loss, its clock, and how to score a model.

    ``score`` gives the mean validation Dice of a learner's model; ``open_incoming`` loads a push into a
    second learner with a fresh optimiser; ``on_step`` is told how many steps are done and raises to stop.
    """

    round_number: int
    exchange_index: int
    num_steps: int
    num_train: int
    batches: Iterator[Batch]
    loss: SegmentationLoss
    sigmoid: bool
    learning_rate: Callable[[int], float]
    score: Callable[[Learner], float]
    open_incoming: Callable[[IncomingModel], Learner]
    on_step: Callable[[int], None]


@dataclass
class RoundResult:
    """What a method did in a round. ``validation_dice`` is set where the method scored what it kept."""

    statistics: MeanStatistics = field(default_factory=MeanStatistics)
    num_steps: int = 0
    merge: str = ""
    candidate_dice: dict[str, float] = field(default_factory=dict)
    validation_dice: float | None = None


class TrainRound(Protocol):
    """A method: trains ``local`` for one round with whatever came in, in place."""

    def __call__(
        self, local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
    ) -> RoundResult:
        """Runs the round."""
        ...


def run_local_steps(local: Learner, context: RoundContext, result: RoundResult, *, num_steps: int) -> None:
    """``num_steps`` supervised steps; continues the round's step count in ``result``."""
    for _ in range(num_steps):
        local.set_learning_rate(context.learning_rate(result.num_steps))
        result.statistics.add(local_step(local, next(context.batches), context.loss))
        result.num_steps += 1
        context.on_step(result.num_steps)


def run_mutual_steps(
    local: Learner,
    incoming: Learner,
    context: RoundContext,
    result: RoundResult,
    *,
    num_steps: int,
    dcml: DcmlConfig,
    weight: float,
) -> None:
    """``num_steps`` mutual steps of both models on the receiver's data."""
    for _ in range(num_steps):
        rate = context.learning_rate(result.num_steps)
        local.set_learning_rate(rate)
        incoming.set_learning_rate(rate)
        batch = next(context.batches)
        result.statistics.add(
            mutual_step(local, incoming, batch, context.loss, dcml=dcml, weight=weight, sigmoid=context.sigmoid)
        )
        result.num_steps += 1
        context.on_step(result.num_steps)


def share_steps(num_steps: int, num_parts: int) -> list[int]:
    """Splits a round's steps over the incoming models, the first ones taking what is left over."""
    whole, rest = divmod(num_steps, num_parts)
    return [whole + (part < rest) for part in range(num_parts)]
