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
from gcml_ray.losses.segmentation import SegmentationLoss
from gcml_ray.model.learner import Learner, MeanStatistics, Statistics, local_step, mutual_step
from gcml_ray.records import Phase


@dataclass(frozen=True)
class IncomingModel:
    """An accepted push: (S,) read-only weights on the CPU. Never written to: others read the same memory.

    ``staleness``: how many rounds the receiver has done more than the sender had, and ``age_s`` how old the weights
    are by the clocks of both; 0 where rounds have a barrier. ``discount``: what they weigh in a merge, 0 to 1.
    """

    sender: str
    num_train: int
    weights: Tensor
    staleness: int = 0
    age_s: float = 0.0
    discount: float = 1.0


def take_plainly(learners: Sequence[Learner], step: Callable[[Batch], Statistics], batch: Batch) -> Statistics:
    """A step without privacy: calls ``step(batch)``; see ``RoundContext.take``."""
    del learners  # ``step`` knows them
    return step(batch)


@dataclass(frozen=True)
class RoundContext:
    """One site's round: its data order, its loss, its clock, and how to score a model.

    ``score`` gives the mean validation Dice of a learner's model; ``open_incoming`` loads a push into a
    second learner with a fresh optimiser; ``on_step`` is told how many steps are done and raises to stop.
    ``personal`` is the model of its own that a site has beside the exchanged one, for methods with two.
    ``take`` takes a step of learners on a batch: plainly, or privately (``gcml_ray/privacy/training.py``).
    """

    round_number: int
    phase: Phase
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
    personal: Learner | None = None
    take: Callable[[Sequence[Learner], Callable[[Batch], Statistics], Batch], Statistics] = take_plainly


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


def run_steps(
    learners: Sequence[Learner],
    step: Callable[[Batch], Statistics],
    context: RoundContext,
    result: RoundResult,
    *,
    num_steps: int,
) -> None:
    """``num_steps`` times a batch, a learning rate and a step; continues the round's step count in ``result``.

    Args:
        learners: those that ``step`` trains.
        step: one optimiser step of each of them.
        context: the round.
        result: gets the steps' statistics.
        num_steps: how many.
    """
    for _ in range(num_steps):
        rate = context.learning_rate(result.num_steps)
        for learner in learners:
            learner.set_learning_rate(rate)
        result.statistics.add(context.take(learners, step, next(context.batches)))
        result.num_steps += 1
        context.on_step(result.num_steps)


def run_local_steps(local: Learner, context: RoundContext, result: RoundResult, *, num_steps: int) -> None:
    """``num_steps`` supervised steps."""

    def step(batch: Batch) -> Statistics:
        return local_step(local, batch, context.loss)

    run_steps([local], step, context, result, num_steps=num_steps)


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

    def step(batch: Batch) -> Statistics:
        return mutual_step(local, incoming, batch, context.loss, dcml=dcml, weight=weight, sigmoid=context.sigmoid)

    run_steps([local, incoming], step, context, result, num_steps=num_steps)


def share_steps(num_steps: int, num_parts: int) -> list[int]:
    """Splits a round's steps over the incoming models, the first ones taking what is left over."""
    whole, rest = divmod(num_steps, num_parts)
    return [whole + (part < rest) for part in range(num_parts)]
