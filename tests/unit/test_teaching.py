from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from gcml_ray.config import UsefulnessTopology
from gcml_ray.files.record_json import from_json, to_json
from gcml_ray.gossip.teaching import gains_by_edge, mean_gains, usefulness_weights
from gcml_ray.records import Edge, RoundPlan, RoundRecord, TrainReport

SITES = ("A", "B", "C", "D")
TOPOLOGY = UsefulnessTopology(name="usefulness", temperature=0.1, exploration=0.2)


def report(site: str, number: int, dice: float | None, *peers: str) -> TrainReport:
    return TrainReport(site, number, peers, 1, {}, {}, "", {}, dice, False, {}, 1e-3, 0)


def past(*rounds: Mapping[str, tuple[object, ...]], sites: tuple[str, ...] = SITES) -> tuple[RoundRecord, ...]:
    """Rounds of ``site: (dice, *peers)``."""
    return tuple(
        RoundRecord(
            plan=RoundPlan(number, "exchange", sites, ()),
            trained=tuple(report(site, number, *told) for site, told in told_by.items()),  # type: ignore[arg-type]
            pushes=(),
            failures=(),
            seconds=1.0,
        )
        for number, told_by in enumerate(rounds, start=1)
    )


def test_gain_is_the_change_since_the_receivers_previous_score() -> None:
    rounds = past({"A": (0.5,), "B": (0.2,)}, {"A": (0.6, "B"), "B": (0.3,)}, {"A": (0.55, "B")})
    assert gains_by_edge(rounds) == {Edge("B", "A"): pytest.approx((0.1, -0.05))}


def test_every_sender_of_a_round_gets_the_whole_change() -> None:
    gains = gains_by_edge(past({"A": (0.5,)}, {"A": (0.75, "B", "C")}))
    assert gains == {Edge("B", "A"): (0.25,), Edge("C", "A"): (0.25,)}


def test_nothing_is_noted_before_the_receivers_first_score() -> None:
    assert gains_by_edge(past({"A": (0.5, "B")}, {"A": (0.6,)})) == {}


def test_pushes_between_two_validations_share_the_change() -> None:
    """A is validated in rounds 1 and 4 (0.5, then 0.7): B of round 2 and C of round 4 go with +0.2."""
    gains = gains_by_edge(past({"A": (0.5,)}, {"A": (None, "B")}, {"A": (None,)}, {"A": (0.7, "C")}))
    assert gains == {Edge("B", "A"): pytest.approx((0.2,)), Edge("C", "A"): pytest.approx((0.2,))}


def test_a_missed_round_and_an_undefined_score_are_passed_over() -> None:
    gains = gains_by_edge(past({"A": (0.5,)}, {}, {"A": (math.nan, "C")}, {"A": (0.4, "B")}))
    assert gains == {Edge("B", "A"): pytest.approx((-0.1,)), Edge("C", "A"): pytest.approx((-0.1,))}


def test_edges_come_in_order() -> None:
    gains = gains_by_edge(past({"A": (0.5,), "B": (0.5,)}, {"B": (0.6, "C", "A"), "A": (0.6, "D")}))
    assert list(gains) == [Edge("A", "B"), Edge("C", "B"), Edge("D", "A")]


def test_weights_are_the_softmax_with_a_floor_over_that_of_an_unknown_receiver() -> None:
    """A's gains: +0.2 at B, 0.0 at C; their mean 0.1 stands for D. Softmax of (2, 0, 1) by hand, floor 0.2 / 3."""
    rounds = past({"B": (0.5,), "C": (0.5,)}, {"B": (0.7, "A"), "C": (0.5, "A")})
    powers = [math.exp(2), math.exp(0), math.exp(1)]
    chances = [0.8 * power / sum(powers) + 0.2 / 3 for power in powers]
    expected = {Edge("A", "B"): chances[0] / chances[2], Edge("A", "C"): chances[1] / chances[2]}
    assert usefulness_weights(rounds, TOPOLOGY, SITES) == pytest.approx(expected)


def test_a_senders_weights_are_one_or_more_on_average() -> None:
    """Else a sender would stay idle in some rounds, see ``gossip._draw_receivers``."""
    scores = {"B": (0.9, "A"), "C": (0.1, "A"), "D": (0.55, "A")}
    rounds = past(dict.fromkeys("BCD", (0.5,)), scores)
    assert sum(usefulness_weights(rounds, TOPOLOGY, SITES).values()) >= 3
    only_one = past({"B": (0.5,)}, {"B": (0.1, "A")})
    assert usefulness_weights(only_one, TOPOLOGY, SITES) == {Edge("A", "B"): pytest.approx(1)}


def test_full_exploration_makes_all_receivers_equal() -> None:
    rounds = past(dict.fromkeys("BC", (0.5,)), {"B": (0.9, "A"), "C": (0.1, "A")})
    topology = UsefulnessTopology(name="usefulness", exploration=1.0)
    assert usefulness_weights(rounds, topology, SITES) == {Edge("A", "B"): 1.0, Edge("A", "C"): 1.0}


def test_tiny_temperature_does_not_overflow() -> None:
    """All softmax mass on B: chances 0.8 + 0.2 / 3 for B, 0.2 / 3 for C and for D."""
    rounds = past(dict.fromkeys("BC", (0.5,)), {"B": (0.9, "A"), "C": (0.1, "A")})
    topology = UsefulnessTopology(name="usefulness", temperature=1e-6)
    assert usefulness_weights(rounds, topology, SITES) == pytest.approx({Edge("A", "B"): 13.0, Edge("A", "C"): 1.0})


def test_a_record_of_one_site_alone_forgets_nothing() -> None:
    """Without a barrier a record holds the sites that have trained since the one before."""
    rounds = past({"B": (0.5,), "C": (0.5,)}, {"B": (0.7, "A"), "C": (0.5, "A")})
    alone = past({}, {}, {"C": (0.5,)}, sites=("C",))[2:]
    assert usefulness_weights((*rounds, *alone), TOPOLOGY, SITES) == usefulness_weights(rounds, TOPOLOGY, SITES)


def test_sites_that_are_gone_and_servers_have_no_weight() -> None:
    rounds = past({"A": (0.5,), "B": (0.5,)}, {"A": (0.6, "B", "server"), "B": (0.6, "A")}, sites=("A", "C"))
    assert usefulness_weights(rounds, TOPOLOGY, ("A", "C")) == {}
    assert usefulness_weights((), TOPOLOGY, ("A", "C")) == {}


def test_weights_survive_the_run_folder() -> None:
    """A resume reads the rounds back: the same weights to the last bit."""
    rounds = past(dict.fromkeys("BC", (1 / 3,)), {"B": (2 / 7, "A"), "C": (0.1 + 0.2, "A")})
    back = tuple(from_json(RoundRecord, to_json(record)) for record in rounds)
    assert usefulness_weights(back, TOPOLOGY, SITES) == usefulness_weights(rounds, TOPOLOGY, SITES)


def test_mean_gain_is_over_all_pushes_of_an_edge() -> None:
    rounds = past({"A": (0.5,)}, {"A": (0.6, "B")}, {"A": (0.4, "B")})
    assert mean_gains(rounds) == {Edge("B", "A"): pytest.approx(-0.05)}


def test_records_may_lack_a_site() -> None:
    rounds = past({"A": (0.5,)}, {"A": (0.6, "B")})
    assert gains_by_edge([replace(rounds[0], trained=()), rounds[1]]) == {}
