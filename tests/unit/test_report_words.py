"""What plots and pages say in the same words."""

from dataclasses import replace

import pytest

from gcml_ray.report.words import natural_order, points, validation_series
from tests.search_makers import record


def test_sites_are_in_the_order_of_their_numbers_then_names() -> None:
    assert natural_order(["west", "site10", "north", "site2"]) == ("north", "site2", "site10", "west")


@pytest.mark.parametrize(("value", "text"), [(0.0123, "+1.2"), (-0.00001, "+0.0"), (float("nan"), "-")])
def test_differences_are_dice_points(value: float, text: str) -> None:
    assert points(value) == text


def test_a_late_report_counts_for_the_round_in_which_its_site_was_late() -> None:
    """A was late in round 2: what it reports comes in round 3, in which it was validated as well, or was not."""
    first, second, third = (record(number, {"A": dice}) for number, dice in ((1, 0.5), (2, 0.8), (3, 0.6)))
    behind = replace(second, trained=(), late=("A",))
    both = replace(third, trained=(*second.trained, *third.trained))
    assert validation_series([first, behind, both], "A") == {1: 0.5, 2: 0.8, 3: 0.6}
    unscored = replace(third.trained[0], validation_dice=None)
    assert validation_series([first, behind, replace(both, trained=(*second.trained, unscored))], "A") == {
        1: 0.5,
        2: 0.8,
    }


def test_without_a_barrier_a_score_stands_at_its_record() -> None:
    behind = record(4, {"A": 0.7})
    assert validation_series([replace(behind, trained=record(2, {"A": 0.7}).trained)], "A") == {4: 0.7}
