"""The phantom: synthetic brain-like sites to try a federation on, made in seconds, no download.

Each case has two channels, ``t1`` and ``flair``, and one binary label. A lesion is dark in t1 and bright
in flair; decoys look like one in a single channel. Sites differ as :mod:`gcml_ray.data.phantom_sites`
says. The phantom shows that software works and that methods differ; it says nothing about patients.

D is the number of axes (2 or 3); a field has the grid's shape (H, W) or (H, W, slices), float64;
points are (D, *grid) in reference units, see :func:`_points`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gcml_ray.data.datalist import Case
from gcml_ray.data.phantom_sites import STYLES, SiteStyle, is_known, style_of
from gcml_ray.errors import DataError
from gcml_ray.records import Split
from gcml_ray.seeding import numpy_generator

log = logging.getLogger(__name__)

Field = NDArray[np.float64]
Mask = NDArray[np.bool_]

CHANNELS = ("t1", "flair")
REFERENCE_SHAPE = (40, 40, 20)
MIN_SHAPE = (16, 16, 8)
NUM_VALIDATION = 2
NUM_TEST = 8
BRAIN_RADII = (17.5, 15.0, 9.0)
STORED_WHITE = 1000.0  # stored integers per unit of signal, before the gain of a case


def prepare_phantom(
    out_dir: Path,
    *,
    sites: Sequence[str] | None,
    cases_per_site: int | None,
    shape: Sequence[int],
    seed: int,
    spatial_dims: Literal[2, 3] = 3,
) -> tuple[Case, ...]:
    """Write the phantom's images as NIfTI files and return its cases.

    A case depends on (seed, site, its index, shape) alone: more cases or sites change none of the others.

    Args:
        out_dir: gets one folder a site, with ``<case>_t1.nii.gz``, ``<case>_flair.nii.gz``, ``<case>_label.nii.gz``.
        sites: names, or None for the four of ``STYLES``; ``site1`` ... ``site999`` are drawn from the seed.
        cases_per_site: number of cases, half of them for the test; None for each site's own number of
            training cases, 2 validation and 8 test cases.
        shape: voxels an axis; lesions scale with it. At least 16 x 16 x 8, or 16 x 16.
        seed: root seed.
        spatial_dims: 3 for volumes, 2 for single slices.

    Returns:
        The cases with paths relative to ``out_dir``, in the order of ``sites``.

    Raises:
        DataError: an argument is out of range; the message names all of them.
    """
    names = tuple(STYLES) if sites is None else tuple(sites)
    _check(names, cases_per_site, tuple(shape), spatial_dims)
    cases: list[Case] = []
    for site in names:
        style = style_of(site, seed)
        (out_dir / site).mkdir(parents=True, exist_ok=True)
        for index, split in enumerate(_splits(style, cases_per_site)):
            rng = numpy_generator(seed, "phantom", site, index)
            cases.append(_write_case(out_dir, site, index, split, *make_case(style, rng, shape=tuple(shape))))
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
    return ("train",) * num_train + ("validation",) * num_validation + ("test",) * num_test


def _write_case(
    out_dir: Path, site: str, index: int, split: Split, channels: tuple[Field, Field], label: Mask
) -> Case:
    name = f"{site}_{index:03d}"
    images = []
    for channel, field in zip(CHANNELS, channels, strict=True):
        images.append(f"{site}/{name}_{channel}.nii.gz")
        _write(out_dir / images[-1], np.round(field).astype(np.int16))
    path = f"{site}/{name}_label.nii.gz"
    _write(out_dir / path, label.astype(np.uint8))
    return Case(site=site, name=name, images=tuple(images), label=path, split=split)


def _write(path: Path, voxels: NDArray[Any]) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


# --- one case --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Anatomy:
    """Where things are. ``brain``: inside or not; ``white``, ``csf``: share of a voxel, 0 to 1."""

    brain: Mask
    white: Field
    csf: Field


def make_case(
    style: SiteStyle, rng: np.random.Generator, *, shape: tuple[int, ...]
) -> tuple[tuple[Field, Field], Mask]:
    """One case: the two channels (zero outside the brain, at least 1 inside) and the lesion's label."""
    points = _points(shape)
    anatomy = _anatomy(points, rng)
    lesion, core = _lesions(points, anatomy, style, rng)
    t1 = 0.55 + (style.white_t1 - 0.55) * anatomy.white
    flair = 0.58 + (style.white_flair - 0.58) * anatomy.white
    t1 = t1 + anatomy.csf * (0.18 - t1)
    flair = flair + anatomy.csf * (style.csf_flair - flair)
    t1, flair = _add_decoys(t1, flair, points, anatomy, lesion, style, rng)
    texture = 1 + 0.25 * _smooth_noise(shape, 1.5, rng)
    strength = rng.uniform(0.8, 1.25, 2)
    t1 = t1 + strength[0] * style.t1_lesion * lesion * texture - 0.25 * core
    flair = flair + strength[1] * style.flair_lesion * lesion * texture - (style.flair_lesion + 0.2) * core
    channels = (_scan(t1, anatomy.brain, style, rng), _scan(flair, anatomy.brain, style, rng))
    return channels, _draw_label(lesion, anatomy.brain, style)


