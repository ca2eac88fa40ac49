"""What refused and accepted pushes make of the chances of the edges after them."""

from __future__ import annotations

import pytest

from gcml_ray.gossip.trust import ACCEPTED, ACCEPTED_ELSEWHERE, FLOOR, REFUSED, REFUSED_ELSEWHERE, trust_of_edges
from gcml_ray.records import Edge, Judgement, RoundPlan, RoundRecord, TrainReport

SITES = ("A", "B", "C")


def round_of(*judged: tuple[str, str, bool]) -> RoundRecord:
    """A round with judgements (sender, receiver, accepted)."""
    reports = [
        TrainReport(
            receiver, 1, (), 1, {}, {}, "", {}, None, False, {}, 0.1, 1,
            judged=(Judgement(sender, accepted, "", 1.0, 1.0, None, None),),
        )
        for sender, receiver, accepted in judged
    ]  # fmt: skip
    return RoundRecord(RoundPlan(1, "exchange", SITES, ()), tuple(reports), (), (), 1.0)


def test_nobody_is_distrusted_without_a_refusal() -> None:
    assert trust_of_edges([]) == {}
    assert trust_of_edges([round_of(("A", "B", True), ("B", "C", True))] * 3) == {}


def test_refusal_halves_the_chance_at_that_receiver_and_lowers_it_a_little_at_others() -> None:
    assert trust_of_edges([round_of(("A", "B", False))]) == {Edge("A", "B"): 0.5, Edge("A", "C"): 0.9}


def test_refusals_multiply_and_stop_at_the_floor() -> None:
    refused = round_of(("A", "B", False))
    assert trust_of_edges([refused] * 3)[Edge("A", "B")] == 0.125
    weights = trust_of_edges([refused] * 100)
    assert weights == {Edge("A", "B"): FLOOR, Edge("A", "C"): FLOOR}


def test_accepted_pushes_bring_trust_back_slowly_and_never_above_one() -> None:
    """0.5 x 1.25 x 1.25 x 1.25 = 0.98, a fourth one reaches 1; at the other receiver 0.9 x 1.05^3 = 1.04, so 1."""
    refused, accepted = round_of(("A", "B", False)), round_of(("A", "B", True))
    assert (REFUSED, REFUSED_ELSEWHERE, ACCEPTED, ACCEPTED_ELSEWHERE) == (0.5, 0.9, 1.25, 1.05)
    assert trust_of_edges([refused, accepted, accepted, accepted]) == {Edge("A", "B"): pytest.approx(0.9765625)}
    assert trust_of_edges([refused, *[accepted] * 4]) == {}


def test_trust_lost_at_the_floor_can_heal() -> None:
    refused, accepted = round_of(("A", "B", False)), round_of(("A", "B", True))
    assert trust_of_edges([*[refused] * 50, *[accepted] * 80]) == {}


def test_only_the_sender_is_distrusted_not_its_receiver() -> None:
    assert all(edge.sender == "A" for edge in trust_of_edges([round_of(("A", "B", False), ("B", "A", True))]))


def test_two_receivers_that_refuse_the_same_sender_add_up() -> None:
    """At B 0.5 for its own refusal and 0.9 for that of C; the same the other way round."""
    weights = trust_of_edges([round_of(("A", "B", False), ("A", "C", False))])
    assert weights == {Edge("A", "B"): pytest.approx(0.45), Edge("A", "C"): pytest.approx(0.45)}
