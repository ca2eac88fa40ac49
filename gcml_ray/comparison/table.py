"""A comparison's rows as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from gcml_ray.comparison.cells import MethodRow
from gcml_ray.records import PERSONALISED
from gcml_ray.wording import number, probability

_LATEX = str.maketrans(
    {character: "\\" + character for character in "%_&#${}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)


def label(row: MethodRow) -> str:
    """The method's name, with the evaluated model where it is not the personalised one."""
    return row.method if row.model == PERSONALISED else f"{row.method} ({row.model})"


def headings(rows: Sequence[MethodRow], *, unit: str) -> list[str]:
    """Column headings; one Dice column a site."""
    sites = [f"Dice {site}" for site in rows[0].site_dice]
    return [
        "method", "seeds", "Dice", "sd", "against best", "95 % interval", "p (Holm)", *sites,
        f"HD95 ({unit})", "no HD95", "surface Dice", "MB sent", "seconds", "steps",
    ]  # fmt: skip


def cells(row: MethodRow, *, is_best: bool) -> list[str]:
    """A row as text."""
    against = ["best", "", ""]
    if math.isnan(row.difference):
        against = ["nothing in common", "", ""]
    elif not is_best:
        interval = "-" if math.isnan(row.low) else f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
        against = [f"{100 * row.difference:+.1f}", interval, probability(row.p_value)]
    return [
        label(row), str(row.num_seeds), number(row.dice), number(row.dice_sd), *against,
        *(number(dice) for dice in row.site_dice.values()),
        number(row.hd95, 1), number(row.num_undefined, 1), number(row.surface_dice), number(row.sent_bytes / 1e6, 1),
        number(row.seconds, 0), number(row.num_steps, 0),
    ]  # fmt: skip


def markdown(rows: Sequence[MethodRow], *, unit: str) -> str:
    """The table for a README."""
    head = headings(rows, unit=unit)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [cells(row, is_best=index == 0) for index, row in enumerate(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(rows: Sequence[MethodRow], *, unit: str) -> str:
    """The table for a spreadsheet."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings(rows, unit=unit))
    writer.writerows(cells(row, is_best=index == 0) for index, row in enumerate(rows))
    return buffer.getvalue()


def latex(rows: Sequence[MethodRow], *, unit: str) -> str:
    """The table for a paper (booktabs)."""
    head = headings(rows, unit=unit)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(_escape(text) for text in head) + r" \\",
        r"\midrule",
    ]
    lines += [
        " & ".join(_escape(text) for text in cells(row, is_best=index == 0)) + r" \\" for index, row in enumerate(rows)
    ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escape(text: str) -> str:
    """Text whose characters mean themselves in LaTeX."""
    return text.translate(_LATEX)
