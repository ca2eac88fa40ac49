"""The page about a search: everything a reader asks for, from the folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcml_ray.errors import CheckpointError
from gcml_ray.files.record_json import to_json
from gcml_ray.report.page.search import search_page
from gcml_ray.report.page.search_charts import _number_scale, objective_by_trial, parallel_coordinates
from gcml_ray.report.page.write import write_report
from gcml_ray.search.folder import read_search_record, write_search_record
from gcml_ray.search.records import (
    FinalRecord,
    FinalScore,
    SearchRecord,
    TrialPoint,
    TrialRecord,
    describe_params,
    short_names,
)

OWN = {"method.dcml.lambda": 0.1, "method.merge": "keep_local"}


def search_in(folder: Path, *, is_finished: bool = True) -> Path:
    """Five trials: the first has the federation's own values, one is cut, one fails."""
    lambdas = (0.1, 0.01, 0.5, 0.2, 0.3)
    trials = []
    for number, weight in enumerate(lambdas, start=1):
        rounds = (1, 2) if number == 2 or not is_finished else (1, 2, 3, 4)
        points = tuple(TrialPoint(r, {"A": weight * r / 4, "B": weight * r / 4}, float(r), 1.0) for r in rounds)
        status = "cut" if len(rounds) == 2 else "finished"
        params = {"method.dcml.lambda": weight, "method.merge": "keep_local" if number % 2 else "select_best"}
        trials.append(TrialRecord(number, f"t{number}", status, params, points))  # type: ignore[arg-type]
    trials.append(TrialRecord(6, "t6", "failed", OWN | {"method.dcml.lambda": 0.7}, reason="<b>tau</b> is wrong"))
    (folder / "records").mkdir(parents=True)
    for trial in trials:
        (folder / "records" / f"{trial.trial_id}.json").write_text(to_json(trial))
    shares = {"method.dcml.lambda": 0.8, "method.merge": 0.2}
    write_search_record(SearchRecord("demo", "mean_dice", 4, tuple(trials), shares, OWN), folder)
    return folder


def test_the_page_says_what_won_and_what_mattered_and_shows_every_trial(tmp_path: Path) -> None:
    """The best is trial 3 with 0.5, the own values reached 0.1."""
    text = write_report(search_in(tmp_path / "search")).read_text()
    assert "Best is trial 3: lambda=0.5, merge=keep_local" in text
    assert "+0.400 against the federation&#39;s own values (trial 1)" in text
    assert "gcml tune --final" in text
    assert "method.dcml.lambda explains 80 % of the differences" in text
    assert "&lt;b&gt;tau&lt;/b&gt; is wrong" in text
    sections = {section.name: section for section in search_page(tmp_path / "search").sections}
    assert list(sections) == ["summary", "mattered", "trials", "curves", "traffic"]
    assert [block.kind for block in sections["trials"].blocks] == ["chart", "chart", "table", "words"]


def test_the_page_tells_of_the_test_where_there_was_one(tmp_path: Path) -> None:
    folder = search_in(tmp_path / "search")
    scores = [tuple(FinalScore(seed, {"A": dice + seed / 100}) for seed in (1, 2, 3)) for dice in (0.7, 0.5)]
    (folder / "final.json").write_text(to_json(FinalRecord("demo", "id", scores[0], scores[1])))
    sections = {section.name: section for section in search_page(folder).sections}
    assert "beats the federation's own values by more than the spread" in str(sections["final"].blocks)
    assert "0.720 ± 0.010" in str(sections["final"].blocks)
    assert "--final" not in str(sections["summary"].blocks)


def test_a_search_without_a_finished_trial_has_a_page_too(tmp_path: Path) -> None:
    folder = search_in(tmp_path / "search", is_finished=False)
    assert "No trial has finished" in str(search_page(folder).sections[0].blocks)
    write_search_record(SearchRecord("empty", "mean_dice", 4, ()), tmp_path)
    assert [section.name for section in search_page(tmp_path).sections] == ["summary"]


def test_parallel_coordinates_place_numbers_by_logarithm_and_names_side_by_side(tmp_path: Path) -> None:
    """0.01 to 0.5 is more than a decade; 0.1 lies at log(10) / log(50) = 0.589."""
    chart = parallel_coordinates(read_search_record(search_in(tmp_path / "search")))
    assert chart is not None
    own = next(line for line in chart.figure.data if "trial 1<" in line.text[0])
    assert list(own.y) == ["lambda", "merge", "objective"]
    assert list(own.x)[:2] == pytest.approx([0.589, 0.0], abs=1e-3)


def test_keys_go_by_their_shortest_ends_that_differ() -> None:
    keys = ["optimiser.name", "network.name", "method.dcml.lambda", "name"]
    assert list(short_names(keys).values()) == ["optimiser.name", "network.name", "lambda", "name"]
    assert describe_params({"optimiser.name": "sgd", "network.name": "unet"}) == (
        "network.name=unet, optimiser.name=sgd"
    )


def test_trials_are_counted_in_whole_numbers(tmp_path: Path) -> None:
    axis = objective_by_trial(read_search_record(search_in(tmp_path / "search"))).figure.layout.xaxis
    assert (axis.dtick, axis.range) == (1, (0, 6))


def test_ends_of_a_scale_that_are_close_have_digits_that_tell_them_apart() -> None:
    """In three digits both would be 0.057."""
    scale = _number_scale("objective", [0.05696, 0.05704], is_log=False)
    assert scale.ticks == ((0.0, "0.05696"), (1.0, "0.05704"))
    assert _number_scale("lambda", [0.1, 0.5], is_log=False).ticks == ((0.0, "0.1"), (1.0, "0.5"))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = search_in(tmp_path / "search")
    (folder / "records" / "t3.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"records/t3\.json cannot be read .*bring it back"):
        search_page(folder)
    (folder / "records" / "t3.json").unlink()
    (folder / "final.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"final\.json cannot be read"):
        search_page(folder)
