"""Which cases a site trains, validates and tests on, kept beside its checkpoints: none may go from one to another.

A case is known by its name and by its images, so that renaming it, or exchanging the files of two, does not hide it.
Splits that a datalist leaves open follow from how many cases a site has, so a list that has grown gives other ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from gcml_ray.data.datalist import Case, listed
from gcml_ray.errors import CheckpointError, DataError
from gcml_ray.files.whole_files import replace_file

CASES_FILE = "cases.json"
_REMEDY = "bring it back, or delete it to go on unchecked"


def keep_cases(folder: Path, cases: Sequence[Case], *, anew: bool) -> None:
    """Writes down the cases of a site, beside its first checkpoint.

    Cases may come and go during a run. One that has gone stays known, so that it cannot come back in another split.

    Args:
        folder: the site's checkpoints.
        cases: its cases, each with its split.
        anew: whether the site started afresh, whatever was written before.

    Raises:
        CheckpointError: what was written before cannot be read.
    """
    known = {} if anew else known_cases(folder)
    now = known | _splits(cases)
    if now != known:
        replace_file(folder / CASES_FILE, json.dumps(now, indent=0, sort_keys=True, ensure_ascii=False) + "\n")


def check_splits(folder: Path, cases: Sequence[Case], *, source: str) -> None:
    """Refuses cases in another split than the site of this folder had them in; without a list anything passes.

    Called by a site that resumes, and where the cases of a split are scored later.

    Args:
        folder: the site's checkpoints.
        cases: each with its split.
        source: where they come from, for the message.

    Raises:
        DataError: a case is in another one; names all of them.
        CheckpointError: the list cannot be read.
    """
    if moved := _moved(known_cases(folder), cases):
        raise DataError(
            f"{source}: {len(moved)} case(s) are in another split than in the run:{listed(moved)}\n"
            "What was trained on would be tested, or the reverse. Splits that a datalist leaves open follow from its "
            "cases: bring the list of the run back, write `split` into its entries, or start anew in another "
            "output.folder"
        )


def known_cases(folder: Path) -> dict[str, str]:
    """The split of each case, by ``site/case``, and of each image, by its path; empty where none were written down.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / CASES_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no cases; {_REMEDY}")
    return {str(name): str(split) for name, split in content.items()}


def _moved(known: dict[str, str], cases: Sequence[Case]) -> list[str]:
    """The cases that are in another split than they, or their images, were known in."""
    moved = []
    for case in cases:
        before = {words: known.get(name, case.split) for name, words in _names(case).items()}
        told = next((words for words, split in before.items() if split != case.split), None)
        if told is not None:
            moved.append(f"site {case.site}, case {case.name}{told}: was {before[told]}, is {case.split}")
    return moved


def _splits(cases: Sequence[Case]) -> dict[str, str]:
    """Split of every case and image; images in two splits are left out."""
    splits: dict[str, set[str]] = {}
    for case in cases:
        for name in _names(case):
            splits.setdefault(name, set()).add(str(case.split))
    return {name: next(iter(found)) for name, found in splits.items() if len(found) == 1}


def _names(case: Case) -> dict[str, str]:
    """What a case is known by, each with the words for it: its own name, then its images, by any link."""
    return {f"{case.site}/{case.name}": ""} | {f"image {os.path.realpath(path)}": f" ({path})" for path in case.images}
