"""Pooled training: one model on the cases of all sites, the upper bound that no federation is allowed.

The data leave the sites, so it is for comparison only. The trainer of the one "site" named ``pooled`` brings
the cases together; here is nothing but local steps, as many as each site of a federation takes.
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
    """Supervised steps on patches of all cases, each case as likely as any other."""
    assert not incoming, f"{method.name} takes no incoming model"
    return train_alone(local, context)
