from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest

from gcml_ray.config import (
    BernoulliTopology,
    ExponentialTopology,
    LocalMethod,
    MatchingTopology,
    PushKTopology,
    RingTopology,
    Topology,
)
from gcml_ray.gossip.graph import plan_round, sample_edges
from gcml_ray.records import Edge
from tests.gossip_rounds import (
    ALL_TOPOLOGIES,
    NUM_ROUNDS,
    SEVEN_SITES,
    SIX_SITES,
    count_receivers,
    count_senders,
    federation,
    gcml,
    sample_rounds,
)

# --- every topology --------------------------------------------------------------------------


@ALL_TOPOLOGIES
@pytest.mark.parametrize("max_incoming", [1, 2])
def test_no_site_pushes_to_itself_or_twice_to_one_peer(topology: Topology, max_incoming: int) -> None:
    for edges in sample_rounds(topology, SEVEN_SITES, max_incoming=max_incoming):
        assert all(edge.sender != edge.receiver for edge in edges)
        assert len(set(edges)) == len(edges)


@ALL_TOPOLOGIES
@pytest.mark.parametrize("max_incoming", [1, 2])
def test_no_receiver_takes_more_than_max_incoming(topology: Topology, max_incoming: int) -> None:
    for edges in sample_rounds(topology, SEVEN_SITES, max_incoming=max_incoming):
        assert max(count_receivers(edges).values(), default=0) <= max_incoming


@ALL_TOPOLOGIES
def test_edges_name_only_living_sites_and_are_sorted(topology: Topology) -> None:
    living = {name: cases for name, cases in SEVEN_SITES.items() if name not in {"B", "F"}}
    for edges in sample_rounds(topology, living):
        assert {name for edge in edges for name in (edge.sender, edge.receiver)} <= set(living)
        assert list(edges) == sorted(edges)


@ALL_TOPOLOGIES
def test_single_site_and_no_site_have_no_edges(topology: Topology) -> None:
    assert sample_edges(topology, {"A": 3}, max_incoming=1, rng=np.random.default_rng(0), exchange_round=0) == ()
    assert sample_edges(topology, {}, max_incoming=1, rng=np.random.default_rng(0), exchange_round=0) == ()


@ALL_TOPOLOGIES
def test_two_sites_only_push_to_each_other(topology: Topology) -> None:
    pushed = {edge for edges in sample_rounds(topology, {"A": 4, "B": 4}) for edge in edges}
    assert pushed == {Edge("A", "B"), Edge("B", "A")}


@ALL_TOPOLOGIES
def test_order_of_the_mapping_changes_nothing(topology: Topology) -> None:
    reversed_sites = dict(reversed(SEVEN_SITES.items()))
    assert sample_rounds(topology, SEVEN_SITES, num_rounds=5) == sample_rounds(topology, reversed_sites, num_rounds=5)


@pytest.mark.parametrize(
    "topology",
    [
        BernoulliTopology(name="bernoulli", expected_senders=50_000.0),
        MatchingTopology(name="matching"),
        PushKTopology(name="push_k", k=3),
        RingTopology(name="ring"),
        ExponentialTopology(name="exponential"),
    ],
    ids=lambda topology: topology.name,
)
def test_hundred_thousand_sites_are_planned_in_seconds(topology: Topology) -> None:
    """About 0.3 s of processor time; a loop over pairs would take minutes."""
    sites = {f"s{index:06d}": 1 + index % 9 for index in range(100_000)}
    settings = federation(warmup_rounds=0)
    method = gcml(topology.model_dump())
    start = time.process_time()
    plan = plan_round(method, settings, round_number=5, num_train=sites)
    assert time.process_time() - start < 5
    assert len(plan.edges) > 30_000


@ALL_TOPOLOGIES
@pytest.mark.parametrize("num_sites", [2, 3, 10, 1000])
def test_graphs_of_any_size_hold_their_rules(topology: Topology, num_sites: int) -> None:
    sites = {f"s{index:04d}": 1 + index % 9 for index in range(num_sites)}
    for edges in sample_rounds(topology, sites, max_incoming=2, num_rounds=3 if num_sites > 10 else 50):
        assert all(edge.sender != edge.receiver and {edge.sender, edge.receiver} <= set(sites) for edge in edges)
        assert len(set(edges)) == len(edges)
        assert max(count_receivers(edges).values(), default=0) <= 2


# --- bernoulli -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_incoming", [1, 2])
def test_bernoulli_site_sends_as_often_as_its_share_of_cases(max_incoming: int) -> None:
    """p_i = min(1, m n_i / sum n) = min(1, 3 n_i / 100): 0.09, 0.9, 0.36, 0.15, 0.6, 0.6, 0.3."""
    topology = BernoulliTopology(name="bernoulli", expected_senders=3.0)
    rounds = sample_rounds(topology, SEVEN_SITES, max_incoming=max_incoming)
    counts = count_senders(edge for edges in rounds for edge in edges)
    for name, cases in SEVEN_SITES.items():
        probability = 3 * cases / 100
        standard_error = math.sqrt(NUM_ROUNDS * probability * (1 - probability))
        assert abs(counts[name] - NUM_ROUNDS * probability) < 4 * standard_error


