"""Ditto: federated averaging, and at every site a personal model beside it that stays close to the mean.

Li, Hu, Beirami, Smith: "Ditto: Fair and robust federated learning through personalization", ICML 2021,
arXiv 2012.04221. The shared model w is FedAvg's; the personal model v minimises the local loss plus
lambda/2 |v - w|^2, w being the weights that the round began with.

Our reading: both take a step on every batch; they start from the same weights. Warm-up: both take plain steps.
Cool-down: v takes plain steps, w stays as the server left it. v is the personalised model, w is tested as ``shared``.
A site holds two networks with gradients and moments, and computes twice.

Legend: P values of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import DittoMethod, Method
from gcml_ray.data.site_data import Batch
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, run_steps
from gcml_ray.model.learner import Learner, Statistics, local_step, proximal_step


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """A step of the shared and one of the personal model on every batch."""
    assert isinstance(method, DittoMethod)
    assert context.personal is not None
    assert not incoming, f"{method.name} takes no incoming model into a round"
    personal = context.personal
    if context.phase == "cooldown":
        return train_alone(personal, context)
    anchor = local.model.parameter.detach().clone()  # (P,)
    result = RoundResult()

    def step(batch: Batch) -> Statistics:
        shared = local_step(local, batch, context.loss)
        if context.phase == "warmup":
            own = local_step(personal, batch, context.loss)
        else:
            own = proximal_step(personal, batch, context.loss, anchor=anchor, weight=method.weight)
        return own | {"shared_segmentation": shared["segmentation"]}

    run_steps([local, personal], step, context, result, num_steps=context.num_steps)
    return result
