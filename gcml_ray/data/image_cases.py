"""Which files make a case, where images come without a datalist: by their names.

``<case>_<channel>.nii.gz`` with the channel names of the configuration, or ``<case>_0000.nii.gz``,
``<case>_0001.nii.gz``... in the order of ``data.channels`` (nnU-Net's way); any other file is a whole case that
holds all channels. Numbers count as channels only where every number in the folder is one, so ``lung_0007``
of a single-channel set is a case of its own.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gcml_ray.config import DataConfig
from gcml_ray.data.datalist import Case, assign_splits, duplicate_problems, name_from_file, read_datalist
from gcml_ray.data.reading import NIFTI, PICTURES
from gcml_ray.errors import ConfigError, DataError
from gcml_ray.records import Split
from gcml_ray.wording import count

NUMBERED = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class FoundCases:
    """Cases to predict, one line for each that cannot be put together, and notes on what was left out."""

    cases: tuple[Case, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def find_cases(inputs: Sequence[Path], data: DataConfig, *, site: str, split: Split | None) -> FoundCases:
    """The cases behind what a user named: folders, image files, or one datalist.

    Args:
        inputs: folders (not searched deeper) and image files in any number, or one ``.json`` datalist, of which
            the entries of ``site`` and those without a site are taken.
        data: gives the channels.
        site: whose model predicts.
        split: take only these cases of the datalist; cases without a split get it as in training.

    Raises:
        DataError: nothing to predict was found, or the datalist is wrong.
        ConfigError: a split without a datalist, or a datalist among other inputs.
    """
    datalists = [path for path in inputs if path.suffix == ".json"]
    if datalists and len(inputs) > 1:
        raise ConfigError(f"--images {datalists[0]}: give a datalist alone, not among {len(inputs)} inputs")
    if split is not None and not datalists:
        raise ConfigError(f"--split {split} would be ignored: only a datalist says which case is in which split")
    if datalists:
        return _from_datalist(datalists[0], data, site=site, split=split)
    return cases_from_files([file for path in inputs for file in _files(path, data)], data, site=site)


def _from_datalist(path: Path, data: DataConfig, *, site: str, split: Split | None) -> FoundCases:
    """A site's entries, and those of no site."""
    entries = read_datalist(path, only_images=True)
    chosen = {f"entry {i}": replace(case, site=site) for i, case in enumerate(entries) if case.site in ("", site)}
    own = tuple(chosen.values())
    num_others = len(entries) - len(own)
    notes = (f"{count(num_others, 'case')} of other sites in {path}: left out",) if num_others else ()
    twice = duplicate_problems(chosen)  # one with its site and one without
    if twice:
        raise DataError(f"{path}: {'; '.join(twice)}")
    if not own:
        raise DataError(
            f"{path} holds {count(len(entries), 'case')}, none of site {site}; sites are {_sites(entries)}. For cases "
            "of another hospital give a folder of images, or leave `site` out of the entries"
        )
    if split is not None:
        own = with_splits(own, data)
        own = tuple(case for case in own if case.split == split)
    if not own:
        raise DataError(f"{path}: site {site} has no {split} case there; leave --split out, or name another")
    return FoundCases(own, (), notes)


def with_splits(cases: Sequence[Case], data: DataConfig) -> tuple[Case, ...]:
    """The cases with the split of training where the list leaves it open; see :func:`assign_splits`."""
    return tuple(cases) if all(case.split for case in cases) else assign_splits(cases, data.split)


def _sites(cases: Iterable[Case]) -> str:
    return ", ".join(sorted({case.site for case in cases}))


def _files(path: Path, data: DataConfig) -> list[Path]:
    """A file as it is, or the images of a folder."""
    if not path.exists():
        raise DataError(f"--images {path}: no such file or folder")
    if not path.is_dir():
        return [path]
    endings = NIFTI if data.spatial_dims == 3 else (*NIFTI, *PICTURES)
    files = [file for file in sorted(path.iterdir()) if file.name.lower().endswith(endings) and file.name[0] != "."]
    if not files:
        raise DataError(f"{path}: holds no image ({', '.join(endings)}); its sub-folders are not searched")
    return files


# --- from names to cases -------------------------------------------------------------------------


def cases_from_files(files: Sequence[Path], data: DataConfig, *, site: str) -> FoundCases:
    """Puts the channels of cases together by file name; see the module's text."""
    stems = [name_from_file(str(file)) for file in files]
    numbered = _numbers_are_channels(stems, len(data.channels))
    parts: dict[str, dict[int | None, list[Path]]] = {}
    for file, stem in zip(files, stems, strict=True):
        case, channel = _split_name(stem, data.channels, numbered=numbered)
        parts.setdefault(case, {}).setdefault(channel, []).append(file)
    cases: list[Case] = []
    problems: list[str] = []
    for name, found in parts.items():
        problem = _case_problem(name, found, data.channels)
        problems += [problem] if problem else []
        if problem is None:
            paths = found.get(None) or [found[index][0] for index in range(len(data.channels))]
            cases.append(Case(site, name, tuple(os.path.abspath(path) for path in paths), "", None))
    return FoundCases(tuple(cases), tuple(problems), ())


def _numbers_are_channels(stems: Sequence[str], num_channels: int) -> bool:
    """Whether names ending in four digits number channels rather than cases."""
    matches = [match for match in map(NUMBERED.fullmatch, stems) if match]
    return bool(matches) and all(int(match[2]) < num_channels for match in matches)


def _split_name(stem: str, channels: Sequence[str], *, numbered: bool) -> tuple[str, int | None]:
    """(case, channel), channel None for a file that holds them all."""
    named = [channel for channel in channels if stem.endswith(f"_{channel}") and len(stem) > len(channel) + 1]
    if named:
        longest = max(named, key=len)
        return stem[: -len(longest) - 1], channels.index(longest)
    match = NUMBERED.fullmatch(stem) if numbered else None
    return (match[1], int(match[2])) if match else (stem, None)


def _case_problem(name: str, found: dict[int | None, list[Path]], channels: Sequence[str]) -> str | None:
    """Why a case's files cannot be put together, or None."""
    counts = Counter({channel: len(paths) for channel, paths in found.items()})
    twice = [paths for channel, paths in found.items() if counts[channel] > 1]
    if twice or (None in found and len(found) > 1):
        files = ", ".join(str(path) for path in (twice[0] if twice else [p for paths in found.values() for p in paths]))
        return f"{name}: {files} claim the same place; keep one, or give the case another name"
    if None in found and (case := _case_of_other_letters(name, channels)):
        names = ", ".join(f"{case}_{channel}" for channel in channels)
        numbers = ", ".join(f"{case}_{index:04}" for index in range(len(channels)))
        return f"{name}: {found[None][0]} has a channel's name in other letters; call the files {names}, or {numbers}"
    missing = [channel for index, channel in enumerate(channels) if index not in found]
    if None not in found and missing:
        have = ", ".join(str(path) for paths in found.values() for path in paths)
        return f"{name}: channel {', '.join(missing)} is missing beside {have}; add <case>_<channel> or <case>_<number>"
    return None


def _case_of_other_letters(name: str, channels: Sequence[str]) -> str:
    """Case name in a name such as ``b_T1`` whose channel is spelt ``t1``; empty if it ends with no channel."""
    if len(channels) == 1:  # b_CT is a case of one channel, whatever its name
        return ""
    ends = [len(channel) + 1 for channel in channels if name.lower().endswith(f"_{channel.lower()}")]
    return name[: -max(ends)] if ends else ""
