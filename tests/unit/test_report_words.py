"""What plots and pages say in the same words."""

import pytest

from gcml_ray.report.words import natural_order, points


def test_sites_are_in_the_order_of_their_numbers_then_names() -> None:
    assert natural_order(["west", "site10", "north", "site2"]) == ("north", "site2", "site10", "west")


@pytest.mark.parametrize(("value", "text"), [(0.0123, "+1.2"), (-0.00001, "+0.0"), (float("nan"), "-")])
def test_differences_are_dice_points(value: float, text: str) -> None:
    assert points(value) == text
