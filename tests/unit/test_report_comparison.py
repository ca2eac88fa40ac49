import math
from itertools import combinations
from pathlib import Path

import pytest

from gcml_ray.comparison.cells import summarise
from gcml_ray.report.comparison import _look, _side_by_side, plot_dice_against_bytes
from tests.unit.test_comparison import cell


def test_marks_of_one_place_stand_side_by_side_around_it() -> None:
    first, alone, second = _side_by_side([10.0, 1000.0, 10.0])
    assert alone == 1000.0
    assert first < 10.0 < second
    assert math.sqrt(first * second) == pytest.approx(10.0)  # the middle on a logarithmic axis
    assert second / first == pytest.approx(100**0.014)


def test_marks_are_told_apart_where_all_methods_send_the_same() -> None:
    places = _side_by_side([42.9] * 9)
    assert len(set(places)) == 9
    assert max(places) < 2 * min(places)


def test_fifty_six_rows_have_looks_of_their_own() -> None:
    assert all(_look(first) != _look(second) for first, second in combinations(range(56), 2))


def test_picture_grows_with_the_number_of_methods(tmp_path: Path) -> None:
    cells = [cell(f"method_{index}", 0, lift=0.01 * index, sent=1000 * (index % 3)) for index in range(40)]
    plot_dice_against_bytes(summarise(cells[:3]), tmp_path / "few.png")
    plot_dice_against_bytes(summarise(cells), tmp_path / "many.png")
    few, many = (int.from_bytes((tmp_path / name).read_bytes()[20:24], "big") for name in ("few.png", "many.png"))
    assert (few, many) == (720, 1320)  # 4.8 inches; 40 rows x 0.21 + 0.4; at 150 dots per inch