def test_bernoulli_sends_the_expected_number_of_models() -> None:
    """With equal n_i the number of senders is binomial: 7 sites, p = 3/7, mean 3, variance 7 x 3/7 x 4/7."""
    topology = BernoulliTopology(name="bernoulli", expected_senders=3.0)
    total = sum(len(edges) for edges in sample_rounds(topology, dict.fromkeys("ABCDEFG", 8)))
    assert abs(total - 3 * NUM_ROUNDS) < 4 * math.sqrt(NUM_ROUNDS * 12 / 7)


def test_bernoulli_probability_is_capped_at_one() -> None:
    """p_A = min(1, 2 x 90/100) = 1; with three places at each receiver A always finds one."""
    topology = BernoulliTopology(name="bernoulli", expected_senders=2.0)
    rounds = sample_rounds(topology, {"A": 90, "B": 5, "C": 5}, max_incoming=3)
    assert count_senders(edge for edges in rounds for edge in edges)["A"] == NUM_ROUNDS


def test_bernoulli_receiver_is_drawn_evenly_among_the_others() -> None:
    topology = BernoulliTopology(name="bernoulli", expected_senders=1.0)
    rounds = sample_rounds(topology, {"A": 10**9, "B": 1, "C": 1, "D": 1, "E": 1}, num_rounds=4000)
    counts = count_receivers(edge for edges in rounds for edge in edges if edge.sender == "A")
    assert sum(counts.values()) >= 3999
    assert all(abs(counts[name] - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75) for name in "BCDE")


def test_bernoulli_sender_with_nobody_left_is_idle() -> None:
    """Three senders, one place each: where A and B push to each other, C is left with itself."""
    topology = BernoulliTopology(name="bernoulli", expected_senders=100.0)
    rounds = sample_rounds(topology, {"A": 1, "B": 1, "C": 1})
    assert {len(edges) for edges in rounds} == {2, 3}


# --- matching, push_k ------------------------------------------------------------------------


def test_symmetric_matching_of_an_even_number_pairs_everybody_once_both_ways() -> None:
    for edges in sample_rounds(MatchingTopology(name="matching", symmetric=True), SIX_SITES):
        assert count_senders(edges) == count_receivers(edges) == Counter(dict.fromkeys(SIX_SITES, 1))
        assert {Edge(edge.receiver, edge.sender) for edge in edges} == set(edges)


def test_one_way_matching_of_an_even_number_uses_every_site_once() -> None:
    for edges in sample_rounds(MatchingTopology(name="matching", symmetric=False), SIX_SITES):
        assert count_senders(edges) + count_receivers(edges) == Counter(dict.fromkeys(SIX_SITES, 1))


def test_one_way_matching_draws_both_directions_evenly() -> None:
    rounds = sample_rounds(MatchingTopology(name="matching", symmetric=False), {"A": 1, "B": 1})
    forward = sum(edges == (Edge("A", "B"),) for edges in rounds)
    assert abs(forward - NUM_ROUNDS / 2) < 4 * math.sqrt(NUM_ROUNDS / 4)


def test_matching_of_an_odd_number_leaves_out_each_site_equally_often() -> None:
    left_out: Counter[str] = Counter()
    for edges in sample_rounds(MatchingTopology(name="matching"), SEVEN_SITES):
        left_out.update(set(SEVEN_SITES) - set(count_senders(edges)))
    assert left_out.total() == NUM_ROUNDS
    assert all(abs(left_out[name] - NUM_ROUNDS / 7) < 4 * math.sqrt(NUM_ROUNDS * 6 / 49) for name in SEVEN_SITES)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_push_k_gives_every_site_k_receivers_and_k_senders(k: int) -> None:
    for edges in sample_rounds(PushKTopology(name="push_k", k=k), SEVEN_SITES, max_incoming=k):
        assert count_senders(edges) == count_receivers(edges) == Counter(dict.fromkeys(SEVEN_SITES, k))


def test_push_k_beyond_the_number_of_peers_reaches_everybody() -> None:
    for edges in sample_rounds(PushKTopology(name="push_k", k=50), SIX_SITES, max_incoming=50, num_rounds=20):
        assert len(edges) == 6 * 5


def test_push_k_above_max_incoming_fills_every_place_and_drops_the_rest() -> None:
    rounds = sample_rounds(PushKTopology(name="push_k", k=4), SEVEN_SITES, max_incoming=2)
    assert all(count_receivers(edges) == Counter(dict.fromkeys(SEVEN_SITES, 2)) for edges in rounds)
    assert {count for edges in rounds for count in count_senders(edges).values()} == {1, 2, 3, 4}


