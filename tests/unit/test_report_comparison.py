import math
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from gcml_ray.comparison.cells import summarise
from gcml_ray.report.comparison import (
    _look,
    _nearly_equal,
    _side_by_side,
    plot_dice_against_bytes,
    plot_dice_by_round,
    plot_site_dice,
)
from tests.made_up_run import made_up_round
from tests.unit.test_comparison import cell


def test_marks_of_one_place_stand_side_by_side_around_it() -> None:
    first, alone, second = _side_by_side([10.0, 1000.0, 10.0])
    assert alone == 1000.0
    assert first < 10.0 < second
    assert math.sqrt(first * second) == pytest.approx(10.0)  # the middle on a logarithmic axis
    assert second / first == pytest.approx(100**0.014)


def test_nearly_the_same_number_of_bytes_shares_a_place_and_a_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push more or less in a whole run would write one label over the other."""
    assert _nearly_equal([749.7, 374.9, 737.7, 1499.4, 743.3]) == [[1], [0, 2, 4], [3]]
    figures: list[Figure] = []
    monkeypatch.setattr("gcml_ray.report.comparison.save_figure", lambda figure, *_, **__: figures.append(figure))
    sent = {"none": 0, "half": 374_900_000, "one": 737_700_000, "other": 749_700_000, "tiny": 1_234_000}
    plot_dice_against_bytes(summarise([cell(name, 0, lift=0.0, sent=size) for name, size in sent.items()]), tmp_path)
    labels = [text.get_text() for text in figures[0].axes[0].get_xticklabels()]
    assert labels == ["0", "1.23", "375", "744"], "0: what sends nothing"


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


def test_a_method_has_one_look_in_all_three_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs come in another order than the table's."""
    figures: list[Figure] = []
    monkeypatch.setattr("gcml_ray.report.comparison.save_figure", lambda figure, *_, **__: figures.append(figure))
    rows = summarise([cell(method, 0, lift=lift) for method, lift in (("a", 0.0), ("b", 0.2), ("c", 0.1))])
    runs = {method: [[made_up_round(1, ("A", "B"))]] for method in ("c", "a")}
    plot_dice_against_bytes(rows, tmp_path)
    plot_site_dice(rows, tmp_path)
    plot_dice_by_round(runs, rows, tmp_path)
    against_bytes, by_site, by_round = map(looks_of, figures)
    assert against_bytes == by_site
    assert list(by_round) == ["c", "a"]
    assert by_round.items() <= by_site.items()


def looks_of(figure: Figure) -> dict[str, tuple[object, object]]:
    """Colour and marker by method, in the order of the legend."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles]
    return {name: (line.get_color(), line.get_marker()) for name, line in zip(names, lines, strict=True)}
