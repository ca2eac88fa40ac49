"""What a datalist holds, case by case: sizes, voxel sizes, intensities, labels, and whatever is wrong with them.

Legend: C channels, D H W voxels (2D: H rows, W columns).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes
from numpy.typing import NDArray
from scipy import ndimage

from gcml_ray.data.adapters.findings import grid_problems_of_files
from gcml_ray.data.case_checks import MAX_LABEL, NOT_FINITE, value_problem
from gcml_ray.data.datalist import Case, few_cases_problem, name_from_file
from gcml_ray.data.pictures import label_role
from gcml_ray.data.reading import is_picture, read_header, read_volume, spatial_dims_of, values_text
from gcml_ray.errors import DataError
from gcml_ray.files.site_names import site_name_problem
from gcml_ray.records import Split
from gcml_ray.wording import some

PERCENTILES = (1, 25, 50, 75, 99)
SAMPLE = 400_000  # voxels of a channel, at least, that its percentiles are taken from, evenly spaced
MAX_CLASSES = 150  # whole-body atlases have more than a hundred; beyond, it is rather a grey image
RARE = 0.1  # share of the cases: a label value that fewer have may be a mistake
MIN_CASES = 3  # of which a value in a single one can be called rare
MAX_NAMED = 3  # cases of a note
ALL_AXES = 3
COLOURS = ("red", "green", "blue", "opacity")


@dataclass(frozen=True)
class ChannelFacts:
    """One channel of one case: ``PERCENTILES`` of its bright voxels, and the share of voxels that are 0.

    Bright are those above the channel's mean, which leaves out air and the frame around a picture.
    """

    name: str
    percentiles: tuple[float, ...]
    zero_share: float

    @property
    def median(self) -> float:
        """The middle intensity of the bright voxels."""
        return self.percentiles[PERCENTILES.index(50)]


@dataclass(frozen=True)
class LabelFacts:
    """One label value of one case: its size in the inspection's unit, and in how many connected pieces it lies.

    Voxels that touch at a side, edge or corner belong to one piece.
    """

    value: int
    size: float
    num_pieces: int


@dataclass(frozen=True)
class CaseFacts:
    """One case. ``shape`` is None where the first image cannot be read, ``spacing_mm`` also for pictures.

    ``problems`` stop a run or spoil it; ``notes`` are worth a look.
    """

    site: str
    name: str
    split: Split | None
    shape: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    orientation: str | None = None
    channels: tuple[ChannelFacts, ...] = ()
    labels: tuple[LabelFacts, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class Inspection:
    """All cases, what is wrong with them and between them. ``size_unit`` is that of the labels' sizes."""

    cases: tuple[CaseFacts, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    size_unit: str
    is_quick: bool
    spacing_is_real: bool

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites, sorted."""
        return tuple(sorted({case.site for case in self.cases}))

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of all channels, in order."""
        return tuple(dict.fromkeys(channel.name for case in self.cases for channel in case.channels))

    @property
    def label_values(self) -> tuple[int, ...]:
        """All label values but 0 that some case holds."""
        return tuple(sorted({label.value for case in self.cases for label in case.labels}))

    def of_site(self, site: str) -> tuple[CaseFacts, ...]:
        """One site's cases."""
        return tuple(case for case in self.cases if case.site == site)


def inspect_cases(
    cases: Sequence[Case],
    *,
    quick: bool,
    spacing_is_real: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look at every case; each file's voxels are read once and not kept.

    Args:
        cases: what the datalist lists.
        quick: read headers only: sizes and voxel sizes, no intensities and labels.
        spacing_is_real: whether the voxel sizes in the headers mean something. Then labels are measured in ml,
            else (and in pictures) in % of the image.
        progress: called after each case with (cases done, cases in all).
    """
    names = channel_names(cases)
    is_flat = any(is_picture(case.images[0]) for case in cases)
    unit = "ml" if spacing_is_real and not is_flat else "% of the image"
    facts = []
    for done, case in enumerate(cases, start=1):
        facts.append(_inspect(case, names, quick=quick, unit=unit))
        if progress is not None:
            progress(done, len(cases))
    problems = [f"site {case.site}, case {case.name}: {problem}" for case in facts for problem in case.problems]
    return Inspection(
        cases=tuple(facts),
        problems=tuple(problems + _problems_between(facts)),
        notes=tuple(
            _gathered_notes(facts) + _notes_between(facts, spacing_is_real=spacing_is_real) + _value_notes(facts)
        ),
        size_unit=unit,
        is_quick=quick,
        spacing_is_real=spacing_is_real,
    )


def channel_names(cases: Sequence[Case]) -> tuple[str, ...]:
    """What the channels' files end in (``_t1``, ``_flair``), where all cases agree; else ``image 1``, ``image 2``."""
    endings = {tuple(name_from_file(path).rpartition("_")[2] for path in case.images) for case in cases}
    first = next(iter(endings), ())
    if len(endings) == 1 and len(first) > 1 and len(set(first)) == len(first):
        return first
    most = max((len(case.images) for case in cases), default=1)
    return tuple(f"image {number}" for number in range(1, most + 1)) if most > 1 else ("image",)


# --- one case ----------------------------------------------------------------------------------


def _inspect(case: Case, names: Sequence[str], *, quick: bool, unit: str) -> CaseFacts:
    dims = spatial_dims_of(case.images[0])
    files = {f"image {number}": Path(path) for number, path in enumerate(case.images, start=1)}
    problems = grid_problems_of_files(files | {"label": Path(case.label)}, spatial_dims=dims)
    try:
        header = read_header(case.images[0], spatial_dims=dims)
    except DataError:
        return CaseFacts(case.site, case.name, case.split, problems=tuple(problems))
    spacing = None if header.affine is None else np.linalg.norm(header.affine[:3, :3], axis=0)[:dims]
    channels, labels, notes, digest = _read(case, names, dims, problems) if not quick else ((), (), [], "")
    whole_image = float(np.prod(header.shape[1:]))
    scale = 100 / whole_image
    if unit == "ml" and spacing is not None:
        scale = float(np.prod(spacing)) / 1000
    return CaseFacts(
        site=case.site,
        name=case.name,
        split=case.split,
        shape=header.shape[1:],
        spacing_mm=None if spacing is None else tuple(round(float(side), 4) for side in spacing),
        orientation=_orientation(header.affine) if dims == ALL_AXES else None,
        channels=channels,
        labels=tuple(LabelFacts(value, count * scale, pieces) for value, count, pieces in labels),
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
        digest=digest,
    )


def _orientation(affine: NDArray[np.float64] | None) -> str | None:
    if affine is None or not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        return None
    return "".join(str(code) for code in aff2axcodes(affine))  # type: ignore[no-untyped-call]  # nibabel's


def _read(
    case: Case, names: Sequence[str], dims: int, problems: list[str]
) -> tuple[tuple[ChannelFacts, ...], list[tuple[int, int, int]], list[str], str]:
    """Channels, (label value, voxels, pieces), notes and a digest of the images; adds to ``problems``."""
    arrays: list[tuple[str, NDArray[np.float32]]] = []
    for path, name in zip(case.images, names, strict=False):
        if not Path(path).is_file():
            continue  # named already
        try:
            stack = read_volume(path, spatial_dims=dims).array.numpy()
        except DataError as error:
            problems.append(str(error))
            continue
        parts = COLOURS if is_picture(path) and len(stack) in (3, 4) else [f"{name}.{i}" for i in range(len(stack))]
        arrays += [(name, stack[0])] if len(stack) == 1 else list(zip(parts, stack, strict=False))
    digest = hashlib.blake2b(digest_size=16)
    for _, array in arrays:
        digest.update(array.tobytes())
    facts, notes = [], []
    for name, array in arrays:
        num_bad = int(array.size - np.isfinite(array).sum())
        if problem := value_problem(num_bad, float(np.abs(array).max())):
            problems.append(f"{name} {problem}")
        elif array.min() == array.max():
            notes.append(f"{name} is {array.flat[0]:g} everywhere")
        facts.append(_channel_facts(name, array))
    by_content: dict[bytes, list[str]] = {}
    for name, array in arrays:
        by_content.setdefault(array.tobytes(), []).append(name)
    notes += [
        f"{', '.join(same)} hold the same voxels: stand-ins for a missing sequence?"
        for same in by_content.values()
        if len(same) > 1
    ]
    labels = _read_label(case, dims, problems)
    if not labels and not problems:
        notes.append("its label is empty: nothing is marked")
    return tuple(facts), labels, notes, digest.hexdigest() if arrays else ""


def _channel_facts(name: str, array: NDArray[np.float32]) -> ChannelFacts:
    finite = array[np.isfinite(array)]
    sample = finite[:: max(1, finite.size // SAMPLE)]
    values = sample[sample > sample.mean(dtype=np.float64)] if sample.size else sample
    percentiles = np.percentile(values, PERCENTILES) if values.size else np.full(len(PERCENTILES), np.nan)
    return ChannelFacts(name, tuple(float(value) for value in percentiles), float((array == 0).mean()))


def _read_label(case: Case, dims: int, problems: list[str]) -> list[tuple[int, int, int]]:
    """(value, voxels, pieces) of each value but 0."""
    if not Path(case.label).is_file():
        return []
    try:
        stack = read_volume(case.label, spatial_dims=dims, role=label_role(case.label_threshold)).array.numpy()
    except DataError as error:
        problems.append(str(error))
        return []
    if is_picture(case.label) and len(stack) in (2, 4):
        stack = stack[:-1]  # its last channel is the opacity
    if problem := _stack_problem(stack, case.label_threshold):
        problems.append(problem)
        return []
    label: NDArray[Any] = stack[0]
    if case.label_threshold is not None:
        label = np.asarray((stack > case.label_threshold).any(axis=0))
    foreign = np.unique(label[~((label >= 0) & (label <= MAX_LABEL) & (label % 1 == 0))])
    if foreign.size:
        problems.append(
            f"its label holds {values_text(foreign.tolist())}; only whole numbers from 0 to {MAX_LABEL} are classes"
        )
        return []
    counts = np.bincount(label.astype(np.int64).ravel())
    if (num_values := np.count_nonzero(counts)) > MAX_CLASSES:
        problems.append(f"its label holds {num_values} different values, more than {MAX_CLASSES}: is it an image?")
        return []
    return [(int(v), int(counts[v]), _num_pieces(label == v)) for v in np.flatnonzero(counts) if v]


def _stack_problem(stack: NDArray[np.float32], threshold: float | None) -> str:
    """Why the channels of a label cannot become one map of classes; empty where they can."""
    if not np.isfinite(stack).all():
        return f"its label {NOT_FINITE}"
    if threshold is None and (stack != stack[:1]).any():
        return f"its label has {len(stack)} differing channels; store one, or set label_threshold"
    return ""


def _num_pieces(mask: NDArray[np.bool_]) -> int:
    """Connected components of the part of a mask that is not empty."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    return int(ndimage.label(mask[box], structure=np.ones((3,) * mask.ndim))[1])


# --- between cases -----------------------------------------------------------------------------


def _problems_between(facts: Sequence[CaseFacts]) -> list[str]:
    """Sites that no run can take, same images under two names, and cases with fewer or more channels than most."""
    sites: dict[str, list[str]] = {}
    for case in facts:
        sites.setdefault(case.site, []).append(case.name)
    problems = [problem for site in sites if (problem := site_name_problem(site)) is not None]
    problems += [problem for site, names in sites.items() if (problem := few_cases_problem(site, names)) is not None]
    first: dict[str, CaseFacts] = {}
    for case in facts:
        twin = first.setdefault(case.digest, case) if case.digest else case
        if twin is not case:
            problems.append(
                f"site {case.site}, case {case.name} holds the same images as site {twin.site}, case {twin.name}; "
                "leave one out, else a case that is tested may have been trained on"
            )
    read = [case for case in facts if not case.problems]
    usual = [number for number, _ in Counter(len(case.channels) for case in read).most_common(1)]
    problems += [
        f"site {case.site}, case {case.name} has {len(case.channels)} channel(s), most have {usual[0]}"
        for case in read
        if len(case.channels) not in usual
    ]
    return problems


def _gathered_notes(facts: Sequence[CaseFacts]) -> list[str]:
    """One line for each site and note, with its cases."""
    by_note: dict[tuple[str, str], list[str]] = {}
    for case in facts:
        for note in case.notes:
            by_note.setdefault((case.site, note), []).append(case.name)
    return [
        f"site {site}, {len(names)} case(s) ({some(names, MAX_NAMED)}): {note}"
        for (site, note), names in by_note.items()
    ]


def _notes_between(facts: Sequence[CaseFacts], *, spacing_is_real: bool) -> list[str]:
    """Differences in voxel size and orientation that the configuration should know of."""
    notes = []
    spacings = {case.spacing_mm for case in facts if case.spacing_mm is not None}
    if spacing_is_real and len(spacings) > 1:
        notes.append("voxel sizes differ: set data.target_spacing_mm, so that a voxel means the same everywhere")
    if spacing_is_real and len(spacings) == 1 and set(*spacings) == {1.0}:
        notes.append("every voxel is said to be 1 mm: if sizes were never stored, set data.spacing_is_real: false")
    turns = sorted({case.orientation for case in facts if case.orientation is not None})
    if len(turns) > 1:
        notes.append(f"orientations differ ({', '.join(turns)}): data.orientation turns all to one")
    return notes


def _value_notes(facts: Sequence[CaseFacts]) -> list[str]:
    """Label values that few cases have, or one site of several alone."""
    read = [case for case in facts if case.channels and not case.problems]
    holders: dict[int, list[CaseFacts]] = {}
    for case in read:
        for label in case.labels:
            holders.setdefault(label.value, []).append(case)
    num_sites = len({case.site for case in read})
    notes = []
    for value, those in sorted(holders.items()):
        if len(read) >= MIN_CASES and len(those) <= max(1, RARE * len(read)):
            names = [f"{case.site}/{case.name}" for case in those]
            where = f"in {len(those)} of {len(read)} cases only ({some(names, MAX_NAMED)})"
        elif num_sites > 1 and len({case.site for case in those}) == 1:
            where = f"at site {those[0].site} only"
        else:
            continue
        notes.append(f"label value {value} is found {where}: is it meant, and in data.labels?")
    return notes
