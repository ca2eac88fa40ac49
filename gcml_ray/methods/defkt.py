"""Def-KT: mutual learning of the local and the incoming model at the receiver; then the incoming one replaces it.

Li, Li, Varshney: "Decentralized federated learning via mutual knowledge transfer", IEEE Internet of Things
Journal 9(2), 2022, arXiv 2012.13063. Both models learn from the labels and from each other (deep mutual learning, mean
KL over all voxels, weight 1); the receiver goes on with what came in. Our reading: a key for the weight, the fresh
optimiser of the incoming model, and that sites without an incoming model train as any other does.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import DcmlConfig, DefKtMethod, Method
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, run_mutual_steps, share_steps
from gcml_ray.model.learner import Learner

MUTUAL = DcmlConfig(variant="mutual")


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Mutual steps with each incoming model in turn, each of which replaces the local one."""
    assert isinstance(method, DefKtMethod)
    if not incoming:
        return train_alone(local, context)
    result = RoundResult(merge="replace")
    for push, num_steps in zip(incoming, share_steps(context.num_steps, len(incoming)), strict=True):
        learner = context.open_incoming(push)
        run_mutual_steps(local, learner, context, result, num_steps=num_steps, dcml=MUTUAL, weight=method.weight)
        local.model.take_over(learner.model)  # with the statistics that it gathered here
    return result
