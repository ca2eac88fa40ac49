"""What mattered in a search, in numbers and words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gcml_ray.search.effects import compared_round, describe, effects
from gcml_ray.search.records import SearchRecord, TrialPoint, TrialRecord


def search_of(values: list[tuple[object, float]], **record: object) -> SearchRecord:
    """A trial for each value of ``merge`` and its Dice in round 2; those of an odd number go on to round 4."""
    trials = []
    for number, (value, dice) in enumerate(values, start=1):
        rounds = (2, 4) if number % 2 else (2,)
        points = tuple(TrialPoint(place, {"A": dice if place == 2 else 0.99}, 0.0, 1.0) for place in rounds)
        trials.append(TrialRecord(number, f"t{number}", "finished", {"method.merge": value}, points))
    return SearchRecord("x", "mean_dice", 4, tuple(trials), **record)  # type: ignore[arg-type]


def test_groups_are_compared_at_the_round_that_all_trials_reached() -> None:
    """Means 0.65 and 0.45, each of two trials 0.1 apart: sd sqrt(2 x 0.05^2) = 0.0707 in both."""
    (effect,) = effects(search_of([("a", 0.6), ("b", 0.4), ("a", 0.7), ("b", 0.5)]))
    assert [(group.name, group.num_trials) for group in effect.groups] == [("a", 2), ("b", 2)]
    assert [group.mean for group in effect.groups] == pytest.approx([0.65, 0.45])
    assert effect.difference == pytest.approx(0.2)
    assert effect.spread == pytest.approx(0.0707, abs=1e-4)


@pytest.mark.parametrize("status", ["failed", "stopped", "running"])
def test_a_trial_that_did_not_get_far_decides_nothing(status: str) -> None:
    search = search_of([("a", 0.6), ("b", 0.4), ("a", 0.7), ("b", 0.5)])
    short = TrialRecord(5, "t5", status, {"method.merge": "a"}, (TrialPoint(1, {"A": 0.1}, 0.0, 1.0),))  # type: ignore[arg-type]
    more = replace(search, trials=(*search.trials, short))
    assert compared_round(more) == compared_round(search) == 2
    assert effects(more) == effects(search)


def test_many_numbers_are_split_at_their_median() -> None:
    """0.1 to 0.6: the median is 0.35."""
    (effect,) = effects(search_of([(number / 10, number / 10) for number in range(1, 7)]))
    assert [(group.name, group.num_trials) for group in effect.groups] == [("0.35 or more", 3), ("below 0.35", 3)]


def test_a_difference_within_the_spread_may_be_chance() -> None:
    clear = search_of([("a", 0.60), ("b", 0.40), ("a", 0.62), ("b", 0.42)], importances={"method.merge": 1.0})
    unclear = search_of([("a", 0.60), ("b", 0.40), ("a", 0.40), ("b", 0.58)])
    (first,), (second,) = effects(clear), effects(unclear)
    assert describe(first) == (
        "method.merge explains 100 % of the differences; a gave 0.610 on average, b 0.410 "
        "(+0.200, with a spread between trials of 0.014)."
    )
    assert describe(second).endswith("chance could explain it.")


def test_three_trials_show_no_effect() -> None:
    assert effects(search_of([("a", 0.6), ("b", 0.4), ("a", 0.7)])) == ()
