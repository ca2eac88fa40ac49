"""One case of the phantom: anatomy, lesions and their decoys, the scan, and the label as a reader draws it.

D is the number of axes (2 or 3). A field has the grid's shape, (H, W) or (H, W, slices); points are
(D, *grid). Lengths are in reference units, one voxel of the grid 36 x 32 (x 20), whatever the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gcml_ray.data.phantom_sites import SiteStyle

Field = NDArray[np.float64]
Mask = NDArray[np.bool_]

REFERENCE_SHAPE = (36, 32, 20)
BRAIN_RADII = (16.2, 14.2, 9.0)
# Lesions of several balls: number of satellites, their distance, radius of the middle ball and of theirs.
CLUSTERS = {"lobulated": (3, 0.8, 0.72, 0.72), "scattered": (4, 2.2, 0.9, 0.7)}
STORED_WHITE = 1000.0  # stored integers per unit of signal, before the gain of a case


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
    near = ndimage.gaussian_filter(lesion, _voxels(1.5, shape))
    free = anatomy.brain & (near < 0.05)
    t1, flair = _add_decoys(_tissue(anatomy, style), points, free, style=style, rng=rng)
    texture = 1 + 0.15 * _smooth_noise(shape, 1.5, rng)
    strength = rng.uniform(0.8, 1.25, 2)
    t1 = t1 + strength[0] * style.t1_lesion * lesion * texture - 0.25 * core
    flair = flair + strength[1] * style.flair_lesion * lesion * texture - (style.flair_lesion + 0.2) * core
    channels = (_scan(t1, anatomy.brain, style, rng), _scan(flair, anatomy.brain, style, rng))
    return channels, _draw_label(lesion, anatomy.brain, style)


def _tissue(anatomy: _Anatomy, style: SiteStyle) -> Field:
    """Signal (2, *grid) of healthy tissue and fluid in t1 and flair."""
    t1 = 0.55 + (style.white_t1 - 0.55) * anatomy.white
    flair = 0.58 + (style.white_flair - 0.58) * anatomy.white
    return np.stack([t1 + anatomy.csf * (0.18 - t1), flair + anatomy.csf * (style.csf_flair - flair)])


def _points(shape: tuple[int, ...]) -> Field:
    """Coordinates (D, *grid) from the grid's middle, in voxels of the reference grid 36 x 32 (x 20)."""
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
    field -= field.mean()
    field /= np.maximum(field.std(), 1e-9)
    return field


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
    dims, shape = points.ndim - 1, points.shape[1:]
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


def _lesions(points: Field, anatomy: _Anatomy, style: SiteStyle, rng: np.random.Generator) -> tuple[Field, Field]:
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


def _lesion_distance(points: Field, centre: Field, radius: float, style: SiteStyle, rng: np.random.Generator) -> Field:
    """Signed distance (*grid) to one lesion of the site's shape."""
    dims = points.ndim - 1
    if style.lesion_shape == "round":
        return _ellipsoid(points, centre, radius * rng.uniform(0.85, 1.15, dims))
    if style.lesion_shape == "elongated":
        stretch = np.array([1.8, 0.75, 0.75])[:dims]
        return _ellipsoid(points, centre, radius * stretch, _turn(dims, rng))
    num_satellites, spread, middle, size = CLUSTERS[style.lesion_shape]
    parts = [_ellipsoid(points, centre, np.full(dims, middle * radius))]
    for _ in range(num_satellites):
        offset = rng.standard_normal(dims)
        offset *= spread * radius * rng.uniform(0.8, 1.2) / np.linalg.norm(offset)
        parts.append(_ellipsoid(points, centre + offset, np.full(dims, size * radius * rng.uniform(0.7, 1.2))))
    nearest: Field = np.minimum.reduce(parts)
    return nearest


def _add_decoys(signals: Field, points: Field, free: Mask, *, style: SiteStyle, rng: np.random.Generator) -> Field:
    """Both channels (2, *grid) with bleeds, cysts and vessels: each looks like a lesion in one channel at most."""
    t1, flair = signals
    for _ in range(int(rng.integers(0, style.num_bright + 1))):
        blob = _blob(points, free, (1.2, 3.2), rng)
        t1, flair = t1 - style.t1_lesion * blob, flair + style.flair_lesion * blob
    for _ in range(int(rng.integers(0, style.num_cysts + 1))):
        blob = _blob(points, free, (1.2, 2.8), rng)
        t1, flair = t1 + style.t1_lesion * blob, flair + blob * (style.csf_flair - flair)
    for _ in range(int(rng.integers(0, style.num_vessels + 1))):
        flair = flair + 1.1 * style.flair_lesion * _vessel(points, _somewhere(free, points, rng), rng) * free
    return np.stack([t1, flair])


def _blob(points: Field, free: Mask, radius: tuple[float, float], rng: np.random.Generator) -> Field:
    """Share of an ellipsoid somewhere in the free space in each voxel."""
    dims = points.ndim - 1
    radii = rng.uniform(*radius) * rng.uniform(0.7, 1.3, dims)
    blob: Field = _soft(_ellipsoid(points, _somewhere(free, points, rng), radii, _turn(dims, rng)), 0.35) * free
    return blob


def _vessel(points: Field, start: Field, rng: np.random.Generator) -> Field:
    """Share of a curved tube in each voxel, about 12 units long and 1 unit thick."""
    dims = points.ndim - 1
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
