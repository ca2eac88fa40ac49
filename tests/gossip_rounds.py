"""Sites, topologies and sampled rounds for the tests of gossip graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from gcml_ray.config import (
    BernoulliTopology,
    ExponentialTopology,
    FederationConfig,
    GcmlMethod,
    MatchingTopology,
    PushKTopology,
    RingTopology,
    Topology,
    UsefulnessTopology,
)
from gcml_ray.gossip.graph import sample_edges
from gcml_ray.records import Edge

NUM_ROUNDS = 1000
SEVEN_SITES = {"A": 3, "B": 30, "C": 12, "D": 5, "E": 20, "F": 20, "G": 10}
SIX_SITES = {name: cases for name, cases in SEVEN_SITES.items() if name != "G"}

TOPOLOGIES: list[Topology] = [
    BernoulliTopology(name="bernoulli", expected_senders=3.0),
    BernoulliTopology(name="bernoulli", expected_senders=100.0),
    MatchingTopology(name="matching", symmetric=True),
    MatchingTopology(name="matching", symmetric=False),
    PushKTopology(name="push_k", k=1),
    PushKTopology(name="push_k", k=3),
    PushKTopology(name="push_k", k=50),
    UsefulnessTopology(name="usefulness", k=1),
    UsefulnessTopology(name="usefulness", k=3),
    RingTopology(name="ring"),
    ExponentialTopology(name="exponential"),
]
ALL_TOPOLOGIES = pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)


def sample_rounds(
    topology: Topology,
    sites: dict[str, int],
    *,
    max_incoming: int = 1,
    num_rounds: int = NUM_ROUNDS,
    usefulness: dict[Edge, float] | None = None,
    trust: dict[Edge, float] | None = None,
) -> list[tuple[Edge, ...]]:
    rng = np.random.default_rng(11)
    return [
        sample_edges(
            topology,
            sites,
            max_incoming=max_incoming,
            rng=rng,
            exchange_round=index,
            usefulness=usefulness,
            trust=trust,
        )
        for index in range(num_rounds)
    ]


def count_senders(edges: Iterable[Edge]) -> Counter[str]:
    return Counter(edge.sender for edge in edges)


def count_receivers(edges: Iterable[Edge]) -> Counter[str]:
    return Counter(edge.receiver for edge in edges)


def federation(**changes: object) -> FederationConfig:
    return FederationConfig.model_validate(
        {"rounds": 10, "local_steps": 1, "warmup_rounds": 2, "cooldown_rounds": 3, "seed": 5} | changes
    )


def gcml(topology: dict[str, object], **changes: object) -> GcmlMethod:
    return GcmlMethod.model_validate({"name": "gcml", "topology": topology} | changes)
