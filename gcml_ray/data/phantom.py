"""The phantom: synthetic brain-like sites to try a federation on, made in seconds, no download.

Each case has two channels, ``t1`` and ``flair``, and one binary label. A lesion is dark in t1 and bright
in flair; decoys look like one in a single channel. Sites differ as :mod:`gcml_ray.data.phantom_sites`
says. The phantom shows that software works and that methods differ; it says nothing about patients.

How a case is drawn is in :mod:`gcml_ray.data.phantom_case`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gcml_ray.data.datalist import Case
from gcml_ray.data.phantom_case import Field, Mask, make_case
from gcml_ray.data.phantom_sites import STYLES, SiteStyle, is_known, style_of
from gcml_ray.errors import DataError
from gcml_ray.records import Split
from gcml_ray.seeding import numpy_generator

log = logging.getLogger(__name__)

CHANNELS = ("t1", "flair")
MIN_SHAPE = (16, 16, 8)
NUM_VALIDATION = 2
NUM_TEST = 8


def prepare_phantom(
    out_dir: str | Path,
    *,
    sites: Sequence[str] | None,
    cases_per_site: int | None,
    shape: Sequence[int],
    seed: int,
    spatial_dims: Literal[2, 3] = 3,
    replaces: Path | None = None,
) -> tuple[Case, ...]:
    """Write the phantom's images as NIfTI files and return its cases.

    The voxels of a case depend on (seed, site, its index, shape) alone, not on how many cases or sites there are;
    its split depends on ``cases_per_site`` too.

    Args:
        out_dir: gets one folder a site, with ``<case>_t1.nii.gz``, ``<case>_flair.nii.gz``, ``<case>_label.nii.gz``.
        sites: names, or None for the four of ``STYLES``; ``site1`` ... ``site999`` are drawn from the seed.
        cases_per_site: number of cases, half of them for the test; None for each site's own number of
            training cases, 2 validation and 8 test cases.
        shape: voxels an axis; lesions scale with it. At least 16 x 16 x 8, or 16 x 16.
        seed: root seed.
        spatial_dims: 3 for volumes, 2 for single slices.
        replaces: a datalist of what lies there now; gone before the first image is, so that none speaks of a mix.

    Returns:
        The cases with absolute paths and their splits, in the order of ``sites``.

    Raises:
        DataError: an argument is out of range; the message names all of them.
    """
    names = tuple(STYLES) if sites is None else tuple(sites)
    out_dir = Path(os.path.abspath(out_dir))
    _check(names, cases_per_site, tuple(shape), spatial_dims)
    if replaces is not None:
        replaces.unlink(missing_ok=True)
    cases: list[Case] = []
    for site in names:
        style = style_of(site, seed)
        folder = out_dir / site
        folder.mkdir(parents=True, exist_ok=True)
        for index, split in enumerate(_splits(style, cases_per_site)):
            rng = numpy_generator(seed, "phantom", site, index)
            channels, label = make_case(style, rng, shape=tuple(shape))
            cases.append(_write_case(folder, f"{site}_{index:03d}", split, channels, label))
    log.info("phantom: %d cases of %d sites in %s", len(cases), len(names), out_dir)
    return tuple(cases)


def _check(sites: tuple[str, ...], cases_per_site: int | None, shape: tuple[int, ...], spatial_dims: int) -> None:
    problems = []
    if not sites:
        problems.append("sites is empty: name at least one")
    unknown = [site for site in sites if not is_known(site)]
    if unknown:
        problems.append(f"unknown sites {unknown}: the phantom has {list(STYLES)} and site1 ... site999")
    if len(set(sites)) != len(sites):
        problems.append(f"sites names one twice: {list(sites)}")
    if cases_per_site is not None and cases_per_site < 3:
        problems.append(f"cases_per_site is {cases_per_site}: at least 3, one each for training, validation and test")
    if spatial_dims not in (2, 3):
        problems.append(f"spatial_dims is {spatial_dims}: 2 or 3")
    elif len(shape) != spatial_dims:
        problems.append(f"shape {list(shape)} has {len(shape)} numbers, spatial_dims is {spatial_dims}")
    elif any(size < smallest for size, smallest in zip(shape, MIN_SHAPE, strict=False)):
        problems.append(f"shape {list(shape)} is too small: at least {list(MIN_SHAPE[:spatial_dims])} voxels")
    if problems:
        raise DataError("phantom: " + "; ".join(problems))


def _splits(style: SiteStyle, cases_per_site: int | None) -> tuple[Split, ...]:
    """The split of each case of a site, by index."""
    if cases_per_site is None:
        num_train, num_validation, num_test = style.num_train, NUM_VALIDATION, NUM_TEST
    else:
        num_test = max(1, cases_per_site // 2)
        num_validation = max(1, cases_per_site // 7)
        num_train = cases_per_site - num_test - num_validation
    counts: dict[Split, int] = {"train": num_train, "validation": num_validation, "test": num_test}
    return tuple(split for split, count in counts.items() for _ in range(count))


def _write_case(folder: Path, name: str, split: Split, channels: tuple[Field, Field], label: Mask) -> Case:
    images = []
    for channel, field in zip(CHANNELS, channels, strict=True):
        images.append(_write(folder / f"{name}_{channel}.nii.gz", np.round(field).astype(np.int16)))
    path = _write(folder / f"{name}_label.nii.gz", label.astype(np.uint8))
    return Case(site=folder.name, name=name, images=tuple(images), label=path, split=split)


def _write(path: Path, voxels: NDArray[Any]) -> str:
    import nibabel  # noqa: PLC0415 - every command imports this module

    image = nibabel.Nifti1Image(voxels, np.eye(4))  # type: ignore[no-untyped-call]
    nibabel.save(image, path)
    return str(path)
