"""Rounds of a method on 1x1 convolutions and a handful of pixels; shared by the tests of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcml_ray.config import Method, OptimiserConfig
from gcml_ray.data.site_data import Batch
from gcml_ray.methods import METHODS
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult
from gcml_ray.model.learner import Learner, local_step
from gcml_ray.model.precision import Precision


def cross_entropy(heads: Sequence[Tensor], label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(heads[0], label[:, 0])


def batch_of(step: int) -> Batch:
    image = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(step))
    return Batch(image=image, label=(image > 0).long())


def make_learner(values: Sequence[float] = (0.1, 0.2, 0.3, 0.4)) -> Learner:
    """Two output channels: weights, then biases."""
    learner = Learner(
        nn.Conv2d(1, 2, 1),
        send_buffers=True,
        optimiser=OptimiserConfig(name="sgd", learning_rate=0.1),
        precision=Precision("cpu", "none"),
    )
    learner.model.flat.copy_(torch.tensor(values))
    return learner


class Clock:
    """Counts what a method asks for: rates by step, opened messages, steps done."""

    def __init__(self) -> None:
        self.rates: list[int] = []
        self.opened: list[str] = []
        self.done: list[int] = []
        self.peers: list[Learner] = []

    def open_incoming(self, message: IncomingModel) -> Learner:
        self.opened.append(message.sender)
        self.peers.append(make_learner())
        self.peers[-1].model.load(message.weights)
        return self.peers[-1]

    def learning_rate(self, step: int) -> float:
        self.rates.append(step)
        return 0.1


def make_context(clock: Clock, *, num_steps: int = 3, num_train: int = 2, exchange_index: int = 0) -> RoundContext:
    return RoundContext(
        round_number=1,
        phase="exchange",
        exchange_index=exchange_index,
        num_steps=num_steps,
        num_train=num_train,
        batches=(batch_of(step) for step in range(num_steps)),
        loss=cross_entropy,
        sigmoid=False,
        learning_rate=clock.learning_rate,
        score=lambda learner: 1 / (1 + float(learner.model.flat.abs().sum())),
        open_incoming=clock.open_incoming,
        on_step=clock.done.append,
    )


def message(sender: str, values: Sequence[float], *, num_train: int = 2) -> IncomingModel:
    buffer = np.array(values, dtype=np.float32)
    return IncomingModel(sender, num_train, torch.from_numpy(buffer))


PUSHES = (message("B", (1, 2, 3, 4)), message("C", (-1, 0, 1, 0), num_train=4))


def run(
    method: Method,
    local: Learner,
    incoming: Sequence[IncomingModel] = (),
    *,
    phase: Any = "exchange",
    personal: Learner | None = None,
    **options: Any,
) -> tuple[Clock, RoundResult]:
    clock = Clock()
    context = replace(make_context(clock, **options), phase=phase, personal=personal)
    result = METHODS[method.name](local, incoming, context, method)
    return clock, result


def after_local_steps(start: Sequence[float], num_steps: int = 3) -> Tensor:
    learner = make_learner(start)
    for step in range(num_steps):
        local_step(learner, batch_of(step), cross_entropy)
    return learner.model.flat
