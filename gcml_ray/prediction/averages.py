"""The averages of the tables: of what is defined, since distances are NaN where a mask is empty."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gcml_ray.records import CaseScore


def mean(values: Iterable[float]) -> float:
    """Mean without the NaNs; NaN if nothing is left."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def case_dice(scores: Iterable[CaseScore], site: str, model: str) -> dict[str, float]:
    """Mean Dice over classes of a site's model, by case."""
    by_case: dict[str, list[float]] = {}
    for score in scores:
        if (score.site, score.model) == (site, model):
            by_case.setdefault(score.case, []).append(score.dice)
    return {case: mean(values) for case, values in by_case.items()}
