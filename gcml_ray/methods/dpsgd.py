"""Decentralised parallel SGD (D-PSGD): every site mixes with its neighbours by fixed shares, then trains.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu: "Can decentralized algorithms outperform centralized algorithms?", NeurIPS
2017, arXiv 1705.09056. The shares form a doubly stochastic matrix, so mixing leaves the mean over the sites as it
is. ``ring``: a third for each neighbour, as there; ``exponential``: one half from one peer, another distance each
round (Assran et al. 2019, arXiv 1811.10792; Ying et al. 2021, arXiv 2110.13363).

Our reading: several local steps follow each mixing (the paper has one), and the gradient is that at the mixed weights.
Where a neighbour's push is missing its share goes to the own weights; the matrix is doubly stochastic as long as
no push fails.

Legend: S values of a push.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gcml_ray.config import DpsgdMethod, Method, RingTopology
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult
from gcml_ray.model.learner import Learner


def neighbour_share(method: DpsgdMethod) -> float:
    """The weight of one neighbour; the own weights have what remains."""
    return 1 / 3 if isinstance(method.topology, RingTopology) else 1 / 2


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Mixes own and incoming weights by fixed shares, then takes local steps."""
    assert isinstance(method, DpsgdMethod)
    if incoming:
        share = neighbour_share(method)
        received = torch.stack([push.weights for push in incoming]).mean(dim=0)  # (S,)
        local.model.mix(received.to(local.model.flat.device), own_share=1 - share * len(incoming))
    result = train_alone(local, context)
    result.merge = "mixed" if incoming else ""
    return result
