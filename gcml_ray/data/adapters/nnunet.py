"""Any data set in nnU-Net's raw layout (v1 and v2); the site of a case comes from its name or from a table.

Layout: ``imagesTr/<case>_0000<ending>``, ``_0001`` ... one file a channel, ``labelsTr/<case><ending>`` and
``dataset.json`` with ``channel_names`` (v2) or ``modality`` (v1) and ``labels``: name -> value (v2), value -> name
(v1), or name -> values where regions overlap (v2). Cases in ``imagesTs`` have no labels and are not read. Not
supported: v2's ``ignore`` label, its ``dataset`` entry (files elsewhere), and formats other than NIfTI and pictures.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gcml_ray.data.adapters.findings import Findings, Progress, check_cases, read_rows
from gcml_ray.data.datalist import Case
from gcml_ray.data.reading import NIFTI, is_picture, read_header, spatial_dims_of
from gcml_ray.errors import ConfigError, DataError
from gcml_ray.files.site_names import site_name_problem

IMAGE_STEM = re.compile(r"(.+)_(\d{4})")
NUM_LOOKED_AT = 5  # cases, for the number of axes: the first file may be damaged
SiteOf = Callable[[str], str | None]


@dataclass(frozen=True)
class Meaning:
    """What ``dataset.json`` says: channels in order, label names and values, regions by their label names."""

    channels: tuple[str, ...]
    labels: dict[str, int]
    regions: dict[str, tuple[str, ...]] | None
    ending: str
    spatial_dims: int = 3


@dataclass(frozen=True)
class NnunetSet:
    """A data set: its cases without splits, and what its channels and labels mean."""

    cases: tuple[Case, ...]
    meaning: Meaning


def prepare_nnunet(
    folder: str | Path,
    *,
    site_regex: str | None = None,
    site_csv: str | Path | None = None,
    skip_faulty: bool = False,
    progress: Progress | None = None,
) -> NnunetSet:
    r"""The labelled cases of an nnU-Net raw data set.

    Args:
        folder: ``DatasetXXX_Name``, which holds ``dataset.json``.
        site_regex: searched in the case's name; its first group (or the whole match) is the site: ``^([A-Z]+)``.
        site_csv: columns ``case`` and ``site``; instead of ``site_regex``.
        skip_faulty: leave out cases with problems, with a warning each, instead of raising.
        progress: called after each case with (cases done, cases in all).

    Raises:
        DataError: the description cannot be read, or cases lack a channel, label or site, are there twice, differ in
            their grids or hold unknown label values; all at once.
    """
    folder = Path(os.path.abspath(folder))
    meaning = read_meaning(folder)
    findings = Findings(folder)
    site_of, listed_cases = _site_source(site_regex, site_csv)
    cases = nnunet_cases(folder, findings, num_channels=len(meaning.channels), ending=meaning.ending, site_of=site_of)
    for name in sorted(listed_cases - {case.name for case in cases}):
        findings.general.append(f"{Path(str(site_csv)).name} lists case {name}, which has no file in {folder}")
    if any(spatial_dims_of(case.images[0]) == 2 for case in cases[:NUM_LOOKED_AT]):
        meaning = replace(meaning, spatial_dims=2)
    check_cases(
        cases,
        findings,
        channels=meaning.channels,
        label_values=tuple(meaning.labels.values()),
        spatial_dims=meaning.spatial_dims,
        progress=progress,
    )
    return NnunetSet(findings.sound(cases, skip_faulty=skip_faulty), meaning)


# --- dataset.json ------------------------------------------------------------------------------


def read_meaning(folder: Path) -> Meaning:
    """Channels and labels of ``dataset.json``.

    Raises:
        DataError: it is missing, not JSON, or lacks or misuses an entry; all at once.
    """
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); give the folder that holds it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; an object was expected")
    problems: list[str] = []
    channels = _channels(content, problems)
    labels, regions = _labels(content.get("labels"), problems)
    ending = content.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or not (ending in NIFTI or is_picture(f"x{ending}")):
        problems.append(f"file_ending is {ending!r}; NIfTI and pictures are read, convert the files")
    if content.get("dataset"):
        problems.append("`dataset` names files elsewhere, which is not supported; copy them to imagesTr and labelsTr")
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}")
    return Meaning(channels, labels, regions, ending)


def _channels(content: dict[str, Any], problems: list[str]) -> tuple[str, ...]:
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(map(str, range(len(names)))) or not names:
        problems.append(f"channel_names (or modality) is {names!r}; {{'0': name, '1': name, ...}} was expected")
        return ()
    texts = [str(names[str(index)]) for index in range(len(names))]
    return tuple(text if texts.count(text) == 1 else f"{text}_{index}" for index, text in enumerate(texts))


def _labels(entry: Any, problems: list[str]) -> tuple[dict[str, int], dict[str, tuple[str, ...]] | None]:
    """Label names and values, background first, and the regions where values overlap."""
    if not isinstance(entry, dict) or len(entry) < 2:
        problems.append(f"labels is {entry!r}; at least two names with their values were expected")
        return {}, None
    try:
        if all(str(key).isdecimal() for key in entry):  # v1: value -> name
            entry = {str(name): int(value) for value, name in entry.items()}
        values = {name: _values(value) for name, value in entry.items()}
    except (TypeError, ValueError):
        problems.append(f"labels is {entry!r}; a value must be a whole number or a list of them")
        return {}, None
    if mixed := [name for name, several in values.items() if 0 in several and several != (0,)]:
        problems.append(f"labels has the region {mixed[0]!r} with the value 0 in it; 0 is the background alone")
        return {}, None
    if "ignore" in values:
        problems.append("labels has `ignore`, which is not supported; give those voxels a class")
    if (0,) not in values.values():
        problems.append("labels gives 0 to no name; the background must be 0")
    if all(len(several) == 1 for several in values.values()):
        ordered = sorted((several[0], name) for name, several in values.items())
        return {name: value for value, name in ordered}, None
    background = next((name for name, several in values.items() if several == (0,)), "background")
    parts = {value: f"value_{value}" for several in values.values() for value in several if value}
    regions = {name: tuple(parts[v] for v in several) for name, several in values.items() if several != (0,)}
    return {background: 0, **{name: value for value, name in sorted(parts.items())}}, regions


def _values(entry: Any) -> tuple[int, ...]:
    """The whole number or numbers of a label; raises TypeError or ValueError for anything else."""
    several = entry if isinstance(entry, list) else [entry]
    if any(isinstance(value, float) and not value.is_integer() for value in several):
        raise ValueError(entry)
    return tuple(int(value) for value in several)


# --- files -------------------------------------------------------------------------------------


def nnunet_cases(
    folder: Path, findings: Findings, *, num_channels: int, ending: str, site_of: SiteOf
) -> tuple[Case, ...]:
    """Every case that has an image or a label; a missing file gets the path where it should be.

    A case whose one picture holds all channels (RGB) has one image path.

    Raises:
        DataError: ``imagesTr`` or ``labelsTr`` is missing.
    """
    images: dict[str, dict[int, Path]] = defaultdict(dict)
    for stem, path in _by_stem(folder / "imagesTr", ending, findings).items():
        match = IMAGE_STEM.fullmatch(stem)
        if match is None:
            findings.general.append(f"imagesTr/{path.name} is not named <case>_<four digits>{ending}")
        else:
            images[match.group(1)][int(match.group(2))] = path
    labels = _by_stem(folder / "labelsTr", ending, findings)
    cases: list[Case] = []
    for name in sorted(images.keys() | labels.keys()):
        site = _site(name, site_of, findings)
        own = images.get(name, {})
        extra = [str(own[index].name) for index in own if index >= num_channels]
        findings.about(name, [f"{each} is of no channel: there are {num_channels}, from _0000 on" for each in extra])
        num_files = 1 if _is_whole_picture(own, num_channels) else num_channels
        paths = [own.get(i, folder / "imagesTr" / f"{name}_{i:04d}{ending}") for i in range(num_files)]
        label = labels.get(name, folder / "labelsTr" / f"{name}{ending}")
        cases.append(Case(site=site, name=name, images=tuple(map(str, paths)), label=str(label), split=None))
    return tuple(cases)


def _by_stem(folder: Path, ending: str, findings: Findings) -> dict[str, Path]:
    """Files of the set by name without ending; two endings, or spellings that differ in case only, are problems."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; nnU-Net's raw layout has imagesTr and labelsTr")
    endings = NIFTI if ending in NIFTI else (ending,)
    found: dict[str, Path] = {}
    spelt: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        own = next((each for each in endings if path.name.endswith(each)), None)
        if path.name.startswith(".") or own is None or not path.is_file():
            continue
        stem = path.name[: -len(own)]
        match = IMAGE_STEM.fullmatch(stem) if folder.name == "imagesTr" else None  # a label NYU_0004 is a whole case
        case = match.group(1) if match else stem
        twin = spelt.setdefault(stem.casefold(), stem)
        if stem in found:
            findings.about(case, [f"{folder.name}/{stem} is there twice, with two endings; remove one"])
        elif twin != stem:
            findings.about(case, [f"{folder.name} has {stem} and {twin}: one case, spelt in two ways?"])
        found.setdefault(stem, path)
    return found