@pytest.mark.parametrize(("k", "max_incoming"), [(1, 1), (2, 2), (3, 1)])
def test_push_k_draws_every_ordered_pair_equally_often(k: int, max_incoming: int) -> None:
    """Each of the 42 pairs has probability min(k, max_incoming) / 6 a round."""
    rounds = sample_rounds(PushKTopology(name="push_k", k=k), SEVEN_SITES, max_incoming=max_incoming)
    counts = Counter(edge for edges in rounds for edge in edges)
    probability = min(k, max_incoming) / 6
    assert len(counts) == 42
    deviation = max(abs(count - NUM_ROUNDS * probability) for count in counts.values())
    assert deviation < 4.5 * math.sqrt(NUM_ROUNDS * probability * (1 - probability))


# --- ring, exponential -----------------------------------------------------------------------


def test_ring_follows_the_names_and_closes() -> None:
    (edges,) = sample_rounds(RingTopology(name="ring"), {"C": 1, "A": 1, "B": 1}, num_rounds=1)
    assert edges == (Edge("A", "B"), Edge("B", "C"), Edge("C", "A"))


def test_ring_closes_over_the_living_sites() -> None:
    (edges,) = sample_rounds(RingTopology(name="ring"), {"A": 1, "C": 1, "D": 1}, num_rounds=1)
    assert edges == (Edge("A", "C"), Edge("C", "D"), Edge("D", "A"))


@pytest.mark.parametrize(
    ("sites", "receivers_of_a"), [("AB", "BBBB"), ("ABC", "BCBC"), ("ABCDE", "BCEB"), ("ABCDEFGH", "BCEB")]
)
def test_exponential_graph_steps_through_powers_of_two(sites: str, receivers_of_a: str) -> None:
    """5 sites: ceil(log2 5) = 3 distances 1, 2, 4, so A sends to B, C, E, then to B again."""
    rounds = sample_rounds(ExponentialTopology(name="exponential"), dict.fromkeys(sites, 1), num_rounds=4)
    assert "".join(edge.receiver for edges in rounds for edge in edges if edge.sender == "A") == receivers_of_a


def test_exponential_round_is_a_shift_of_all_sites() -> None:
    rounds = sample_rounds(ExponentialTopology(name="exponential"), dict.fromkeys("ABCDE", 1), num_rounds=3)
    assert rounds[2] == (Edge("A", "E"), Edge("B", "A"), Edge("C", "B"), Edge("D", "C"), Edge("E", "D"))


# --- plan_round ------------------------------------------------------------------------------


def test_phases_begin_and_end_on_the_configured_rounds() -> None:
    method = gcml({"name": "ring"})
    plans = [plan_round(method, federation(), round_number=number, num_train=SIX_SITES) for number in range(1, 11)]
    assert [plan.phase for plan in plans] == ["warmup"] * 2 + ["exchange"] * 5 + ["cooldown"] * 3
    assert [len(plan.edges) for plan in plans] == [0, 0, 6, 6, 6, 6, 6, 0, 0, 0]


def test_federation_without_warmup_and_cooldown_exchanges_from_first_to_last_round() -> None:
    settings = federation(warmup_rounds=0, cooldown_rounds=0)
    phases = [plan_round(gcml({"name": "ring"}), settings, round_number=n, num_train=SIX_SITES).phase for n in (1, 10)]
    assert phases == ["exchange", "exchange"]


def test_exponential_graph_starts_at_distance_one_after_the_warmup() -> None:
    method = gcml({"name": "exponential"})
    plan = plan_round(method, federation(), round_number=3, num_train=dict.fromkeys("ABCDE", 1))
    assert plan.edges[0] == Edge("A", "B")


def test_local_training_never_has_edges() -> None:
    local = LocalMethod(name="local")
    assert all(not plan_round(local, federation(), round_number=n, num_train=SIX_SITES).edges for n in range(1, 11))


def test_plan_names_all_living_sites_in_order() -> None:
    plan = plan_round(gcml({"name": "ring"}), federation(), round_number=1, num_train={"B": 1, "A": 2})
    assert plan.sites == ("A", "B")
    assert plan.round_number == 1


def test_plan_depends_on_seed_and_round_and_on_nothing_else() -> None:
    method = gcml({"name": "push_k", "k": 1})
    many = {f"s{index:02d}": 1 for index in range(30)}

    def edges(seed: int, round_number: int) -> tuple[Edge, ...]:
        return plan_round(method, federation(seed=seed), round_number=round_number, num_train=many).edges

    assert edges(5, 4) == edges(5, 4)
    assert edges(5, 4) != edges(6, 4)
    assert edges(5, 4) != edges(5, 5)


def test_plan_hands_max_incoming_to_the_topology() -> None:
    method = gcml({"name": "push_k", "k": 3}, max_incoming=2)
    plan = plan_round(method, federation(), round_number=3, num_train=SIX_SITES)
    assert count_receivers(plan.edges) == Counter(dict.fromkeys(SIX_SITES, 2))
