"""The soak's bookkeeping: which faults come, and what is made of what came of them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import chaos_faults, chaos_table
from benchmarks.chaos_table import Episode
from gcml_ray.chaos import parse_chaos

KINDS = (*chaos_faults.BY_CHAOS, *chaos_faults.OUTSIDE)


def episode(number: int, faults: str, **changes: object) -> Episode:
    values = {"problem": "", "lost_rounds": 0, "rounds_missed": 1, "dice_change": 0.001, "seconds": 30.0} | changes
    return Episode(number, faults, **values)  # type: ignore[arg-type]


def test_every_kind_comes_once_before_any_comes_twice() -> None:
    """17 kinds in hands of two: nine runs."""
    drawn = [fault for number in range(9) for fault in chaos_faults.draw_faults(5, number, kinds=KINDS, rounds=10)]
    assert Counter(fault.kind for fault in drawn) == Counter(KINDS)
    assert all(2 <= fault.round_number <= 6 for fault in drawn)


def test_an_episode_is_a_function_of_seed_and_number() -> None:
    first, again, other = (chaos_faults.draw_faults(seed, 4, kinds=KINDS, rounds=10) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("kind", chaos_faults.BY_CHAOS)
def test_faults_of_chaos_are_in_its_grammar(kind: str) -> None:
    (fault,) = parse_chaos(chaos_faults.Fault(kind, "north", 3, 0.5).chaos)
    assert (fault.kind, fault.site, fault.first_round) == (kind, "north", 3)


def test_episodes_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [episode(0, "kill north@r3 + driver@r2", lost_rounds=1), episode(1, "full_disk@r4", problem="a, b\nc")]
    for row in rows:
        chaos_table.append(tmp_path / "results" / "soak.csv", row)
    assert chaos_table.read(tmp_path / "results" / "soak.csv") == rows
    assert [row.kinds for row in rows] == [("kill", "driver"), ("full_disk",)]


def test_table_counts_a_run_that_failed_against_each_of_its_faults() -> None:
    rows = [
        episode(0, "kill north@r3 + driver@r2", lost_rounds=1, seconds=20.0, dice_change=-0.002),
        episode(1, "kill west@r3", problem="hangs", seconds=40.0, dice_change=math.nan),
        episode(2, "kill east@r3", problem=f"{chaos_table.FELL} 1.2 points", seconds=30.0, dice_change=-0.012),
    ]
    lines = chaos_table.table(rows).splitlines()
    assert "| kill | 3 | 2 | 1 | 1 | 30 |" in lines
    assert "| driver | 1 | 1 | 1 | 1 | 20 |" in lines
    words = "2 of 3 runs were whole at the end, 1 of them with the spared sites' Dice within a point; "
    assert f"{words}finished rounds lost to a killed driver: at most 1." in lines
    assert "-0.70 points on average, from -1.20 to -0.20." in lines[-3]
    assert lines[-2] == "- run 1 (kill west@r3): hangs"


def test_table_goes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- soak -->\nold\n<!-- /soak -->\nafter <!-- other -->\n")
    for _ in range(2):
        chaos_table.write_into_page(page, "soak", "new \\1")
    assert page.read_text() == "before\n<!-- soak -->\n\nnew \\1\n\n<!-- /soak -->\nafter <!-- other -->\n"
    with pytest.raises(ValueError, match="has no <!-- missing -->"):
        chaos_table.write_into_page(page, "missing", "x")


def test_only_a_small_disk_of_its_own_is_ever_filled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a tmpfs"):
        chaos_faults.fill(tmp_path)
    assert not list(tmp_path.iterdir())
