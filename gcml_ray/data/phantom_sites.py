"""How the sites of the phantom differ: scanner, lesions, drawing habits and number of training cases.

Lengths are in units of the reference grid, 36 x 32 x 20 voxels; :mod:`gcml_ray.data.phantom` scales
them to the grid that is asked for. Signals are fractions of the brightest tissue.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gcml_ray.seeding import numpy_generator

LesionShape = Literal["round", "elongated", "lobulated", "scattered"]
LESION_SHAPES: tuple[LesionShape, ...] = ("round", "elongated", "lobulated", "scattered")
DERIVED_NAME = re.compile(r"site[0-9]{1,3}")


@dataclass(frozen=True)
class SiteStyle:
    """One site of the phantom.

    ``t1_lesion`` and ``flair_lesion`` are added to the tissue's signal inside a lesion. Decoys look like
    a lesion in one channel and not in the other: ``num_bright`` bleeds (bright in both), ``num_cysts``
    (dark in both) and ``num_vessels`` (tubes, bright in flair only) are the largest counts of a case.
    ``core_share`` is the chance that a lesion has a core, dark in both channels, that belongs to it.
    ``slice_factor`` slices of the last axis are averaged into one before the return to the common grid.
    ``label_shift`` moves the drawn boundary outwards (positive: over-drawn), ``label_smooth`` rounds it.
    """

    num_train: int
    t1_lesion: float
    flair_lesion: float
    csf_flair: float
    white_t1: float
    white_flair: float
    gamma: float
    noise: float
    bias: float
    blur: float
    slice_factor: int
    lesion_shape: LesionShape
    lesion_radius: tuple[float, float]
    core_share: float
    num_bright: int
    num_cysts: int
    num_vessels: int
    label_shift: float
    label_smooth: float


STYLES: dict[str, SiteStyle] = {
    "north": SiteStyle(
        num_train=8,
        t1_lesion=-0.3,
        flair_lesion=0.38,
        csf_flair=0.15,
        white_t1=0.80,
        white_flair=0.42,
        gamma=1.0,
        noise=0.03,
        bias=0.2,
        blur=0.4,
        slice_factor=1,
        lesion_shape="round",
        lesion_radius=(3.6, 5.8),
        core_share=0.2,
        num_bright=2,
        num_cysts=1,
        num_vessels=1,
        label_shift=0.4,
        label_smooth=0.8,
    ),
    "east": SiteStyle(
        num_train=4,
        t1_lesion=-0.16,
        flair_lesion=0.4,
        csf_flair=0.20,
        white_t1=0.70,
        white_flair=0.50,
        gamma=0.8,
        noise=0.04,
        bias=0.3,
        blur=0.4,
        slice_factor=1,
        lesion_shape="lobulated",
        lesion_radius=(3.4, 5.0),
        core_share=0.2,
        num_bright=2,
        num_cysts=1,
        num_vessels=2,
        label_shift=-0.7,
        label_smooth=0.5,
    ),
    "south": SiteStyle(
        num_train=3,
        t1_lesion=-0.3,
        flair_lesion=0.3,
        csf_flair=0.60,
        white_t1=0.85,
        white_flair=0.40,
        gamma=1.2,
        noise=0.035,
        bias=0.25,
        blur=0.3,
        slice_factor=2,
        lesion_shape="elongated",
        lesion_radius=(3.6, 5.2),
        core_share=0.15,
        num_bright=1,
        num_cysts=2,
        num_vessels=1,
        label_shift=1.0,
        label_smooth=0.8,
    ),
    "west": SiteStyle(
        num_train=2,
        t1_lesion=-0.28,
        flair_lesion=0.36,
        csf_flair=0.10,
        white_t1=0.75,
        white_flair=0.46,
        gamma=1.0,
        noise=0.045,
        bias=0.35,
        blur=0.5,
        slice_factor=1,
        lesion_shape="scattered",
        lesion_radius=(3.2, 4.6),
        core_share=0.15,
        num_bright=2,
        num_cysts=1,
        num_vessels=2,
        label_shift=-0.6,
        label_smooth=0.5,
    ),
}


def is_known(site: str) -> bool:
    """Whether the phantom has a site of this name: one of ``STYLES``, or ``site1`` ... ``site999``."""
    return site in STYLES or DERIVED_NAME.fullmatch(site) is not None


def style_of(site: str, seed: int) -> SiteStyle:
    """The style of a site: from the table, or drawn from the seed and the name (``site5``)."""
    return STYLES[site] if site in STYLES else _derived_style(numpy_generator(seed, "phantom_style", site))


def _derived_style(rng: np.random.Generator) -> SiteStyle:
    """A style drawn from the range that the table spans."""

    def between(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 3)

    def count(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    radius = between(3.2, 3.6)
    return SiteStyle(
        num_train=count(2, 8),
        t1_lesion=-between(0.16, 0.30),
        flair_lesion=between(0.30, 0.40),
        csf_flair=between(0.10, 0.60),
        white_t1=between(0.70, 0.85),
        white_flair=between(0.40, 0.50),
        gamma=between(0.8, 1.2),
        noise=between(0.03, 0.05),
        bias=between(0.20, 0.35),
        blur=between(0.3, 0.5),
        slice_factor=count(1, 2),
        lesion_shape=LESION_SHAPES[count(0, len(LESION_SHAPES) - 1)],
        lesion_radius=(radius, radius + between(1.4, 2.2)),
        core_share=between(0.15, 0.20),
        num_bright=count(1, 2),
        num_cysts=count(1, 2),
        num_vessels=count(1, 2),
        label_shift=between(-0.7, 1.0),
        label_smooth=between(0.5, 0.8),
    )
