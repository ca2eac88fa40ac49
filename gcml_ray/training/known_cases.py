"""Which cases a site trains, validates and tests on, kept beside its checkpoints: none may go from one to another.

A case is known by its name, by its images' paths and by what these hold, so that renaming it, copying it or exchanging
the files of two does not hide it.
Splits that a datalist leaves open follow from how many cases a site has, so a list that has grown gives other ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gcml_ray.data.datalist import Case, listed
from gcml_ray.errors import CheckpointError, DataError
from gcml_ray.files.whole_files import replace_file
from gcml_ray.wording import count, some

log = logging.getLogger(__name__)

CASES_FILE = "cases.json"
CONTENT = "content "  # how the keys of images' contents begin
CHUNK_BYTES = 1 << 16
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


def warn_of_changed_images(folder: Path, cases: Sequence[Case]) -> None:
    """Tells of cases whose images hold something else than when they were written down."""
    known = known_cases(folder)
    if not any(name.startswith(CONTENT) for name in known):
        return  # of a run whose version kept none
    keys = [content_key(case) for case in cases]
    splits = Counter(key for key, _ in {(key, case.split) for key, case in zip(keys, cases, strict=True)})
    new = {key for key, number in splits.items() if key and number == 1} - known.keys()  # in two splits: never kept
    changed = [case.name for key, case in zip(keys, cases, strict=True) if key in new and _own_name(case) in known]
    if changed:
        log.warning(
            "%s not as when the run began: %s. Scores before and after are not of the same images",
            count(len(changed), "case has images that are", "cases have images that are"),
            some(changed, 5),
        )


def content_key(case: Case) -> str:
    """What the images of a case hold, all together: size, beginning, middle and end of each file; empty if one is gone.

    The end of a ``.nii.gz`` holds a checksum of all its voxels.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for path in case.images:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(str(size).encode())
                for start in (0, size // 2, max(0, size - CHUNK_BYTES)):
                    file.seek(start)
                    digest.update(file.read(CHUNK_BYTES))
    except OSError:
        return ""
    return CONTENT + digest.hexdigest()


def known_cases(folder: Path) -> dict[str, str]:
    """The split of each case, by ``site/case``, of each image, by its path, and of what a case's images hold.

    Empty where none were written down.

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
    """Split of every case, image and content; what is in two splits is left out."""
    splits: dict[str, set[str]] = {}
    for case in cases:
        for name in _names(case):
            splits.setdefault(name, set()).add(str(case.split))
    return {name: next(iter(found)) for name, found in splits.items() if len(found) == 1}


def _names(case: Case) -> dict[str, str]:
    """What a case is known by, each with the words for it: its name, its images, by any link, and what they hold."""
    names = {_own_name(case): ""} | {f"image {os.path.realpath(path)}": f" ({path})" for path in case.images}
    if content := content_key(case):
        names[content] = " (what its images hold)"
    return names


def _own_name(case: Case) -> str:
    return f"{case.site}/{case.name}"
