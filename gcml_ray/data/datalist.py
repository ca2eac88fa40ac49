"""The list of cases: which images and labels belong to which site, and how they are split.

A datalist is a JSON file in the style of MONAI and the Medical Segmentation Decathlon, with a site on each case::

    {"cases": [{"site": "A", "image": ["a_t1.nii.gz", "a_flair.nii.gz"], "label": "a_seg.nii.gz", "split": "train"}]}

Reads names and paths only, never an image: the driver uses it too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from gcml_ray.config import SplitConfig
from gcml_ray.errors import DataError
from gcml_ray.files.whole_files import replace_file
from gcml_ray.records import Split

log = logging.getLogger(__name__)

MAX_LISTED = 20
PLACE = re.compile(r"((?:line|entry) \d+|site [^:]+, case [^:]+): (.+)", re.DOTALL)  # before what is wrong there
MAX_THRESHOLD = 1e30
FIRST_PRINTED = 32  # characters before this one control a terminal
LONGEST_NAME = 200  # bytes; file systems take 255, and files made of a name have endings and more
SPLITS: tuple[Split, ...] = get_args(Split)
TABLES = (".csv", ".tsv")
CASE_KEYS = ("site", "case", "image", "label", "split", "label_threshold")


@dataclass(frozen=True)
class Case:
    """One case of one site: its images (one file, or one a channel) and its label.

    Paths are absolute. ``split`` is None until :func:`assign_splits` decides it. With ``label_threshold``
    the label file is a grey mask: foreground is where its value exceeds the threshold. A case that is only
    to be predicted may have no label: ``label`` is empty then.
    """

    site: str
    name: str
    images: tuple[str, ...]
    label: str
    split: Split | None
    label_threshold: float | None = None


def listed(problems: Sequence[str]) -> str:
    """Problems as an indented list, the first 20 and then a count; what is said of several places stands once."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        found = PLACE.fullmatch(problem)
        place, words = found.groups() if found else ("", problem)
        places.setdefault(words, []).append(place)
    texts = [_with_places(words, where) for words, where in places.items()]
    lines = [f"\n  - {text}" for text in texts[:MAX_LISTED]]
    if len(texts) > MAX_LISTED:
        lines.append(f"\n  - and {len(texts) - MAX_LISTED} more")
    return "".join(lines)


def _with_places(words: str, places: Sequence[str]) -> str:
    """``line 3 (and 9 more): words``."""
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return f"{places[0]}{more}: {words}" if places[0] else words + more


# --- reading and writing -----------------------------------------------------------------------


def read_datalist(path: str | Path, *, only_images: bool = False) -> tuple[Case, ...]:
    """Read and check a datalist; relative paths in it are relative to its folder.

    Args:
        path: the JSON file.
        only_images: of new patients: label and site may be missing, and are empty then.

    Raises:
        DataError: the file is missing or not JSON, or entries are wrong; names every wrong entry.
    """
    path = Path(os.path.abspath(path))
    entries = _entries(path)
    problems: list[str] = []
    cases: dict[str, Case] = {}
    for index, entry in enumerate(entries):
        wrong = _entry_problems(entry, needed=("image",) if only_images else ("site", "image", "label"))
        problems += [f"entry {index}: {problem}" for problem in wrong]
        if not wrong:
            case = _case(entry, path.parent)
            problem = name_problem("the case's name, from its file's,", case.name)
            problems += [f"entry {index}: {problem}; give it a `case` name"] if problem else []
            cases[f"entry {index}"] = case
    problems += duplicate_problems(cases) + (shared_image_problems(cases.values()) if not only_images else [])
    if problems:
        raise DataError(f"{path}: {len(problems)} problem(s) in the datalist:{listed(problems)}")
    return tuple(cases.values())


def write_datalist(path: str | Path, cases: Iterable[Case], *, description: str) -> None:
    """Write a datalist in one step (a crash leaves the old file); paths become relative to its folder."""
    path = Path(os.path.abspath(path))
    entries = [_entry(case, path.parent) for case in cases]
    replace_file(path, json.dumps({"description": description, "cases": entries}, indent=1) + "\n")


def name_from_file(path: str) -> str:
    """A case's name from a file name: the last part without its extension (``.nii.gz`` is one extension)."""
    name = Path(path).name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else Path(name).stem


def duplicate_problems(cases: Mapping[str, Case]) -> list[str]:
    """One sentence for each case name that a site has more than once; ``cases`` by where they are listed."""
    places: dict[tuple[str, str], list[str]] = {}
    for place, case in cases.items():
        places.setdefault((case.site, case.name), []).append(place)
    return [
        f"site {site}: case {name} is listed {len(those)} times ({', '.join(those)}); give each its own `case` name"
        for (site, name), those in places.items()
        if len(those) > 1
    ]


