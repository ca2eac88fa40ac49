"""The averages of the tables: of what is defined, since distances are NaN where a mask is empty."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

from gcml_ray.records import CaseScore


def mean(values: Iterable[float]) -> float:
    """Mean without the NaNs; NaN if nothing is left."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def mean_change(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Mean over the sites that have a value before and after of the difference; NaN if none has."""
    return mean(after[site] - before[site] for site in after if site in before)


def mean_over(sites: Iterable[str], values: Mapping[str, float]) -> float:
    """Mean of the values of exactly these sites; NaN if one has none, as means over other sites do not compare."""
    return mean(values.values()) if values.keys() == set(sites) else math.nan


def site_means(
    scores: Iterable[CaseScore], value: Callable[[CaseScore], float] = operator.attrgetter("dice")
) -> dict[str, float]:
    """Mean by site over cases and classes, of Dice or another value."""
    by_site: dict[str, list[float]] = {}
    for score in scores:
        by_site.setdefault(score.site, []).append(value(score))
    return {site: mean(values) for site, values in sorted(by_site.items())}


def case_dice(scores: Iterable[CaseScore], site: str, model: str) -> dict[str, float]:
    """Mean Dice over classes of a site's model, by case."""
    by_case: dict[str, list[float]] = {}
    for score in scores:
        if (score.site, score.model) == (site, model):
            by_case.setdefault(score.case, []).append(score.dice)
    return {case: mean(values) for case, values in by_case.items()}


def cross_site_dice(seeds: Sequence[Sequence[CaseScore]]) -> dict[tuple[str, str], float]:
    """Mean Dice by (whose model, where): over cases and classes, then over seeds."""
    by_seed: dict[tuple[str, str], list[float]] = {}
    for scores in seeds:
        by_pair: dict[tuple[str, str], list[float]] = {}
        for score in scores:
            by_pair.setdefault((score.model, score.site), []).append(score.dice)
        for pair, values in by_pair.items():
            by_seed.setdefault(pair, []).append(mean(values))
    means = {pair: mean(values) for pair, values in by_seed.items()}
    return {pair: value for pair, value in means.items() if not math.isnan(value)}
