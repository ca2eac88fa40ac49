"""FedProx: federated averaging with local steps that are held back from leaving the server's model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: "Federated optimization in heterogeneous networks", MLSys 2020,
arXiv 1812.06127. The local loss has mu/2 |w - w_global|^2 added; mu = 0 is FedAvg. The paper also lets sites do
different amounts of work; here all take the same number of steps (our reading).

Legend: P values of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.config import FedProxMethod, Method
from gcml_ray.data.site_data import Batch
from gcml_ray.methods.local import train_alone
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, run_steps
from gcml_ray.model.learner import Learner, Statistics, proximal_step


def train_round(
    local: Learner, incoming: Sequence[IncomingModel], context: RoundContext, method: Method
) -> RoundResult:
    """Proximal steps around the weights that the round begins with; alone (warm-up, cool-down) plain ones."""
    assert isinstance(method, FedProxMethod)
    assert not incoming, f"{method.name} takes no incoming model into a round"
    if context.phase != "exchange":
        return train_alone(local, context)
    anchor = local.model.parameter.detach().clone()  # (P,)
    result = RoundResult()

    def step(batch: Batch) -> Statistics:
        return proximal_step(local, batch, context.loss, anchor=anchor, weight=method.mu)

    run_steps([local], step, context, result, num_steps=context.num_steps)
    return result
