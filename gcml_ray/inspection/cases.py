"""What a datalist holds, case by case: sizes, voxel sizes, intensities, labels, and whatever is wrong with them.

Legend: C channels, D H W voxels (2D: H rows, W columns).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes
from numpy.typing import NDArray
from scipy import ndimage

from gcml_ray.data.adapters.findings import grid_problems_of_files
from gcml_ray.data.case_checks import MAX_LABEL, NOT_FINITE, value_problem, without_alpha
from gcml_ray.data.datalist import Case, name_from_file
from gcml_ray.data.pictures import label_role
from gcml_ray.data.reading import is_picture, read_header, read_volume, spatial_dims_of, values_text
from gcml_ray.errors import DataError
from gcml_ray.inspection.between import gathered_notes, notes_between, problems_between, value_notes
from gcml_ray.inspection.facts import PERCENTILES, CaseFacts, ChannelFacts, Inspection, LabelFacts

SAMPLE = 400_000  # voxels of a channel, at least, that its percentiles are taken from, evenly spaced
MAX_CLASSES = 150  # whole-body atlases have more than a hundred; beyond, it is rather a grey image
FLAT, ALL_AXES = 2, 3
COLOURS = ("red", "green", "blue", "opacity")


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
    for done, (case, dims) in enumerate(zip(cases, _spatial_dims(cases), strict=True), start=1):
        facts.append(_inspect(case, names, dims, quick=quick, unit=unit))
        if progress is not None:
            progress(done, len(cases))
    problems = [f"site {case.site}, case {case.name}: {problem}" for case in facts for problem in case.problems]
    return Inspection(
        cases=tuple(facts),
        problems=tuple(problems + problems_between(facts)),
        notes=tuple(gathered_notes(facts) + notes_between(facts, spacing_is_real=spacing_is_real) + value_notes(facts)),
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


@dataclass(frozen=True)
class _Voxels:
    """What the voxels of a case tell; ``labels`` are (value, voxels, pieces) of each value but 0."""

    channels: tuple[ChannelFacts, ...] = ()
    labels: tuple[tuple[int, int, int], ...] = ()
    notes: tuple[str, ...] = ()
    images_digest: str = ""
    label_digest: str = ""


def _spatial_dims(cases: Sequence[Case]) -> list[int]:
    """2 or 3 for each case; beside images of two axes a volume of a single slice is one of them."""
    found = [spatial_dims_of(case.images[0]) for case in cases]
    if FLAT not in found:
        return found
    return [FLAT if _is_flat(case.images[0]) else dims for case, dims in zip(cases, found, strict=True)]


def _is_flat(path: str) -> bool:
    try:
        return read_header(path, spatial_dims=FLAT).shape[0] == 1  # the slices of a volume would be channels
    except DataError:
        return False


def _inspect(case: Case, names: Sequence[str], dims: int, *, quick: bool, unit: str) -> CaseFacts:
    files = {f"image {number}": Path(path) for number, path in enumerate(case.images, start=1)}
    problems = grid_problems_of_files(files | {"label": Path(case.label)}, spatial_dims=dims)
    try:
        header = read_header(case.images[0], spatial_dims=dims)
    except DataError:
        return CaseFacts(case.site, case.name, case.split, problems=tuple(problems))
    spacing = None if header.affine is None else np.linalg.norm(header.affine[:3, :3], axis=0)[:dims]
    voxels = _Voxels() if quick else _read(case, names, dims, problems)
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
        channels=voxels.channels,
        labels=tuple(LabelFacts(value, count * scale, pieces) for value, count, pieces in voxels.labels),
        problems=tuple(dict.fromkeys(problems)),
        notes=voxels.notes,
        images_digest=voxels.images_digest,
        label_digest=voxels.label_digest,
    )


def _orientation(affine: NDArray[np.float64] | None) -> str | None:
    if affine is None or not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        return None
    return "".join(str(code) for code in aff2axcodes(affine))  # type: ignore[no-untyped-call]  # nibabel's


def _read(case: Case, names: Sequence[str], dims: int, problems: list[str]) -> _Voxels:
    """Reads images and label; adds to ``problems``."""
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
    facts, notes = [], []
    for name, array in arrays:
        num_bad = int(array.size - np.isfinite(array).sum())
        if problem := value_problem(num_bad, float(np.abs(array).max())):
            problems.append(f"{name} {problem}")
        elif array.min() == array.max():
            notes.append(f"{name} is {array.flat[0]:g} everywhere")
        facts.append(_channel_facts(name, array))
    by_content: dict[str, list[str]] = {}
    for name, array in arrays:
        by_content.setdefault(_digest([array]), []).append(name)
    notes += [
        f"{', '.join(same)} hold the same voxels: stand-ins for a missing sequence?"
        for same in by_content.values()
        if len(same) > 1
    ]
    label = _read_label(case, dims, problems)
    labels = () if label is None else _labels(label)
    if not labels and not problems:
        notes.append("its label is empty: nothing is marked")
    images_digest = _digest(array for _, array in arrays) if arrays else ""
    label_digest = _digest([label]) if label is not None and labels else ""
    return _Voxels(tuple(facts), labels, tuple(notes), images_digest, label_digest)


def _digest(arrays: Iterable[NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def _channel_facts(name: str, array: NDArray[np.float32]) -> ChannelFacts:
    finite = array[np.isfinite(array)]
    sample = finite[:: max(1, finite.size // SAMPLE)]
    values = sample[sample > sample.mean(dtype=np.float64)] if sample.size else sample
    percentiles = np.percentile(values, PERCENTILES) if values.size else np.full(len(PERCENTILES), np.nan)
    return ChannelFacts(name, tuple(float(value) for value in percentiles), float((array == 0).mean()))


def _read_label(case: Case, dims: int, problems: list[str]) -> NDArray[np.int64] | None:
    """The class of each voxel; None, and a problem, where the file does not hold classes."""
    if not Path(case.label).is_file():
        return None
    try:
        label_file = read_volume(case.label, spatial_dims=dims, role=label_role(case.label_threshold))
    except DataError as error:
        problems.append(str(error))
        return None
    stack = without_alpha(label_file.array, case.label).numpy()
    if problem := _stack_problem(stack, case.label_threshold):
        problems.append(problem)
        return None
    label: NDArray[Any] = stack[0]
    if case.label_threshold is not None:
        label = np.asarray((stack > case.label_threshold).any(axis=0))
    foreign = np.unique(label[~((label >= 0) & (label <= MAX_LABEL) & (label % 1 == 0))])
    if foreign.size:
        problems.append(
            f"its label holds {values_text(foreign.tolist())}; only whole numbers from 0 to {MAX_LABEL} are classes"
        )
        return None
    classes = label.astype(np.int64)
    if (num_values := np.count_nonzero(np.bincount(classes.ravel()))) > MAX_CLASSES:
        problems.append(
            f"its label holds {num_values} different values, more than {MAX_CLASSES}: is it an image? A grey mask "
            "needs label_threshold"
        )
        return None
    return classes


def _labels(classes: NDArray[np.int64]) -> tuple[tuple[int, int, int], ...]:
    """(value, voxels, pieces) of each value but 0."""
    counts = np.bincount(classes.ravel())
    return tuple((int(v), int(counts[v]), _num_pieces(classes == v)) for v in np.flatnonzero(counts) if v)


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
