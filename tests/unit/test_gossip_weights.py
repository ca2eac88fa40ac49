from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from gcml_ray.config import (
    DpsgdMethod,
    MatchingTopology,
    Topology,
    UsefulnessTopology,
)
from gcml_ray.gossip.graph import plan_round, sample_edges
from gcml_ray.records import Edge
from tests.gossip_rounds import (
    ALL_TOPOLOGIES,
    SIX_SITES,
    TOPOLOGIES,
    count_senders,
    federation,
    gcml,
    sample_rounds,
)

USEFULNESS = UsefulnessTopology(name="usefulness", k=1)


def share_of_rounds(edge: Edge, rounds: list[tuple[Edge, ...]]) -> float:
    return sum(edge in edges for edges in rounds) / len(rounds)


def test_usefulness_zero_is_never_drawn_and_leaves_a_sender_without_others_idle() -> None:
    never = {Edge("A", other): 0.0 for other in "BCDEF"}
    for edges in sample_rounds(USEFULNESS, SIX_SITES, usefulness=never, num_rounds=300):
        assert count_senders(edges)["A"] == 0
        assert len(edges) >= 4


def test_usefulness_is_the_share_of_a_senders_pushes() -> None:
    """Weights 6, 1, 1, 1, 1: the sum is 10, so B gets 0.6 of A's pushes; A sends in every round."""
    rounds = sample_rounds(USEFULNESS, SIX_SITES, max_incoming=5, usefulness={Edge("A", "B"): 6.0}, num_rounds=4000)
    assert all(count_senders(edges)["A"] == 1 for edges in rounds)
    error = 4.5 * math.sqrt(0.6 * 0.4 / 4000)
    assert share_of_rounds(Edge("A", "B"), rounds) == pytest.approx(0.6, abs=error)


@pytest.mark.parametrize("times", [1, 2, 4])
def test_distrust_lowers_what_usefulness_has_raised(times: int) -> None:
    """Weights 6, 1, 1, 1, 1, and 0.5^times of trust in the first: 0.6 x 0.5^times; the others keep 0.1."""
    rounds = sample_rounds(
        USEFULNESS,
        SIX_SITES,
        max_incoming=5,
        usefulness={Edge("A", "B"): 6.0},
        trust={Edge("A", "B"): 0.5**times},
        num_rounds=4000,
    )
    for receiver, probability in {"B": 0.6 * 0.5**times, "C": 0.1, "F": 0.1}.items():
        error = 4.5 * math.sqrt(probability * (1 - probability) / 4000)
        assert share_of_rounds(Edge("A", receiver), rounds) == pytest.approx(probability, abs=error)


def test_weights_of_one_and_of_absent_sites_change_nothing() -> None:
    idle = {Edge("A", "B"): 1.0, Edge("A", "gone"): 0.0, Edge("server", "A"): 9.0}
    for topology in TOPOLOGIES:
        weighted = sample_rounds(topology, SIX_SITES, usefulness=idle, trust=idle, num_rounds=5)
        assert weighted == sample_rounds(topology, SIX_SITES, num_rounds=5)


def plain_and_trusted(
    topology: Topology, trust: dict[Edge, float], *, num_rounds: int
) -> list[tuple[set[Edge], set[Edge]]]:
    """The graphs of the same rounds without and with trust; each round has a generator of its own, as in a run."""

    def graph(index: int, trust: dict[Edge, float] | None) -> set[Edge]:
        rng = np.random.default_rng(index)
        sites = SIX_SITES
        return set(sample_edges(topology, sites, max_incoming=1, rng=rng, exchange_round=index, trust=trust))

    return [(graph(index, None), graph(index, trust)) for index in range(num_rounds)]


@ALL_TOPOLOGIES
def test_edge_takes_place_as_often_as_its_trust_says(topology: Topology) -> None:
    """B to C has 0.25, C to B nothing said, so 1; and no other edge of the graph moves."""
    rounds = plain_and_trusted(topology, {Edge("B", "C"): 0.25}, num_rounds=4000)
    drawn = [(Edge("B", "C") in weighted) for plain, weighted in rounds if Edge("B", "C") in plain]
    assert len(drawn) > 300
    assert np.mean(drawn) == pytest.approx(0.25, abs=4.5 * math.sqrt(0.25 * 0.75 / len(drawn)))
    assert all(plain - weighted <= {Edge("B", "C")} and weighted <= plain for plain, weighted in rounds)


@ALL_TOPOLOGIES
def test_edge_without_trust_never_takes_place(topology: Topology) -> None:
    weights = {Edge("A", other): 0.0 for other in "BCDEF"}
    for plain, weighted in plain_and_trusted(topology, weights, num_rounds=200):
        assert weighted == {edge for edge in plain if edge.sender != "A"}


def test_directions_of_a_pair_are_lost_one_by_one() -> None:
    """Two sites, both edges at 0.5: both, one or none take place in a quarter, a half and a quarter of the rounds."""
    weights = {Edge("A", "B"): 0.5, Edge("B", "A"): 0.5}
    topology = MatchingTopology(name="matching", symmetric=True)
    rng = np.random.default_rng(3)
    counts = Counter(
        len(sample_edges(topology, {"A": 1, "B": 1}, max_incoming=1, rng=rng, exchange_round=0, trust=weights))
        for _ in range(4000)
    )
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert counts[number] / 4000 == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / 4000))


@pytest.mark.parametrize("name", ["ring", "exponential"])
def test_mixing_by_fixed_shares_loses_no_edge(name: str) -> None:
    """D-PSGD: a lost push would make the mixing matrix other than doubly stochastic, and the mean would drift."""
    method = DpsgdMethod.model_validate({"name": "dpsgd", "topology": {"name": name}})
    never = {Edge("A", other): 0.0 for other in "BCDEF"}
    for number in range(3, 8):
        plain = plan_round(method, federation(), round_number=number, num_train=SIX_SITES)
        weighted = plan_round(method, federation(), round_number=number, num_train=SIX_SITES, trust=never)
        assert plain == weighted


def test_order_of_the_weights_changes_nothing() -> None:
    weights = {Edge(one, other): 0.5 + index for index, one in enumerate("ABC") for other in "DEF"}
    backwards = dict(reversed(weights.items()))
    one = sample_rounds(USEFULNESS, SIX_SITES, max_incoming=2, usefulness=weights, trust=weights, num_rounds=20)
    other = sample_rounds(USEFULNESS, SIX_SITES, max_incoming=2, usefulness=backwards, trust=backwards, num_rounds=20)
    assert one == other


def test_usefulness_with_k_sends_k_times_where_there_is_room() -> None:
    topology = UsefulnessTopology(name="usefulness", k=2)
    for edges in sample_rounds(topology, SIX_SITES, max_incoming=5, num_rounds=50):
        assert count_senders(edges) == Counter(dict.fromkeys(SIX_SITES, 2))


def test_plan_hands_the_weights_to_the_topology() -> None:
    method = gcml({"name": "usefulness"}, max_incoming=5)
    only_b = {Edge("A", other): 0.0 for other in "CDEF"} | {Edge("A", "B"): 5.0}
    for number in range(3, 8):
        plan = plan_round(method, federation(), round_number=number, num_train=SIX_SITES, usefulness=only_b)
        assert [edge.receiver for edge in plan.edges if edge.sender == "A"] == ["B"]