def _is_whole_picture(own: dict[int, Path], num_channels: int) -> bool:
    """Whether one picture holds all the channels."""
    if list(own) != [0] or num_channels == 1 or not is_picture(str(own[0])):
        return False
    try:
        return read_header(str(own[0]), spatial_dims=2).shape[0] == num_channels
    except DataError:
        return False


# --- sites -------------------------------------------------------------------------------------


def _site_source(regex: str | None, table: str | Path | None) -> tuple[SiteOf, set[str]]:
    """Case -> site, and the cases that the table lists."""
    if (regex is None) == (table is None):
        raise ConfigError("give either --site-regex or --site-csv: how else are cases told apart by site?")
    if table is not None:
        sites = _read_sites(table)
        return sites.get, set(sites)
    assert regex is not None
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ConfigError(f"--site-regex {regex!r} is no regular expression ({error})") from error

    def site_of(name: str) -> str | None:
        match = pattern.search(name)
        return None if match is None else match.group(1 if pattern.groups else 0)

    return site_of, set()


def _read_sites(path: str | Path) -> dict[str, str]:
    sites: dict[str, str] = {}
    problems: list[str] = []
    for line, row in read_rows(path, ("case", "site")):
        if sites.setdefault(row["case"], row["site"]) != row["site"]:
            problems.append(f"line {line}: case {row['case']} belongs to {sites[row['case']]} and to {row['site']}")
    if problems:
        raise DataError(f"{path}: {'; '.join(problems)}")
    return sites


def _site(name: str, site_of: SiteOf, findings: Findings) -> str:
    """The site of a case; a case without one gets a problem and an empty site."""
    site = site_of(name)
    if not site:
        findings.about(name, ["belongs to no site: neither its name nor the table tells one"])
        return ""
    problem = site_name_problem(site)
    findings.about(name, [problem] if problem else [])
    return site


def config_lines(meaning: Meaning) -> Sequence[str]:
    """The lines of a configuration's ``data`` section that follow from the description."""
    labels = ", ".join(f"{json.dumps(name)}: {value}" for name, value in meaning.labels.items())
    lines = [f"channels: {json.dumps(list(meaning.channels))}", f"labels: {{{labels}}}"]
    if meaning.regions is not None:
        regions = ", ".join(f"{json.dumps(name)}: {json.dumps(list(p))}" for name, p in meaning.regions.items())
        lines.append(f"regions: {{{regions}}}")
    return [*lines, f"spatial_dims: {meaning.spatial_dims}"]
