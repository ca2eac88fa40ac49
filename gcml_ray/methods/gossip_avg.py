"""Gossip averaging: a receiver mixes what came in with its own weights, then trains.

Ormandi, Hegedus, Jelasity: "Gossip learning with linear models on fully distributed data",
Concurrency and Computation 25(4), 2013. There the age of a model weighs the mean; here its sender's
training cases do (our reading for networks).
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import GossipAvgMethod, Method
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult
from gcml_ray.model.learner import Learner


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Size-weighted mean over the own and all incoming weights, then local steps."""
    assert isinstance(method, GossipAvgMethod)
    own_cases: float = context.num_train
    for push in incoming:
        weights = push.weights.to(local.model.flat.device)
        total = own_cases + push.discount * push.num_train
        local.model.mix(weights, own_share=own_cases / total)
        own_cases = total
    result = train_alone(local, context)
    result.merge = "size_weighted" if incoming else ""
    return result
