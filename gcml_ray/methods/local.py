"""Local training: every site alone, the reference that joining must beat."""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import Method
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, run_local_steps
from gcml_ray.model.learner import Learner


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Supervised steps only. Nothing is ever pushed to a site that trains alone."""
    assert not incoming, f"{method.name} takes no incoming model"
    return train_alone(local, context)


def train_alone(local: Learner, context: RoundContext) -> RoundResult:
    """A round without an incoming model, as every method runs it (docs/method.md, A round)."""
    result = RoundResult()
    run_local_steps(local, context, result, num_steps=context.num_steps)
    return result
