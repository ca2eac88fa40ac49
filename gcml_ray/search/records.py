"""Records of a hyperparameter search: what a trial reported, and how it ended. No tensors, no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

Objective = Literal["mean_dice", "worst_dice", "dice_per_megabyte", "dice_and_megabytes"]
TrialStatus = Literal["waiting", "running", "finished", "cut", "stopped", "failed"]


class _SiteDice:
    """Dice by site, and what a search looks at of it."""

    site_dice: dict[str, float]

    @property
    def mean_dice(self) -> float:
        """Mean over the sites."""
        return sum(self.site_dice.values()) / len(self.site_dice)

    @property
    def worst_dice(self) -> float:
        """Of the site that is served worst."""
        return min(self.site_dice.values())


@dataclass(frozen=True)
class TrialPoint(_SiteDice):
    """A trial after one evaluated round.

    ``site_dice``: validation Dice of each site's personalised model, the best one so far; 0 before the first.
    ``megabytes``: what all pushes so far sent over the wire, refused ones included.
    """

    round_number: int
    site_dice: dict[str, float]
    megabytes: float
    seconds: float

    def value(self, objective: Objective) -> float:
        """The number that the search maximises.

        ``dice_per_megabyte`` is mean Dice / (1 + megabytes sent per site): the 1 keeps a federation that sends
        nothing finite. ``dice_and_megabytes`` has two: this is mean Dice, which ranks where one number must.
        """
        if objective == "dice_per_megabyte":
            return self.mean_dice / (1 + self.megabytes / len(self.site_dice))
        return self.worst_dice if objective == "worst_dice" else self.mean_dice


@dataclass(frozen=True)
class TrialRecord:
    """One trial. ``number`` counts from 1 in the order of their making; ``reason`` says why it failed.

    ``status``: ``cut`` by the scheduler, ``stopped`` with the search (by the time budget or by a person).
    ``params``: the values that were drawn, by configuration key.
    """

    number: int
    trial_id: str
    status: TrialStatus
    params: dict[str, Any] = field(default_factory=dict)
    points: tuple[TrialPoint, ...] = ()
    reason: str = ""

    @property
    def last_round(self) -> int:
        """The newest evaluated round; 0 before the first."""
        return self.points[-1].round_number if self.points else 0

    def value(self, objective: Objective) -> float:
        """What the trial reached; NaN before its first evaluation."""
        return self.points[-1].value(objective) if self.points else math.nan


@dataclass(frozen=True)
class SearchRecord:
    """A search: its trials, and how much each searched key matters (shares that sum to 1; empty where unknown).

    ``default``: the federation's own values as a trial's; empty in a search that did not try them.
    """

    name: str
    objective: Objective
    rounds: int
    trials: tuple[TrialRecord, ...]
    importances: dict[str, float] = field(default_factory=dict)
    default: dict[str, Any] = field(default_factory=dict)

    @property
    def default_trial(self) -> TrialRecord | None:
        """The trial with the federation's own values."""
        return next((trial for trial in self.trials if self.default and trial.params == self.default), None)

    @property
    def best(self) -> TrialRecord | None:
        """The finished trial with the highest objective, the earlier one of equals; None where none finished."""
        finished = [trial for trial in self.trials if trial.status == "finished" and trial.points]
        return max(finished, key=lambda trial: trial.value(self.objective), default=None)

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The finished trials that no other one beats in both mean Dice and megabytes (Pareto front)."""
        finished = [trial for trial in self.trials if trial.status == "finished" and trial.points]
        return tuple(trial for trial in finished if not any(_beats(other, trial) for other in finished))


def _beats(one: TrialRecord, other: TrialRecord) -> bool:
    """Whether a trial is nowhere worse than another one, and somewhere better."""
    mine, its = one.points[-1], other.points[-1]
    is_as_good = mine.mean_dice >= its.mean_dice and mine.megabytes <= its.megabytes
    return is_as_good and (mine.mean_dice, mine.megabytes) != (its.mean_dice, its.megabytes)


@dataclass(frozen=True)
class FinalScore(_SiteDice):
    """Test Dice by site of the personalised models that one seed gave; mean over cases and classes."""

    seed: int
    site_dice: dict[str, float]


@dataclass(frozen=True)
class FinalRecord:
    """The one test of a search's winner. ``identity``: of its configuration, seed 0 in its place.

    ``default_scores``: of the federation's own values, with the same seeds; empty where they won.
    """

    name: str
    identity: str
    scores: tuple[FinalScore, ...]
    default_scores: tuple[FinalScore, ...] = ()

    @property
    def gain(self) -> float:
        """How much higher the winner's mean test Dice is than that of the federation's own values; NaN without."""
        if not self.default_scores:
            return math.nan
        return fmean(mean_dices(self.scores)) - fmean(mean_dices(self.default_scores))

    @property
    def spread(self) -> float:
        """Standard deviation of mean test Dice over the seeds, the larger of the two's."""
        return max(stdev(mean_dices(scores)) for scores in (self.scores, self.default_scores) if scores)

    @property
    def verdict(self) -> str:
        """Whether the search was worth it, in a sentence."""
        if not self.default_scores:
            return "The federation's own values won the search: there is nothing to gain from other ones."
        pairs = zip(mean_dices(self.scores), mean_dices(self.default_scores), strict=True)
        ahead = sum(winner > default for winner, default in pairs)
        numbers = (
            f"{self.gain:+.3f} test Dice, mean of sites, with a spread over seeds of {self.spread:.3f}; "
            f"ahead with {ahead} of {len(self.scores)} seeds"
        )
        if self.gain > self.spread:
            return f"The winner beats the federation's own values by more than the spread ({numbers})."
        if self.gain < -self.spread:
            return (
                f"The winner is worse than the federation's own values by more than the spread ({numbers}): keep those."
            )
        return (
            f"The winner and the federation's own values are within the spread of each other ({numbers}): keep those."
        )


def mean_dices(scores: Sequence[FinalScore]) -> list[float]:
    """Mean Dice of the sites, a seed each."""
    return [score.mean_dice for score in scores]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's shortest end, in whole parts, that no other of these keys has: ``name``, or ``network.name``."""
    parts = {key: key.split(".") for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        is_own = (all(other[-length:] != own[-length:] for other in others) for length in range(1, len(own)))
        length = next((length for length, alone in enumerate(is_own, start=1) if alone), len(own))
        names[key] = ".".join(own[-length:])
    return names


def describe_params(params: dict[str, Any]) -> str:
    """Drawn values by the ends of their keys."""
    names = short_names(params)
    return ", ".join(f"{names[key]}={format_value(value)}" for key, value in sorted(params.items()))


def format_value(value: Any) -> str:
    """A drawn value, or an objective, in few characters."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)
