"""How the sites of an inspected data set differ: what was measured by site, and what share of it the site explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from gcml_ray.inspection.facts import CaseFacts, Inspection

AXIS_NAMES = ("first", "second", "third")
WORDS = ((0.4, "very different"), (0.1, "somewhat different"), (-math.inf, "alike"))


@dataclass(frozen=True)
class Quantity:
    """One number a case, grouped by site. ``kind`` is ``size``, ``spacing``, ``intensity``, ``label`` or ``pieces``.

    ``name`` is what a newcomer reads, ``key`` the channel, label value or axis that it belongs to.
    """

    kind: str
    key: str
    name: str
    unit: str
    by_site: dict[str, tuple[float, ...]]

    @property
    def site_share(self) -> float:
        """See :func:`site_share`."""
        return site_share(list(self.by_site.values()))

    @property
    def verdict(self) -> str:
        """In words."""
        return "cannot be told" if math.isnan(self.site_share) else _word(self.site_share)

    @property
    def is_constant(self) -> bool:
        """Whether all cases have the same value."""
        return len({value for values in self.by_site.values() for value in values}) <= 1


def site_share(groups: Sequence[Sequence[float]]) -> float:
    """How much of the variation between cases is explained by knowing the site, 0 to 1; NaN with too few cases.

    Share of the variance of the ranks that lies between sites, less what chance alone gives (epsilon squared of the
    Kruskal-Wallis test). Ranks, because volumes and intensities have long tails.
    """
    used = [[value for value in group if math.isfinite(value)] for group in groups]
    used = [group for group in used if group]
    num_cases = sum(map(len, used))
    if len(used) < 2 or num_cases <= len(used):
        return math.nan
    ranks = rankdata(np.concatenate(used))
    total = float(((ranks - ranks.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    parts = np.split(ranks, np.cumsum([len(group) for group in used])[:-1])
    within = sum(float(((part - part.mean()) ** 2).sum()) for part in parts)
    return max(0.0, 1 - (within / (num_cases - len(used))) / (total / (num_cases - 1)))


def quantities(inspection: Inspection) -> tuple[Quantity, ...]:
    """Everything that was measured, in the order in which it is shown; lists without values are left out."""
    found = [*_grid_quantities(inspection)]
    for name in inspection.channel_names:
        found.append(_quantity(inspection, "intensity", name, f"Brightness of {name}", "intensity", _median_of(name)))
    values = inspection.label_values
    for value in values:
        label = "the label" if len(values) == 1 else f"label {value}"
        found.append(
            _quantity(inspection, "label", str(value), f"Size of {label}", inspection.size_unit, _size_of(value))
        )
        found.append(_quantity(inspection, "pieces", str(value), f"Pieces of {label}", "pieces", _pieces_of(value)))
    return tuple(each for each in found if any(each.by_site.values()))


def by_verdict(found: Sequence[Quantity]) -> dict[str, list[Quantity]]:
    """Verdict -> quantities, the most different first."""
    known = sorted((each for each in found if not math.isnan(each.site_share)), key=lambda each: -each.site_share)
    return {word: [each for each in known if each.verdict == word] for _, word in WORDS}


def _grid_quantities(inspection: Inspection) -> list[Quantity]:
    num_axes = max((len(case.shape) for case in inspection.cases if case.shape is not None), default=0)
    found = []
    for axis in range(num_axes):
        name = f"Image size ({AXIS_NAMES[axis]} axis)"
        found.append(_quantity(inspection, "size", str(axis), name, "voxels", _shape_along(axis)))
    for axis in range(num_axes if inspection.spacing_is_real else 0):
        name = f"Voxel size ({AXIS_NAMES[axis]} axis)"
        found.append(_quantity(inspection, "spacing", str(axis), name, "mm", _spacing_along(axis)))
    return found


def _quantity(  # noqa: PLR0917 - a row of a table
    inspection: Inspection, kind: str, key: str, name: str, unit: str, value_of: Callable[[CaseFacts], float]
) -> Quantity:
    by_site = {}
    for site in inspection.sites:
        values = [value_of(case) for case in inspection.of_site(site)]
        by_site[site] = tuple(value for value in values if not math.isnan(value))
    return Quantity(kind, key, name, unit, by_site)


def _median_of(name: str) -> Callable[[CaseFacts], float]:
    return lambda case: next((each.median for each in case.channels if each.name == name), math.nan)


def _size_of(value: int) -> Callable[[CaseFacts], float]:
    """0 where a case was read and does not hold the value."""
    return lambda case: sum(each.size for each in case.labels if each.value == value) if case.channels else math.nan


def _pieces_of(value: int) -> Callable[[CaseFacts], float]:
    return lambda case: (
        sum(each.num_pieces for each in case.labels if each.value == value) if case.channels else math.nan
    )


def _shape_along(axis: int) -> Callable[[CaseFacts], float]:
    return lambda case: _along(case.shape, axis)


def _spacing_along(axis: int) -> Callable[[CaseFacts], float]:
    return lambda case: _along(case.spacing_mm, axis)


def _along(sides: Sequence[float] | None, axis: int) -> float:
    """NaN where a case has no such axis, or is not known."""
    return float(sides[axis]) if sides is not None and axis < len(sides) else math.nan


def _word(share: float) -> str:
    return next(word for least, word in WORDS if share >= least)
