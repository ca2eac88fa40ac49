"""Gossip mutual learning: the receiver learns from the incoming model's predictions and keeps its own.

Chen, Yuan: "Decentralized Gossip Mutual Learning (GML) for brain tumor segmentation on multi-parametric
MRI" (arXiv 2401.15434) and "... for automatic head and neck tumor segmentation" (arXiv 2401.06180).
The divergence is regional: the mean KL over the reference's foreground. Its weight lambda is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import DcmlConfig, GmlMethod, Method
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, run_mutual_steps, share_steps
from gcml_ray.model.learner import Learner

REGIONAL = DcmlConfig(variant="regional")


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Regional mutual steps with each incoming model in turn; the local model is what stays."""
    assert isinstance(method, GmlMethod)
    if not incoming:
        return train_alone(local, context)
    result = RoundResult(merge="keep_local")
    for push, num_steps in zip(incoming, share_steps(context.num_steps, len(incoming)), strict=True):
        learner = context.open_incoming(push)
        run_mutual_steps(local, learner, context, result, num_steps=num_steps, dcml=REGIONAL, weight=method.weight)
    return result
