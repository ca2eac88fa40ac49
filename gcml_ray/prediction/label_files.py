"""From a prediction to files that viewers and ``gcml evaluate`` read: NIfTI volumes and png masks.

Legend: K foreground classes (softmax) or regions (sigmoid), *source = the grid of the image's file.

Regions become one label map where it can say all of them: any two nested or apart, and every region with
exactly one label of its own, one that no smaller region inside it has (BraTS: WT - edema, TC - core,
ET - enhancing). They are painted from the largest to the smallest, so the inner-most region wins: a voxel of
ET is enhancing, and so belongs to TC and WT, whatever the network said of those. Where no label map can say it,
each region gets a file of 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gcml_ray.config import DataConfig
from gcml_ray.data.reading import UNREADABLE, is_picture
from gcml_ray.errors import DataError
from gcml_ray.files.whole_files import replaced

Labels = NDArray[np.integer[Any]]
MADE_BY = re.compile(r"gcml-ray site (\S+)")  # how the notes of predictions begin
LONGEST_NOTED = 60  # characters of a site's name that a NIfTI header has room for
PNG_NOTE = "Comment"  # the text chunk of a png that holds its note


def region_values(data: DataConfig) -> dict[str, int] | None:
    """The label value that stands for each region in a label map, outermost region first.

    None where the regions cannot be told apart in one label map, or the labels are classes, not regions.
    """
    if data.regions is None:
        return None
    parts = {name: frozenset(labels) for name, labels in data.regions.items()}
    values: dict[str, int] = {}
    for name in sorted(parts, key=lambda name: -len(parts[name])):
        inside = [other for other in parts.values() if other < parts[name]]
        own = parts[name].difference(*inside)
        crosses = any(
            parts[name] & other and not (parts[name] <= other or other <= parts[name]) for other in parts.values()
        )
        twin = sum(other == parts[name] for other in parts.values()) > 1
        if len(own) != 1 or crosses or twin:
            return None
        values[name] = data.labels[next(iter(own))]
    return values


def label_map(masks: NDArray[np.bool_], data: DataConfig) -> Labels | None:
    """One volume of the values in ``data.labels``, or None where regions need a file each.

    Args:
        masks: (K, *source), a mask for each of ``data.foreground_names``; apart under softmax.
        data: gives labels and regions.

    Returns:
        (*source), in the smallest of uint8, int16 and int32 that holds all values.
    """
    by_name = region_values(data) if data.is_sigmoid else {name: data.labels[name] for name in data.foreground_names}
    if by_name is None:
        return None
    labels: Labels = np.full(masks.shape[1:], next(iter(data.labels.values())), dtype=label_type(data))
    for name, value in by_name.items():
        labels[masks[data.foreground_names.index(name)]] = value
    return labels


def label_type(data: DataConfig) -> type[np.integer[Any]]:
    """The smallest of uint8, int16 and int32 that holds all values of ``data.labels``."""
    values = list(data.labels.values())
    return next(kind for kind in (np.uint8, np.int16, np.int32) if _holds(kind, values))


def _holds(kind: type[np.integer[Any]], values: list[int]) -> bool:
    return np.iinfo(kind).min <= min(values) and max(values) <= np.iinfo(kind).max


# --- names and files ---------------------------------------------------------------------------


def ending_for(image: str) -> str:
    """The ending of a prediction's file: png for pictures, else compressed NIfTI."""
    return ".png" if is_picture(image) else ".nii.gz"


def output_paths(folder: Path, case: str, image: str, data: DataConfig) -> dict[str, Path]:
    """Where a case's prediction goes: ``{"": file}`` for a label map, or a file for each region by its name."""
    ending = ending_for(image)
    if data.is_sigmoid and region_values(data) is None:
        return {name: folder / f"{case}_{name}{ending}" for name in data.foreground_names}
    return {"": folder / f"{case}{ending}"}


def site_that_made(path: Path) -> str | None:
    """The site whose model predicted a label file, by its header or text chunk; None where that is not said."""
    try:
        note = _png_note(path) if path.suffix == ".png" else _nifti_note(path)
    except (*UNREADABLE, AttributeError):
        return None
    match = MADE_BY.match(note)
    return match[1][:LONGEST_NOTED] if match else None


def _png_note(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.info.get(PNG_NOTE, ""))


def _nifti_note(path: Path) -> str:
    header: Any = nibabel.load(path).header
    return bytes(header["descrip"]).decode("ascii", "replace")


def write_labels(path: Path, labels: Labels, *, like: str, note: str) -> None:
    """Writes a label map on the grid of the image it was made from; a crash leaves no half file under its name.

    Args:
        path: ``.png`` or ``.nii.gz``.
        labels: (*source).
        like: the image's file; a NIfTI gives affine, codes and units.
        note: goes into the NIfTI header's ``descrip`` (79 characters), or a png's text chunk ``Comment``.

    Raises:
        DataError: values that a png cannot hold.
    """
    if path.suffix == ".png" and (labels.min() < 0 or labels.max() > 255):
        raise DataError(f"{path}: a png mask holds 0 to 255, data.labels has other values; store images as NIfTI")
    with replaced(path, draft=path.with_name(f".draft-{path.name}")) as draft:
        if path.suffix == ".png":
            _write_png(draft, labels, note)
        else:
            nibabel.save(_nifti(labels, like, note), draft)


def _write_png(path: Path, labels: Labels, note: str) -> None:
    chunks = PngInfo()
    chunks.add_text(PNG_NOTE, note)
    Image.fromarray(labels.astype(np.uint8)).save(path, pnginfo=chunks)


def write_masks(paths: Mapping[str, Path], masks: Mapping[str, NDArray[np.bool_]], *, like: str, note: str) -> None:
    """A file of 0 and 1 for each region; see :func:`write_labels`."""
    for name, path in paths.items():
        write_labels(path, masks[name].astype(np.uint8), like=like, note=note)


def _nifti(labels: Labels, like: str, note: str) -> Any:
    """A NIfTI image of labels with the grid and the header codes of another image."""
    original: Any = nibabel.load(like)
    header = original.header if isinstance(original.header, nibabel.Nifti1Header) else None
    if labels.ndim == 2 and len(original.shape) > 2:
        labels = labels[..., None]  # a slice stored as a volume of one stays one
    image: Any = nibabel.Nifti1Image(labels, original.affine, header)  # type: ignore[no-untyped-call]  # nibabel's
    image.header.set_data_dtype(labels.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0  # a window for the image's values, not for labels
    image.header.set_intent("none")
    for text in ("data_type", "db_name", "aux_file"):  # these and the extensions may name the patient
        image.header[text] = b""
    image.header.extensions.clear()
    image.header["descrip"] = note.encode("ascii", "replace")[:79]
    if header is None:
        image.header.set_xyzt_units("mm")
    return image
