from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import cross_site_dice
from gcml_ray.records import CaseScore
from gcml_ray.report.cross_site import plot_cross_site, plot_cross_site_by_method
from tests.report_runs import make_run
from tests.unit.test_report_page import SECTIONS, charts_of, page_of


def row(owner: str, site: str, dice: float, *, case: str = "x", class_name: str = "a") -> CaseScore:
    return CaseScore(site, case, "test", owner, class_name, dice, math.nan, 0.5)


MATRIX = [row("A", "A", 0.8), row("A", "B", 0.5), row("B", "A", 0.75), row("B", "B", 0.6)]


def test_dice_is_averaged_over_cases_and_classes_then_over_seeds() -> None:
    """Seed 0: mean of 0.2, 0.4, 0.9 = 0.5; seed 1: 0.7; mean 0.6."""
    one = [row("A", "B", 0.2), row("A", "B", 0.4, class_name="b"), row("A", "B", 0.9, case="y")]
    assert cross_site_dice([one, [row("A", "B", 0.7)]]) == {("A", "B"): pytest.approx(0.6)}


def test_map_says_dice_and_how_much_better_than_the_sites_own_model(tmp_path: Path) -> None:
    """A's model at B: 0.5 against B's own 0.6 is -10 points; B's model at A: 0.75 against 0.8 is -5."""
    folder = RunFolder(tmp_path)
    folder.write_cross_site(MATRIX)
    axes = plot_cross_site(folder).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B"]
    assert {text.get_text() for text in axes.texts} == {"0.800", "0.600", "", "0.500", "(-10.0)", "0.750", "(-5.0)"}


def test_run_without_visits_has_no_map(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not scored across sites \(evaluation\.cross_site\)"):
        plot_cross_site(RunFolder(tmp_path))


def test_only_methods_that_were_scored_across_sites_get_a_map(tmp_path: Path) -> None:
    path = tmp_path / "c.png"
    assert not plot_cross_site_by_method({"local": [()]}, path)
    assert plot_cross_site_by_method({"local": [()], "gcml": [MATRIX, ()]}, path)
    assert path.stat().st_size > 5000


def test_models_at_other_sites_have_a_section_where_they_were_tested_there(tmp_path: Path) -> None:
    """A's model at B: 0.5 against B's own 0.6 is -10 points; B's at A: 0.85 against 0.8 is +5."""
    folder = make_run(tmp_path / "run")
    dice = {("A", "A"): 0.8, ("A", "B"): 0.5, ("B", "A"): 0.85, ("B", "B"): 0.6}
    folder.write_cross_site([
        CaseScore(site, "x", "test", owner, "a", value, 3.0, 0.5) for (owner, site), value in dice.items()
    ])  # fmt: skip
    page = page_of(folder)
    assert re.findall(r'<section id="(\w+)"', page) == [*SECTIONS[:6], "cross_site", *SECTIONS[6:]]
    assert "At A the model of B is 5.0 points above A&#39;s own." in page
    [chart] = [chart for chart in charts_of(folder.path / "report.html") if "at home" in json.dumps(chart)]
    cells = chart["data"][1]["text"]
    assert sorted(cells) == [
        "<b>0.500</b><br>-10.0", "<b>0.600</b><br>at home", "<b>0.800</b><br>at home", "<b>0.850</b><br>+5.0",
    ]  # fmt: skip