def shared_image_problems(cases: Iterable[Case]) -> list[str]:
    """One sentence for each image file of several cases, unless their ``split`` says that none tests another."""
    owners: dict[str, list[Case]] = {}
    for case in cases:
        for path in dict.fromkeys(map(os.path.realpath, case.images)):  # also by a link
            owners.setdefault(path, []).append(case)
    return [
        f"{path} is an image of {len(those)} cases ({', '.join(f'{case.site}/{case.name}' for case in those)}): one "
        "may be trained on and another tested; leave one out, or give them the same `split`"
        for path, those in owners.items()
        if len(those) > 1 and (those[0].split is None or len({case.split for case in those}) > 1)
    ]


def is_among(label: str, images: Iterable[str]) -> bool:
    """Whether a case's label is one of its images, whichever way the paths are written."""
    return os.path.normpath(label) in map(os.path.normpath, images)


def name_problem(key: str, value: str) -> str | None:
    """Why a site's or case's name cannot be used (names become file names), or None."""
    if not value.strip():
        return f"{key} is empty"
    if any(mark in value for mark in "/\\\0") or value in (".", ".."):
        return f"{key} is {value!r}; it becomes a file name and must not hold a slash or be dots alone"
    if any(ord(mark) < FIRST_PRINTED or "\ud800" <= mark <= "\udfff" for mark in value):
        return f"{key} is {value!r}; it becomes a file name and a table's cell and must not hold control characters"
    if (size := len(value.encode())) > LONGEST_NAME:
        return f"{key} is {value!r}, {size} bytes long; it becomes part of file names and may have {LONGEST_NAME}"
    return None


def _entries(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_doubles)
    except FileNotFoundError:
        raise DataError(f"{path}: no such datalist; check data.datalist, or make one with `gcml prepare`") from None
    except OSError as error:
        raise DataError(f"{path}: the datalist cannot be read ({error.strerror or error}); give a file") from error
    except ValueError as error:
        hint = "; of a CSV `gcml prepare manifest` makes a datalist" if path.suffix.lower() in TABLES else ""
        raise DataError(f"{path}: cannot be read as JSON ({error}){hint}") from error
    except RecursionError:
        raise DataError(f"{path}: is no datalist: its brackets are nested hundreds deep") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; an object with a list `cases` was expected")
    keys = [key for key in ("cases", "training") if key in content]
    if len(keys) != 1:
        raise DataError(f"{path}: needs `cases` (or `training`, not both); it has the keys {sorted(content)}")
    entries = content[keys[0]]
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: `{keys[0]}` must be a list of at least one case, got {_shown(entries)}")
    for key in ("validation", "test", "testing"):
        if content.get(key):
            log.warning("%s: the list `%s` is not read; put the cases into `cases` with a `split` each", path, key)
    return entries


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if a key stands twice, as Python would silently drop the first."""
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} stands twice in one object; keep one")
    return dict(pairs)


def _entry_problems(entry: Any, *, needed: Sequence[str]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is {_shown(entry)}; an object with {', '.join(CASE_KEYS)} was expected"]
    problems = [f"unknown key {key!r}; allowed are {', '.join(CASE_KEYS)}" for key in entry if key not in CASE_KEYS]
    problems += [f"`{key}` is missing" for key in needed if key not in entry]
    for key in ("site", "case", "label"):
        if key in entry and not isinstance(entry[key], str):
            problems.append(f"`{key}` must be text, got {_shown(entry[key])}")
    for key in ("site", "case"):
        problem = name_problem(f"`{key}`", entry[key]) if isinstance(entry.get(key), str) else None
        problems += [problem] if problem else []
    image = entry.get("image", "")
    if not isinstance(image, str) and not (isinstance(image, list) and image and all(_is_text(p) for p in image)):
        problems.append(f"`image` must be one path or a list of channel paths, got {_shown(image)}")
    problems += [f"`{key}` is empty" for key in ("image", "label") if entry.get(key, "x") == ""]
    paths = [*(image if isinstance(image, list) else [image]), entry.get("label")]
    *images, label = paths
    if _is_text(label) and is_among(label, filter(_is_text, images)):
        problems.append(f"its image and its label are one file, {_shown(label)}")
    problems += [f"path {_shown(path)} holds a NUL" for path in paths if isinstance(path, str) and "\0" in path]
    if entry.get("split") is not None and entry["split"] not in SPLITS:
        problems.append(f"`split` must be one of {', '.join(SPLITS)}, got {_shown(entry['split'])}")
    threshold = entry.get("label_threshold")
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and -MAX_THRESHOLD < threshold < MAX_THRESHOLD):  # nor NaN
        problems.append(f"`label_threshold` must be a number, got {_shown(threshold)}")
    return problems


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _case(entry: dict[str, Any], folder: Path) -> Case:
    image = entry["image"]
    images = [image] if isinstance(image, str) else image
    threshold = entry.get("label_threshold")
    label = entry.get("label", "")
    return Case(
        site=entry.get("site", ""),
        name=entry.get("case") or name_from_file(label or images[0]),
        images=tuple(os.path.abspath(folder / part) for part in images),
        label=os.path.abspath(folder / label) if label else "",
        split=entry.get("split"),
        label_threshold=None if threshold is None else float(threshold),
    )


def _entry(case: Case, folder: Path) -> dict[str, Any]:
    images = [_relative(image, folder) for image in case.images]
    entry: dict[str, Any] = {
        "site": case.site,
        "case": case.name,
        "image": images if len(images) > 1 else images[0],
        "label": _relative(case.label, folder),
    }
    if case.split is not None:
        entry["split"] = case.split
    if case.label_threshold is not None:
        entry["label_threshold"] = case.label_threshold
    return entry


def _relative(path: str, folder: Path) -> str:
    """Relative where the file lies below the folder or beside it; further away it stays absolute."""
    relative = os.path.relpath(path, folder)
    return path if relative.startswith(os.path.join("..", "..")) else Path(relative).as_posix()


# --- questions to a list of cases --------------------------------------------------------------


def site_names(cases: Iterable[Case]) -> tuple[str, ...]:
    """All sites, sorted."""
    return tuple(sorted({case.site for case in cases}))


def cases_of_site(cases: Iterable[Case], site: str) -> tuple[Case, ...]:
    """A site's cases, in the order of the list."""
    return tuple(case for case in cases if case.site == site)