def _points(shape: tuple[int, ...]) -> Field:
    """Coordinates (D, *grid) from the grid's middle, in voxels of the reference grid 40 x 40 (x 20)."""
    axes = [
        (np.arange(size) - (size - 1) / 2) * (reference / size)
        for size, reference in zip(shape, REFERENCE_SHAPE, strict=False)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _voxels(length: float, shape: tuple[int, ...]) -> tuple[float, ...]:
    """A length in reference units as voxels along each axis."""
    return tuple(length * size / reference for size, reference in zip(shape, REFERENCE_SHAPE, strict=False))


def _smooth_noise(shape: tuple[int, ...], length: float, rng: np.random.Generator) -> Field:
    """Gaussian noise with a correlation length in reference units, mean 0, standard deviation 1."""
    field: Field = ndimage.gaussian_filter(rng.standard_normal(shape), _voxels(length, shape), mode="nearest")
    return (field - field.mean()) / (field.std() + 1e-9)


def _soft(signed_distance: Field, width: float) -> Field:
    """1 inside (negative distance), 0 outside, with an edge of the given width."""
    return 1 / (1 + np.exp(np.clip(signed_distance / width, -40, 40)))


def _ellipsoid(points: Field, centre: Field, radii: Field, turn: Field | None = None) -> Field:
    """Approximate signed distance (*grid) to an ellipsoid; ``turn`` (D, D) holds its axes as columns."""
    offset = points - centre.reshape(-1, *[1] * (points.ndim - 1))
    if turn is not None:
        offset = np.einsum("ji,j...->i...", turn, offset)
    relative = np.sqrt(((offset / radii.reshape(-1, *[1] * (points.ndim - 1))) ** 2).sum(axis=0))
    distance: Field = (relative - 1) * float(radii.min())
    return distance


def _anatomy(points: Field, rng: np.random.Generator) -> _Anatomy:
    """Brain with a wavy rim of grey matter, white matter inside and two ventricles."""
    dims, shape = points.shape[0], points.shape[1:]
    radii = np.array(BRAIN_RADII[:dims]) * rng.uniform(0.9, 1.05, dims)
    outer = _ellipsoid(points, rng.uniform(-0.8, 0.8, dims), radii) + 0.4 * _smooth_noise(shape, 3.0, rng)
    white = _soft(outer + 2.8 + 0.9 * _smooth_noise(shape, 1.4, rng), 0.4)
    csf = np.zeros(shape)
    for side in (-1.0, 1.0):
        centre = np.array([rng.uniform(-1.5, 1.5), side * rng.uniform(2.2, 3.2), rng.uniform(-1, 1)])[:dims]
        size = np.array([rng.uniform(3.5, 6.0), rng.uniform(0.9, 1.9), rng.uniform(2.5, 4.0)])[:dims]
        csf = np.maximum(csf, _soft(_ellipsoid(points, centre, size), 0.35))
    return _Anatomy(brain=outer < 0, white=white, csf=csf)


def _somewhere(allowed: Mask, points: Field, rng: np.random.Generator) -> Field:
    """Coordinates (D,) of a random allowed voxel; the grid's middle where none is allowed."""
    candidates = np.flatnonzero(allowed)
    draw = rng.random()
    if not candidates.size:
        return np.zeros(points.shape[0])
    chosen: Field = points.reshape(points.shape[0], -1)[:, candidates[int(draw * candidates.size)]]
    return chosen


def _turn(dims: int, rng: np.random.Generator) -> Field:
    axes: Field = np.linalg.qr(rng.standard_normal((dims, dims)))[0]
    return axes


def _lesions(
    points: Field, anatomy: _Anatomy, style: SiteStyle, rng: np.random.Generator
) -> tuple[Field, Field]:
    """Share of lesion, and of the lesions' dark cores, in each voxel."""
    shape = points.shape[1:]
    depth = ndimage.distance_transform_edt(np.pad(anatomy.brain, 1), sampling=_spacing(shape))
    inner = depth[tuple(slice(1, -1) for _ in shape)]
    lesion, core = np.zeros(shape), np.zeros(shape)
    for _ in range(int(rng.integers(1, 3))):
        radius = rng.uniform(*style.lesion_radius)
        centre = _somewhere((inner > 0.8 * radius) & (anatomy.csf < 0.3) & (lesion < 0.1), points, rng)
        distance = _lesion_distance(points, centre, radius, style, rng) + 0.35 * _smooth_noise(shape, 1.5, rng)
        lesion = np.maximum(lesion, _soft(distance, 0.35))
        if rng.random() < style.core_share:
            core = np.maximum(core, _soft(distance + 0.55 * radius, 0.3))
    return lesion * anatomy.brain, core * anatomy.brain


def _spacing(shape: tuple[int, ...]) -> tuple[float, ...]:
    """Edge lengths of a voxel in reference units."""
    return tuple(reference / size for size, reference in zip(shape, REFERENCE_SHAPE, strict=False))


def _lesion_distance(
    points: Field, centre: Field, radius: float, style: SiteStyle, rng: np.random.Generator
) -> Field:
    """Signed distance (*grid) to one lesion of the site's shape."""
    dims = points.shape[0]
    if style.lesion_shape == "round":
        return _ellipsoid(points, centre, radius * rng.uniform(0.85, 1.15, dims))
    if style.lesion_shape == "elongated":
        stretch = np.array([1.8, 0.75, 0.75])[:dims]
        return _ellipsoid(points, centre, radius * stretch, _turn(dims, rng))
    num_parts, spread, size = (4, 0.8, 0.72) if style.lesion_shape == "lobulated" else (5, 2.2, 0.62)
    parts = [_ellipsoid(points, centre, np.full(dims, radius * (size if num_parts == 4 else 0.9)))]
    for _ in range(num_parts - 1):
        offset = rng.standard_normal(dims)
        offset *= spread * radius * rng.uniform(0.8, 1.2) / np.linalg.norm(offset)
        parts.append(_ellipsoid(points, centre + offset, np.full(dims, radius * size * rng.uniform(0.7, 1.2))))
    return np.minimum.reduce(parts)


def _add_decoys(
    t1: Field,
    flair: Field,
    points: Field,
    anatomy: _Anatomy,
    lesion: Field,
    style: SiteStyle,
    rng: np.random.Generator,
) -> tuple[Field, Field]:
    """Both channels with bleeds, cysts and vessels: each looks like a lesion in one channel at most."""
    dims = points.shape[0]
    near = ndimage.gaussian_filter(lesion, _voxels(1.5, lesion.shape))
    free = anatomy.brain & (near < 0.05)
    for _ in range(int(rng.integers(0, style.num_bright + 1))):
        radii = rng.uniform(1.2, 3.2) * rng.uniform(0.7, 1.3, dims)
        blob = _soft(_ellipsoid(points, _somewhere(free, points, rng), radii, _turn(dims, rng)), 0.35) * free
        t1, flair = t1 + abs(style.t1_lesion) * blob, flair + style.flair_lesion * blob
    for _ in range(int(rng.integers(0, style.num_cysts + 1))):
        radii = rng.uniform(1.2, 2.8) * rng.uniform(0.7, 1.3, dims)
        blob = _soft(_ellipsoid(points, _somewhere(free, points, rng), radii, _turn(dims, rng)), 0.35) * free
        t1, flair = t1 + style.t1_lesion * blob, flair + blob * (style.csf_flair - flair)
    for _ in range(int(rng.integers(0, style.num_vessels + 1))):
        flair = flair + 1.1 * style.flair_lesion * _vessel(points, _somewhere(free, points, rng), rng) * free
    return t1, flair


def _vessel(points: Field, start: Field, rng: np.random.Generator) -> Field:
    """Share of a curved tube in each voxel, about 12 units long and 1 unit thick."""
    dims = points.shape[0]
    step = rng.standard_normal(dims)
    bend = rng.standard_normal(dims) * 0.35
    distance = np.full(points.shape[1:], np.inf)
    for _ in range(12):
        step = step / np.linalg.norm(step)
        distance = np.minimum(distance, _ellipsoid(points, start, np.full(dims, 0.9)))
        start, step = start + step, step + bend
    return _soft(distance, 0.25)


# --- scanner and label -----------------------------------------------------------------------


def _scan(signal: Field, brain: Mask, style: SiteStyle, rng: np.random.Generator) -> Field:
    """What the site's scanner stores: contrast curve, blur, thick slices, bias field, Rician noise, gain."""
    shape = signal.shape
    field = np.clip(signal, 0.02, None) ** style.gamma
    field = ndimage.gaussian_filter(field, _voxels(style.blur, shape))
    field = field * np.exp(style.bias * 0.5 * np.clip(_smooth_noise(shape, 9.0, rng), -2, 2))
    noise = style.noise * rng.standard_normal((2, *shape))
    field = _thick_slices(np.hypot(field + noise[0], noise[1]), style.slice_factor)
    stored = field * STORED_WHITE * rng.uniform(0.7, 1.3)
    return np.where(brain, np.clip(stored, 1, 32767), 0.0)


def _thick_slices(field: Field, factor: int) -> Field:
    """Average ``factor`` neighbouring slices of the last axis, then interpolate back to the grid."""
    size = field.shape[-1]
    if factor == 1:
        return field
    starts = np.arange(0, size, factor)
    counts = np.diff(np.append(starts, size))
    thick = np.add.reduceat(field, starts, axis=-1) / counts
    wanted = (np.arange(size) - (factor - 1) / 2) / factor
    index = np.meshgrid(*[np.arange(length) for length in field.shape[:-1]], wanted, indexing="ij")
    back: Field = ndimage.map_coordinates(thick, index, order=1, mode="nearest")
    return back


def _draw_label(lesion: Field, brain: Mask, style: SiteStyle) -> Mask:
    """The lesion as the site's reader draws it; never empty, never outside the brain."""
    spacing = _spacing(lesion.shape)
    inside = lesion > min(0.5, 0.99 * float(lesion.max()))
    depth = ndimage.distance_transform_edt(inside, sampling=spacing)
    depth -= ndimage.distance_transform_edt(~inside, sampling=spacing)
    depth = ndimage.gaussian_filter(depth, _voxels(style.label_smooth, lesion.shape))
    depth[~brain] = -np.inf
    drawn: Mask = depth >= min(-style.label_shift, float(depth.max()))
    return drawn
