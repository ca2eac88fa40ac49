"""The page about a comparison."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gcml_ray.comparison.cells import Cell, mean_interval, summarise, write_cell
from gcml_ray.errors import DataError
from gcml_ray.files.record_json import to_json
from gcml_ray.records import CaseScore
from gcml_ray.report.page.comparison import comparison_page, read_runs
from gcml_ray.report.page.comparison_charts import dice_against_bytes, gains_by_site, mean_dice_by_round
from gcml_ray.report.page.parts import Table
from gcml_ray.report.page.records import read_run
from gcml_ray.report.page.write import write_report
from tests.report_runs import make_run, without_pushes


def make_comparison(path: Path) -> Path:
    """Two methods, two seeds; the second seed of ``local`` is not tested yet."""
    for method, changes in {"gcml": {}, "local": {"method": {"name": "local"}}}.items():
        for seed in (0, 1):
            federation = {"rounds": 4, "local_steps": 20, "seed": seed}
            folder = make_run(path / f"{method}_seed{seed}", rounds=4, name=method, federation=federation, **changes)
            if method == "local":
                without_pushes(folder)
                better = [replace(s, dice=s.dice - 0.1) for s in folder.cases() if s.model == "personalised"]
                folder.write_cases(better)
    (path / "local_seed1" / "cases.csv").unlink()
    return path


def test_comparison_ranks_methods_and_names_what_is_missing(tmp_path: Path) -> None:
    page = write_report(make_comparison(tmp_path / "runs"), with_regions=False).read_text(encoding="utf-8")
    assert "gcml has the highest mean Dice" in page
    assert "local: " in page
    assert "-10.0 Dice points against gcml" in page
    assert "Not tested yet, and so not in the tables: local (seed 1)" in page


def test_a_cell_whose_site_missed_many_rounds_is_named_and_left_out(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "runs")
    records = read_run(folder / "gcml_seed0").rounds
    file = folder / "gcml_seed0" / "rounds.jsonl"
    file.write_text("".join(to_json(replace(each, trained=each.trained[1:])) + "\n" for each in records))
    page = comparison_page(folder, read_runs(folder), (), with_images=False, with_regions=False)
    missing = records[0].plan.sites[0]
    assert page.notices[0].startswith(f"gcml, seed 0: {missing} missed 4 of 4 rounds")
    assert page.notices[0].endswith("left out of the tables, as by gcml compare.")
    table = next(block for section in page.sections for block in section.blocks if isinstance(block, Table))
    assert {row[0]: row[1] for row in table.rows} == {"gcml": "1", "local": "1"}


def test_runs_without_a_common_case_are_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one", ("A", "B"), rounds=2)
    make_run(tmp_path / "runs" / "other", ("C", "D"), rounds=2)
    with pytest.raises(DataError, match="have no test case in common"):
        write_report(tmp_path / "runs", with_regions=False)


def test_comparison_shows_the_settings_that_differ_and_no_others(tmp_path: Path) -> None:
    page = write_report(make_comparison(tmp_path / "runs"), with_regions=False).read_text(encoding="utf-8")
    config = page[page.index('<section id="config"') :]
    rows = re.findall(r'<th scope="row" class="name">([^<]*)</th>', config[: config.index("<details>")])
    assert "method.name" in rows
    assert all(row.startswith("method.") for row in rows)


def test_folder_of_finished_cells_has_a_page_without_rounds(tmp_path: Path) -> None:
    for method, dice in (("gcml", 0.8), ("local", 0.7)):
        scores = tuple(CaseScore("A", str(case), "test", "personalised", "x", dice, 1.0, 0.9) for case in range(3))
        write_cell(tmp_path / f"{method}_seed0.csv", Cell(method, 0, "id", 1_000_000, 5.0, 10, scores))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == ["summary", "methods", "sites", "cases"]


def test_runs_with_other_test_cases_are_marked(tmp_path: Path) -> None:
    for method, case in (("gcml", "1"), ("local", "2")):
        score = CaseScore("A", case, "test", "personalised", "x", 0.5, 1.0, 0.9)
        shared = CaseScore("A", "0", "test", "personalised", "x", 0.5, 1.0, 0.9)
        write_cell(tmp_path / f"{method}_seed0.csv", Cell(method, 0, "id", 0, 5.0, 10, (shared, score)))
    assert "not all tested on the same cases" in write_report(tmp_path).read_text(encoding="utf-8")


def cell_with(method: str, num_cases: dict[str, int], lift: float) -> Cell:
    scores = tuple(
        CaseScore(site, str(case), "test", "personalised", "x", 0.5 + lift * (1 + case % 2), 1.0, 0.9)
        for site, count in num_cases.items()
        for case in range(count)
    )
    return Cell(method, 0, "id", 0, 5.0, 10, scores)


def test_summary_names_the_rows_next_to_the_best_and_counts_the_others(tmp_path: Path) -> None:
    for index in range(12):
        write_cell(tmp_path / f"m{index:02d}_seed0.csv", cell_with(f"m{index:02d}", {"A": 8}, 0.2 - 0.01 * index))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    summary = page[page.index('<section id="summary"') : page.index('<section id="methods"')]
    assert "m08: 0.680, -12.0 Dice points against m00" in summary  # 0.5 + 0.12 x 1.5, and 0.5 + 0.2 x 1.5
    assert "m09" not in summary
    assert "3 more rows, further behind" in summary


def test_summary_says_where_two_methods_have_no_seed_in_common(tmp_path: Path) -> None:
    cells = {"gcml": cell_with("gcml", {"A": 8}, 0.1), "local": replace(cell_with("local", {"A": 8}, 0.0), seed=1)}
    for method, cell in cells.items():
        write_cell(tmp_path / f"{method}_seed{cell.seed}.csv", cell)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "local: 0.500, not to be compared with gcml: they have no seed in common." in page


def test_in_a_folder_of_cells_pooled_training_is_known_by_its_name(tmp_path: Path) -> None:
    for method, lift in (("pooled_long", 0.2), ("gcml", 0.1), ("local", 0.0), ("spooled", 0.05)):
        write_cell(tmp_path / f"{method}_seed0.csv", cell_with(method, {"A": 8}, lift))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "gcml has the highest mean Dice of all methods that a federation can use" in page
    assert "pooled_long: 0.800, +15.0 Dice points against gcml" in page


def test_site_with_too_few_cases_is_grey_and_has_no_interval() -> None:
    """Six cases are enough, five are not; the rows keep the order of the sites."""
    num_cases = {"A": 5, "B": 6, "C": 2}
    cells = [cell_with("gcml", num_cases, 0.1), cell_with("local", num_cases, 0.0)]
    chart = gains_by_site(cells, method="gcml", alone="local")
    assert chart is not None
    told, untold = chart.figure.data
    assert (told.y, untold.y) == (("B",), ("A", "C"))
    low, high = mean_interval([np.array([0.1, 0.2] * 3)])  # that of the verdict in words
    assert told.error_x.array == pytest.approx([100 * high - 15])
    assert told.error_x.arrayminus == pytest.approx([15 - 100 * low])
    assert untold.error_x.array is None
    assert untold.marker.symbol == "diamond-open"
    assert chart.figure.layout.yaxis.categoryarray == ("A", "B", "C")
    assert "C +15.0, too few cases to tell" in chart.alternative


def test_method_has_one_look_against_traffic_and_by_round(tmp_path: Path) -> None:
    """The folders are in another order than the table: alpha is worse and comes first."""
    rows = summarise([cell_with("alpha", {"A": 2}, 0.0), cell_with("beta", {"A": 2}, 0.1)])
    run = read_run(make_run(tmp_path / "run", rounds=4).path)
    by_round = mean_dice_by_round({"alpha": [run], "beta": [run]}, rows)
    assert by_round is not None
    marks = {trace.name: trace.marker.color for trace in dice_against_bytes(rows).figure.data}
    assert {trace.name: trace.line.color for trace in by_round.figure.data} == marks
    assert [trace.name for trace in by_round.figure.data] == ["beta", "alpha"]


def test_no_password_is_among_the_settings_in_which_methods_differ(tmp_path: Path) -> None:
    for method in ("gcml", "local"):
        tracking = {"uri": f"http://{method}:pa55@far:1"}
        make_run(tmp_path / "runs" / method, rounds=2, name=method, tracking=tracking)
    page = write_report(tmp_path / "runs", with_regions=False).read_text(encoding="utf-8")
    assert "pa55" not in page
