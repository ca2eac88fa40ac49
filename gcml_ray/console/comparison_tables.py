"""A comparison's rows as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gcml_ray.comparison.cells import MethodRow
from gcml_ray.comparison.table import cells, label
from gcml_ray.wording import number

MOST = 1000  # columns


def method_tables(rows: Sequence[MethodRow], *, title: str, unit: str, console: Console) -> tuple[Table, ...]:
    """For a terminal: each method over all sites; where it is narrow, what each costs in a table of its own."""
    lines = [cells(row, is_best=index == 0)[:7] for index, row in enumerate(rows)]
    spreads = ["" if math.isnan(row.dice_sd) else f" \u00b1 {line[3]}" for row, line in zip(rows, lines, strict=True)]
    scores = {
        "seeds": [line[1] for line in lines],
        "Dice \u00b1 sd": [line[2] + spread for line, spread in zip(lines, spreads, strict=True)],
        "against\nbest": [line[4] for line in lines],
        "95 %\ninterval": [line[5] for line in lines],
        "p\n(Holm)": [line[6] for line in lines],
    }
    undefined = {"no\nHD95": [number(row.num_undefined, 1) for row in rows]}
    costs = {
        f"HD95\n({unit})": [number(row.hd95, 1) for row in rows],
        **(undefined if any(row.num_undefined for row in rows) else {}),
        "surface\nDice": [number(row.surface_dice) for row in rows],
        "MB\nsent": [number(row.sent_bytes / 1e6, 1) for row in rows],
        "min": [number(row.seconds / 60, 1) for row in rows],
    }
    names = [line[0] for line in lines]
    whole = _table(title, names, scores | costs)
    needed = console.measure(whole, options=console.options.update_width(MOST)).maximum  # with room for all of it
    if needed <= console.width:
        return (whole,)
    return _table(title, names, scores), _table("", names, costs)


def _table(title: str, names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    """A line for each method, the first one in bold."""
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, line in enumerate(zip(names, *columns.values(), strict=True)):
        table.add_row(*line, style="bold" if index == 0 else None)
    return table


def site_table(rows: Sequence[MethodRow]) -> Table:
    """For a terminal: each method's test Dice at every site, the best of a site in bold."""
    table = Table(title="Test Dice by site", title_justify="left")
    table.add_column("method", no_wrap=True)
    sites = list(rows[0].site_dice)
    for site in sites:
        table.add_column(site, justify="right")
    best = {site: max(row.site_dice.get(site, math.nan) for row in rows) for site in sites}
    for row in rows:
        values = [row.site_dice.get(site, math.nan) for site in sites]
        marks = (
            Text(number(value), style="bold" if value == best[site] else "")
            for site, value in zip(sites, values, strict=True)
        )
        table.add_row(label(row), *marks)
    return table
