"""What is wrong with a data set: collected case by case, reported together; and the checks of a case's files."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gcml_ray.data.case_checks import without_alpha
from gcml_ray.data.datalist import Case, listed
from gcml_ray.data.one_grid import on_one_grid, shift_mm, turned_header
from gcml_ray.data.reading import Header, affine_problem, read_header, read_volume, values_text
from gcml_ray.errors import DataError

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (cases done, cases in all)

SEPARATORS = ",;\t"  # of a table's cells


@dataclass
class Findings:
    """Problems of single cases and of the set as a whole, in the order in which they were found."""

    source: Path
    general: list[str] = field(default_factory=list)
    by_case: dict[str, list[str]] = field(default_factory=dict)

    def about(self, case: str, problems: Iterable[str]) -> None:
        """Adds problems of one case."""
        for problem in problems:
            self.by_case.setdefault(case, []).append(problem)

    def sound(self, cases: Sequence[Case], *, skip_faulty: bool) -> tuple[Case, ...]:
        """The cases that nothing is wrong with.

        Args:
            cases: all that were found.
            skip_faulty: leave out the others with a warning each, instead of raising.

        Raises:
            DataError: something is wrong and may not be left out, or no case remains; lists all problems.
        """
        problems = self.general + [f"case {case}: {each}" for case, those in self.by_case.items() for each in those]
        sound = tuple(case for case in cases if case.name not in self.by_case)
        if problems and not (skip_faulty and sound):
            advice = "" if skip_faulty else "\nMend them, or leave these cases out with --skip-faulty."
            raise DataError(f"{self.source}: {len(problems)} problem(s):{listed(problems)}{advice}")
        for problem in problems:
            log.warning("left out: %s", problem)
        if not sound:
            raise DataError(f"{self.source}: no case was found")
        return sound


def check_cases(
    cases: Sequence[Case],
    findings: Findings,
    *,
    channels: Sequence[str],
    label_values: Collection[int],
    spatial_dims: int = 3,
    progress: Progress | None = None,
) -> None:
    """Looks at every file of every case: is it there, on one grid, with the label values that are allowed."""
    for done, case in enumerate(cases, start=1):
        roles = channels if len(case.images) == len(channels) else ("picture",)  # RGB: one file, three channels
        files = dict(zip((*roles, "label"), map(Path, (*case.images, case.label)), strict=True))
        findings.about(case.name, grid_problems_of_files(files, spatial_dims=spatial_dims))
        findings.about(case.name, label_problems_of_file(files["label"], label_values, spatial_dims=spatial_dims))
        if progress is not None:
            progress(done, len(cases))


def grid_problems_of_files(files: Mapping[str, Path], *, spatial_dims: int = 3) -> list[str]:
    """What the headers of a case's files show to be wrong.

    Missing and unreadable files, affines that place nothing, and files that do not lie on the grid of the first.
    """
    headers: dict[str, Header] = {}
    problems: list[str] = []
    for role, path in files.items():
        if not path.is_file():
            problems.append(f"{role} is missing: no file {path}")
            continue
        try:
            headers[role] = read_header(str(path), spatial_dims=spatial_dims)
        except DataError as error:
            problems.append(str(error))
            continue
        problem = affine_problem(str(path), headers[role].affine, spatial_dims=spatial_dims)
        problems += [] if problem is None else [problem]
    roles = list(headers)
    for role in roles[1:]:
        problem = _grid_difference(headers[roles[0]], headers[role])
        if problem:
            problems.append(f"{role} ({files[role].name}) {problem} {roles[0]} ({files[roles[0]].name})")
    return problems


def _grid_difference(first: Header, other: Header) -> str | None:
    """How the second grid, turned where its axes are stored otherwise, differs from the first one, or None."""
    other = turned_header(other, first)
    if other.shape[1:] != first.shape[1:]:
        return f"has the shape {other.shape[1:]}, not {first.shape[1:]} as"
    if on_one_grid(first, other):
        return None
    return f"has another affine (off by up to {shift_mm(first, other):.3g} mm) than"


def label_problems_of_file(path: Path, allowed: Collection[int], *, spatial_dims: int = 3) -> list[str]:
    """Values of a label file that mean nothing; an empty label only gives a warning."""
    if not path.is_file():
        return []
    try:
        label = read_volume(str(path), spatial_dims=spatial_dims, role="label").array
    except DataError as error:
        return [str(error)]
    label = without_alpha(label, str(path))
    known = torch.zeros(label.shape, dtype=torch.bool)
    for value in allowed:
        known |= label == value
    foreign = torch.unique(label[~known]).tolist()
    if not foreign and not label.any():
        log.warning("label %s is empty: nothing is marked", path)
    if not foreign:
        return []
    return [f"label {path.name} holds the values {values_text(foreign)}; known are {_numbers(allowed)}"]


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def find_nifti(folder: Path, stem: str, problems: list[str]) -> Path:
    """``<stem>.nii.gz`` or ``<stem>.nii`` in a folder, whether it exists or not; both together are a problem."""
    packed, plain = folder / f"{stem}.nii.gz", folder / f"{stem}.nii"
    if packed.is_file() and plain.is_file():
        problems.append(f"{stem} is there twice, as .nii.gz and as .nii; remove one")
    return plain if plain.is_file() and not packed.is_file() else packed


def read_rows(
    path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = (), remedy: str = ""
) -> list[tuple[int, dict[str, str]]]:
    """(line number, column -> cell) of every line of a CSV table, cells stripped, empty lines left out.

    Args:
        path: the table, with a header line; what stands most often in that line, comma, semicolon or tab, separates.
        columns: what it must have.
        optional: more columns, whose cells are empty where it has none.
        remedy: what to do where a column is missing.

    Raises:
        DataError: the file cannot be read, lacks a column, or has no line below its header.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            start, first = 0, file.readline()
            if first.lower().startswith("sep="):  # Excel's own line above the header
                start, first = file.tell(), file.readline()
            file.seek(start)
            separator = max(SEPARATORS, key=first.count)
            reader = csv.DictReader(file, skipinitialspace=True, delimiter=separator)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = [
                (reader.line_num + (start > 0), {name: (row.get(name) or "").strip() for name in (*columns, *optional)})
                for row in reader
                if any(cell and cell.strip() for name, cell in row.items() if name is not None)
            ]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text in UTF-8 ({error.reason}); save the table as CSV UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV table ({error})") from error
    missing = [name for name in columns if name not in header]
    twice = [name for name, times in Counter(header).items() if name in (*columns, *optional) and times > 1]
    if twice:
        raise DataError(f"{path}: has several columns {', '.join(twice)}; give each a name of its own")
    unread = [name for name in header if name not in (*columns, *optional)]
    alike = [name for name in unread if name.lower() in optional and name.lower() not in header]
    if missing:
        known = ", ".join(header) or "none"
        raise DataError(f"{path}: has no column {', '.join(missing)}; its columns are {known}{remedy}")
    if alike:
        raise DataError(f"{path}: has a column {alike[0]}, which is read as {alike[0].lower()} only; rename it")
    if not rows:
        raise DataError(f"{path}: has a header but no line below it")
    return rows
