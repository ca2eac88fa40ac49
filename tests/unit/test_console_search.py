"""The live table of a search: what runs and what leads is in sight, whatever the terminal's size."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from gcml_ray.console.search import SearchConsole
from gcml_ray.search.records import SearchRecord, TrialPoint, TrialRecord

PARAMS = {f"method.dcml.weight{index}": 0.123456 for index in range(8)}


def shown(*, width: int, height: int) -> list[str]:
    """The lines of the table: trial 2 is the best of 30, trial 3 still runs, the others were cut."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, record=True)
    live = SearchConsole(console, search=SearchRecord("x", "mean_dice", 4, ()))
    for number in range(1, 31):
        status = {2: "finished", 3: "running"}.get(number, "cut")
        point = TrialPoint(4, {"A": 0.5}, 1.0, 1.0)
        live.trials[number] = TrialRecord(number, str(number), status, PARAMS, (point,))  # type: ignore[arg-type]
    console.print(live._live_table())
    return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (130, 24), (130, 12)])
def test_the_table_fits_and_shows_the_best_the_running_and_the_newest(width: int, height: int) -> None:
    lines = shown(width=width, height=height)
    rows = [line.split() for line in lines if "4/4" in line]
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    assert [row[1] for row in rows[:2]] == ["2", "3"]
    assert rows[-1][1] == "30"


def test_a_narrow_table_leaves_out_what_matters_least() -> None:
    narrow, wide = " ".join(shown(width=80, height=24)), " ".join(shown(width=130, height=24))
    assert ("worst Dice" in narrow, "worst Dice" in wide) == (False, True)
    assert "mean Dice" in narrow


def test_where_there_is_no_table_a_minute_of_silence_ends_with_the_round_of_what_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(file=io.StringIO(), width=200)
    live = SearchConsole(console, search=SearchRecord("x", "mean_dice", 4, ()))
    running = TrialRecord(3, "3", "running", PARAMS)
    live.on_trial(running)
    monkeypatch.setattr(live, "_told_at", live._told_at - 61)
    live.on_trial(replace(running, points=(TrialPoint(2, {"A": 0.5}, 1.0, 1.0),)))
    live.on_trial(replace(running, points=(TrialPoint(3, {"A": 0.5}, 1.0, 1.0),)))
    assert console.file.getvalue().splitlines()[1:] == ["trial 3 in round 2/4"]
