"""A CSV table with one line a case to a list of cases."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from gcml_ray.data.adapters.findings import read_rows
from gcml_ray.data.datalist import (
    SPLITS,
    Case,
    duplicate_problems,
    is_among,
    listed,
    name_from_file,
    name_problem,
    shared_image_problems,
)
from gcml_ray.errors import DataError
from gcml_ray.files.site_names import site_name_problem
from gcml_ray.records import Split

CASE, SPLIT = "case", "split"  # columns that need not be there
RULE = re.compile(r"\s*value\s*>\s*(-?\d+(?:\.\d+)?)\s*")


@dataclass(frozen=True)
class _Columns:
    """Which column holds what, and the folder that paths start from."""

    site: str
    case: str
    images: tuple[str, ...]
    label: str
    rule: str | None
    root: Path


def prepare_manifest(
    csv_path: str | Path,
    *,
    image_columns: Sequence[str],
    label_column: str,
    site_column: str = "site",
    case_column: str | None = None,
    label_rule_column: str | None = None,
    root: str | Path | None = None,
) -> tuple[Case, ...]:
    """Read a manifest. A column ``split`` (train, validation, test or empty) is used where there is one.

    Args:
        csv_path: the table, with a header line.
        image_columns: path columns; several are the channels, in this order.
        label_column: path column of the label.
        site_column: column of the site's name.
        case_column: column of the case's name; by default ``case``, and where there is none the label's file name.
        label_rule_column: column with rules such as ``value>127`` that make a mask of a grey label; an empty
            cell means that the label holds class values.
        root: folder that relative paths start from; the table's own folder by default.

    Raises:
        DataError: columns are missing, or lines are wrong; names all of them by their line number.
    """
    path = Path(os.path.abspath(csv_path))
    folder = path.parent if root is None else Path(os.path.abspath(root))
    columns = _Columns(site_column, case_column or CASE, tuple(image_columns), label_column, label_rule_column, folder)
    problems: list[str] = []
    cases: dict[str, Case] = {}
    paths: list[Path] = []
    named = [column for column in (case_column, label_rule_column) if column is not None]
    wanted = [site_column, *image_columns, label_column, *named]
    remedy = "; name yours with --site, --image and --label"
    for number, line in read_rows(path, wanted, optional=(CASE, SPLIT), remedy=remedy):
        wrong = _line_problems(line, columns)
        paths += [folder / line[column] for column in (*image_columns, label_column) if line[column]]
        problems += [f"line {number}: {problem}" for problem in wrong]
        if not wrong:
            cases[f"line {number}"] = _case(line, columns)
    if paths and not any(each.is_file() for each in paths):
        raise DataError(
            f"{path}: none of its {len(paths)} files exists, {paths[0]} for example; relative paths start from "
            f"{folder}: give another folder with --root"
        )
    problems += duplicate_problems(cases) + shared_image_problems(cases.values())
    if problems:
        raise DataError(f"{path}: {len(problems)} problem(s) in the manifest:{listed(problems)}")
    return tuple(cases.values())


def _line_problems(line: dict[str, str], columns: _Columns) -> list[str]:
    site = line[columns.site]
    problems = [name_problem(columns.site, site) or site_name_problem(site)]
    if line.get(columns.case):
        problems.append(name_problem(columns.case, line[columns.case]))
    for column in (*columns.images, columns.label):
        if not line[column]:
            problems.append(f"{column} is empty")
        elif not (columns.root / line[column]).is_file():
            problems.append(f"{column}: no such file {columns.root / line[column]}")
    if line[columns.label] and is_among(line[columns.label], (line[column] for column in columns.images)):
        problems.append(f"its image and its label are one file, {line[columns.label]}")
    if line[SPLIT] and line[SPLIT] not in SPLITS:
        problems.append(f"split is {line[SPLIT]!r}; allowed are {', '.join(SPLITS)} or nothing")
    if columns.rule and line[columns.rule] and not RULE.fullmatch(line[columns.rule]):
        problems.append(f"{columns.rule} is {line[columns.rule]!r}; a rule looks like value>127")
    return [problem for problem in problems if problem is not None]


def _case(line: dict[str, str], columns: _Columns) -> Case:
    rule = RULE.fullmatch(line[columns.rule]) if columns.rule else None
    return Case(
        site=line[columns.site],
        name=line.get(columns.case) or name_from_file(line[columns.label]),
        images=tuple(os.path.abspath(columns.root / line[column]) for column in columns.images),
        label=os.path.abspath(columns.root / line[columns.label]),
        split=cast(Split, line[SPLIT]) if line[SPLIT] else None,
        label_threshold=float(rule.group(1)) if rule else None,
    )