def check_files(cases: Iterable[Case]) -> None:
    """Check that every image and label file exists.

    Raises:
        DataError: names the first 20 missing files with site and case, and counts the rest.
    """
    missing = [
        f"site {case.site}, case {case.name}: {path}" + (" (is there, but is no file)" if os.path.lexists(path) else "")
        for case in cases
        for path in (*case.images, case.label)
        if not os.path.isfile(path)
    ]
    if missing:
        raise DataError(f"{len(missing)} file(s) of the datalist do not exist:{listed(missing)}")


# --- splits ------------------------------------------------------------------------------------


def assign_splits(cases: Sequence[Case], split: SplitConfig) -> tuple[Case, ...]:
    """Give every case without a split one: validation, test or train, by its name alone.

    The cases of a site are ordered by a hash of ``site/case``, so neither their order in the list nor
    other sites change the outcome; the first get validation, the next test, the rest train. The shares count
    against all cases of the site, those with an explicit split included. Every site keeps at least one
    case of each.

    Raises:
        DataError: a site has fewer than 3 cases, or its explicit splits leave one of the three empty.
    """
    chosen: dict[tuple[str, str], Split] = {}
    problems: list[str] = []
    for site in site_names(cases):
        own = cases_of_site(cases, site)
        if (problem := few_cases_problem(site, [case.name for case in own])) is not None:
            problems.append(problem)
            continue
        splits = _site_splits(own, split)
        empty = [name for name in SPLITS if name not in splits.values()]
        if empty:
            problems.append(
                f"site {site}: the explicit splits of its {len(own)} cases leave no case for {', '.join(empty)}; "
                "change `split` of some, or remove it so that the share of data.split decides"
            )
        chosen |= {(site, name): value for name, value in splits.items()}
    if problems:
        raise DataError(f"cases cannot be split into train, validation and test:{listed(problems)}")
    return tuple(replace(case, split=chosen[case.site, case.name]) for case in cases)


def few_cases_problem(site: str, names: Sequence[str]) -> str | None:
    """Why a run cannot take a site whose cases have these names, or None."""
    if len(names) >= len(SPLITS):
        return None
    return (
        f"site {site} has {len(names)} case(s) ({', '.join(names)}); it needs at least 3, one each to train, validate "
        "and test: add cases, or leave the site out with federation.sites"
    )


def _site_splits(own: Sequence[Case], split: SplitConfig) -> dict[str, Split]:
    result: dict[str, Split] = {case.name: case.split for case in own if case.split is not None}
    explicit = Counter(result.values())
    free = sorted((case.name for case in own if case.split is None), key=lambda name: _order(own[0].site, name))
    num_validation = max(0, max(1, round(split.validation * len(own))) - explicit["validation"])
    num_test = max(0, max(1, round(split.test * len(own))) - explicit["test"])
    room = max(0, len(free) - (0 if explicit["train"] else 1))
    while num_validation + num_test > room:
        if num_test >= num_validation:
            num_test -= 1
        else:
            num_validation -= 1
    for position, name in enumerate(free):
        if position < num_validation:
            result[name] = "validation"
        elif position < num_validation + num_test:
            result[name] = "test"
        else:
            result[name] = "train"
    return result


def _order(site: str, name: str) -> bytes:
    return hashlib.blake2b(f"{site}/{name}".encode(), digest_size=8).digest()
