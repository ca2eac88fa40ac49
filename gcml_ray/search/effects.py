"""How a search's objective differs between values of each searched key: what mattered, by how much, how surely.

Trials that the scheduler cut are shorter, so trials are compared at the newest round that all evaluated ones reached.
These are comparisons between groups of trials that differ in the other keys too: hints, not proofs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from gcml_ray.search.records import SearchRecord, TrialRecord, format_value

MIN_TRIALS = 4


@dataclass(frozen=True)
class Group:
    """Trials whose values of a key belong together: their number, mean objective and its standard deviation."""

    name: str
    num_trials: int
    mean: float
    sd: float


@dataclass(frozen=True)
class Effect:
    """A key: its groups, the best first; ``share`` of the variance that it explains, NaN where unknown."""

    key: str
    share: float
    groups: tuple[Group, ...]

    @property
    def difference(self) -> float:
        """Between the means of the best and the worst group."""
        return self.groups[0].mean - self.groups[-1].mean

    @property
    def spread(self) -> float:
        """Standard deviation of the trials within their groups, pooled."""
        degrees = sum(group.num_trials - 1 for group in self.groups)
        squares = sum((group.num_trials - 1) * group.sd**2 for group in self.groups if group.num_trials > 1)
        return math.sqrt(squares / degrees) if degrees else math.nan

    @property
    def is_clear(self) -> bool:
        """Whether the difference is more than twice its standard error."""
        best, worst = self.groups[0], self.groups[-1]
        error = self.spread * math.sqrt(1 / best.num_trials + 1 / worst.num_trials)
        return self.difference > 2 * error


def comparable(search: SearchRecord) -> list[TrialRecord]:
    """The evaluated trials that ended by themselves or were cut for their values.

    Not those that run, failed or were stopped with the search: one that ended in its second round would have all
    others compared there.
    """
    return [trial for trial in search.trials if trial.points and trial.status in ("finished", "cut")]


def compared_round(search: SearchRecord) -> int:
    """The newest round that all :func:`comparable` trials have reached; 0 where there are none."""
    return min((trial.last_round for trial in comparable(search)), default=0)


def value_at(trial: TrialRecord, round_number: int, search: SearchRecord) -> float:
    """The objective at the newest evaluated round up to a round."""
    points = [point for point in trial.points if point.round_number <= round_number] or list(trial.points[:1])
    return points[-1].value(search.objective)


def effects(search: SearchRecord) -> tuple[Effect, ...]:
    """Every searched key, the one that matters most first; empty where there are too few trials."""
    trials = comparable(search)
    if len(trials) < MIN_TRIALS:
        return ()
    common = compared_round(search)
    values = [value_at(trial, common, search) for trial in trials]
    found = []
    for key in sorted({key for trial in trials for key in trial.params}):
        own = [(trial.params[key], value) for trial, value in zip(trials, values, strict=True) if key in trial.params]
        groups = _groups([param for param, _ in own], [value for _, value in own])
        if len(groups) > 1:
            found.append(Effect(key, search.importances.get(key, math.nan), groups))
    return tuple(sorted(found, key=lambda effect: (-_or_zero(effect.share), -effect.difference)))


def describe(effect: Effect) -> str:
    """One sentence."""
    best, worst = effect.groups[0], effect.groups[-1]
    share = "" if math.isnan(effect.share) else f" explains {100 * effect.share:.0f} % of the differences;"
    words = (
        f"{effect.key}{share} {best.name} gave {best.mean:.3f} on average, {worst.name} {worst.mean:.3f} "
        f"({effect.difference:+.3f}, with a spread between trials of {effect.spread:.3f})"
    )
    return f"{words}." if effect.is_clear else f"{words}: chance could explain it."


def _groups(params: Sequence[object], values: Sequence[float]) -> tuple[Group, ...]:
    """A group a value, or the lower and the upper half of many numbers; the highest mean first."""
    numbers = [param for param in params if isinstance(param, int | float) and not isinstance(param, bool)]
    named: dict[str, list[float]] = {}
    if len(numbers) == len(params) and len(set(numbers)) > MIN_TRIALS:
        middle = median(numbers)
        lower, upper = f"below {format_value(middle)}", f"{format_value(middle)} or more"
        for number, value in zip(numbers, values, strict=True):
            named.setdefault(lower if number < middle else upper, []).append(value)
    else:
        for param, value in zip(params, values, strict=True):
            named.setdefault(format_value(param), []).append(value)
    groups = [
        Group(name, len(own), fmean(own), stdev(own) if len(own) > 1 else math.nan) for name, own in named.items()
    ]
    return tuple(sorted(groups, key=lambda group: -group.mean))


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
