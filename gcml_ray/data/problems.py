"""Problems of many cases, those that say the same in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gcml_ray.data.datalist import Case
from gcml_ray.errors import DataError
from gcml_ray.wording import some

MAX_NAMED = 5  # cases of a line
SHAPE = re.compile(r"\(\d+(?:, \d+)*\)")

CaseProblem = tuple[Case, str]


class CaseError(DataError):
    """A case cannot be used; ``problems`` has a sentence for each reason."""

    def __init__(self, case: Case, problems: Sequence[str]) -> None:
        super().__init__(f"site {case.site}, case {case.name}: {'; '.join(problems)}")
        self.case = case
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[CaseError], tuple[Case, tuple[str, ...]]]:
        return (CaseError, (self.case, self.problems))


def grouped(problems: Sequence[CaseProblem], num_cases: int) -> list[str]:
    """One line for each kind of problem, in the words of the first case that has it.

    Problems are of one kind if they differ in nothing but the case's own paths and in shapes.

    Args:
        problems: cases and what is wrong with them.
        num_cases: of how many cases.
    """
    kinds: dict[str, list[CaseProblem]] = {}
    for case, problem in problems:
        kinds.setdefault(_kind(case, problem), []).append((case, problem))
    return [_line(those, num_cases) for those in kinds.values()]


def _kind(case: Case, problem: str) -> str:
    places = {path: f"<file {place}>" for place, path in enumerate((*case.images, case.label))}
    for path in sorted(places, key=len, reverse=True):  # one may be the start of another
        problem = problem.replace(path, places[path]) if path else problem
    return SHAPE.sub("<shape>", problem)


def _line(those: Sequence[CaseProblem], num_cases: int) -> str:
    names = list(dict.fromkeys(f"{case.site}/{case.name}" for case, _ in those))
    if len(names) == 1:
        return f"case {names[0]}: {those[0][1]}"
    if len(names) == num_cases:
        return f"all {num_cases} cases, e.g. {names[0]}: {those[0][1]}"
    return f"{len(names)} of {num_cases} cases ({some(names, MAX_NAMED)}): {those[0][1]}"
