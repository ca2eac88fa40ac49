"""Federated averaging (FedAvg): local steps at every site, then everybody goes on with the mean of all weights.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: "Communication-efficient learning of deep networks from
decentralized data", AISTATS 2017, arXiv 1602.05629. The mean is weighted by training cases, as there; the
server forms it (``gcml_ray/training/server.py``). Our reading: all sites take part in each round, take the same number
of steps, and keep their optimiser's moments (the paper has plain SGD, which has none). FedAvg with fine-tuning is this
method with ``federation.cooldown_rounds``.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import Method
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult
from gcml_ray.model.learner import Learner


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """The site's part of a round: supervised steps. The mean reaches the site after it, by ``adopt``."""
    assert not incoming, f"{method.name} takes no incoming model into a round"
    return train_alone(local, context)
