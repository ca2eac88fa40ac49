"""Gossip contrastive mutual learning (GCML).

Chen, Yuan: "Decentralized Personalization for Federated Medical Image Segmentation via Gossip
Contrastive Mutual Learning", arXiv 2503.03883, IEEE TMI 44(7):2768-2783, 2025. The paper states that
the incoming and the local model learn from each other on local data; the fresh optimiser, the merge
rules and ``merge_first`` are our reading (docs/method.md, Overview).
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import GcmlMethod, Method
from gcml_ray.losses.mutual import mutual_weight
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.merging import merge_after, merge_before
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, run_mutual_steps, share_steps
from gcml_ray.model.learner import Learner


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Mutual steps with each incoming model in turn, merging after each.

    With several incoming models the round's steps are shared out over them, so that a receiver takes
    as many optimiser steps of its own model as a site that trains alone.
    """
    assert isinstance(method, GcmlMethod)
    if not incoming:
        return train_alone(local, context)
    result = RoundResult()
    weight = mutual_weight(method.dcml, context.exchange_index)
    for push, num_steps in zip(incoming, share_steps(context.num_steps, len(incoming)), strict=True):
        learner = context.open_incoming(push)
        before = local.model.snapshot() if method.merge == "select_best" else None
        merge_before(local, learner, push, context, mode=method.merge_first)
        run_mutual_steps(local, learner, context, result, num_steps=num_steps, dcml=method.dcml, weight=weight)
        merge_after(local, learner, push, context, result, mode=method.merge, before=before)
    return result
