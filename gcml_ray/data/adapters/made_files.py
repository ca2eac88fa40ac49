"""Volumes that an adapter makes of other files, and whether those that exist still belong to them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from gcml_ray.data.reading import UNREADABLE
from gcml_ray.files.whole_files import replaced

log = logging.getLogger(__name__)

Grid = tuple[tuple[int, ...], NDArray[np.float64]]  # shape, affine


def origin_of(paths: Iterable[Path]) -> str:
    """A word for the state of these files, for the header of what is made of them: other sizes or times, another word.

    Raises:
        OSError: one of them is gone.
    """
    stats = [path.stat() for path in paths]
    text = json.dumps([(stat.st_size, stat.st_mtime_ns) for stat in stats])
    return f"gcml {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def write_volume(target: Path, values: NDArray[Any], affine: NDArray[np.float64], *, origin: str) -> None:
    """Writes a NIfTI file as a whole; ``origin``: from :func:`origin_of`."""
    image: Any = nibabel.Nifti1Image(np.ascontiguousarray(values), affine)  # type: ignore[no-untyped-call]  # nibabel's
    image.header["descrip"] = origin.encode("ascii")
    with replaced(target, draft=target.with_name(f".draft-{target.name}")) as draft:
        nibabel.save(image, draft)


def is_current(target: Path, *, origin: str, grid: Grid | None = None) -> bool:
    """Whether a file is there and was made of these files, on this grid where one is given; says where it was not."""
    if not target.is_file():
        return False
    try:
        image: Any = nibabel.load(target)
    except UNREADABLE:
        return False
    has_grid = grid is None or (image.shape == grid[0] and np.allclose(image.affine, grid[1], atol=1e-3))
    if has_grid and bytes(image.header["descrip"]).rstrip(b"\0") == origin.encode("ascii"):
        return True
    log.warning("%s is made anew: what it was made of has changed since", target)
    return False
