"""FedBN: federated averaging in which every site keeps its own normalisation layers.

Li, Jiang, Zhang, Kamp, Dou: "FedBN: Federated learning on non-IID features via local batch normalization",
ICLR 2021, arXiv 2102.07623. Our reading: instance, group and layer normalisation with parameters stay local as
batch normalisation does there, running statistics too; layers are found by their type. They are no part of a
push (``gcml_ray/model/weights.py``), so a round differs from FedAvg's in nothing else.
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
    """The site's part of a round: supervised steps on all its layers."""
    assert not incoming, f"{method.name} takes no incoming model into a round"
    return train_alone(local, context)
