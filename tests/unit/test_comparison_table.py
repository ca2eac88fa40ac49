"""A comparison's rows as files and on a terminal."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from gcml_ray.comparison.cells import summarise
from gcml_ray.comparison.table import csv_text, latex, markdown
from gcml_ray.console.comparison_tables import method_tables, site_table
from gcml_ray.console.terminal import terminal
from tests.unit.test_comparison import cell


def shown(table: Table) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_terminal_tables_fit_120_columns_and_hold_what_the_files_hold() -> None:
    rows = summarise(
        [cell(name, seed, lift=0.05 * seed, sent=10**9) for name in ("local", "gossip_avg") for seed in (0, 1)]
    )
    (table,) = method_tables(rows, title="t", unit="voxel", console=Console(width=120))
    text = shown(table)
    assert "0.573 \u00b1 0.053" in text  # 0.535 and 0.535 + 0.05 * 1.5: mean 0.5725, sd 0.075 / sqrt(2) = 0.053
    assert "(voxel)" in text
    assert "1000.0" in text
    assert "\u2026" not in text
    assert [line.split("\u2502")[2:4] for line in shown(site_table(rows)).splitlines() if "local" in line] == [
        [" 0.550 ", " 0.595 "]
    ]


def test_tables_hold_the_same_rows() -> None:
    rows = summarise([cell("local", 0, lift=0.0), cell("gossip_avg", 0, lift=0.1, sent=2_500_000)])
    assert markdown(rows, unit="mm").splitlines()[2].startswith("| gossip_avg | 1 | 0.685 | - | best |  |  | 0.625 |")
    assert csv_text(rows, unit="mm").splitlines()[1].split(",")[-3:] == ["2.5", "10", "100"]
    assert r"gossip\_avg & 1 & 0.685" in latex(rows, unit="mm")
    assert r"HD95 (mm) & no HD95 & surface Dice" in latex(rows, unit="mm")
    odd = latex(summarise([cell(r"a_$b{c}^~\d", 0, lift=0.0)]), unit="mm")
    assert r"a\_\$b\{c\}\textasciicircum{}\textasciitilde{}\textbackslash{}d & 1" in odd


def test_cases_that_hd95_leaves_out_are_counted_beside_it() -> None:
    """One of two seeds predicts nothing in one case, whose distance would have been 80: 0.5 per seed."""
    whole, empty = cell("local", 0, lift=0.0), cell("local", 1, lift=0.0)
    far = replace(whole, scores=(replace(whole.scores[0], hd95=80.0), *whole.scores[1:]))
    given_up = replace(empty, scores=(replace(empty.scores[0], dice=0.0, hd95=math.nan), *empty.scores[1:]))
    assert [row.num_undefined for row in summarise([far, given_up])] == [0.5]
    (table,) = method_tables(summarise([far, given_up]), title="t", unit="mm", console=Console(width=120))
    assert "no" in shown(table).split()
    (table,) = method_tables(summarise([whole]), title="t", unit="mm", console=Console(width=120))
    assert "no" not in shown(table).split()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_number_is_cut_on_a_terminal(width: int) -> None:
    cells = [cell(name, seed, lift=0.05 * seed, sent=10**9) for name in ("local", "gossip_avg_ft") for seed in (0, 1)]
    console = Console(width=width, file=io.StringIO(), record=True)
    for table in method_tables(summarise(cells), title="t", unit="voxel", console=console):
        console.print(table)
    text = console.export_text()
    assert "\u2026" not in text
    for whole in ("gossip_avg_ft", "0.573 \u00b1 0.053", "1000.0", "0.900"):
        assert whole in text


def test_brackets_and_colons_in_names_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = summarise([cell("gcml [lambda 0.3] :x:", 0, lift=0.1), cell("a [/b]", 0, lift=0.0)])
    monkeypatch.setenv("COLUMNS", "200")
    console = terminal()
    with console.capture() as shown_text:
        for table in (*method_tables(rows, title="t [x]", unit="mm", console=console), site_table(rows)):
            console.print(table)
    text = shown_text.get()
    assert text.count("gcml [lambda 0.3] :x:") == text.count("a [/b]") == 2
    assert "t [x]" in text
