"""The configuration of a search: a federation, what is varied in it, how, and for how long.

Everything that decides what trials are compared by (seed, rounds, splits, sites) cannot be searched.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gcml_ray.config.section import Count, Name, NonNegative, Positive, Section
from gcml_ray.search.records import Objective

FIXED = {
    "name": "it names the trials",
    "data.datalist": "trials on other data cannot be compared",
    "data.split": "trials on other splits cannot be compared",
    "federation.rounds": "trials are compared by rounds",
    "federation.seed": "the best seed says nothing about the next one",
    "federation.sites": "trials on other sites cannot be compared",
    "federation.evaluate_every": "trials are compared in the rounds that all of them evaluate",
    "resources": "every trial gets the same places",
    "evaluation": "trials that are scored in another way cannot be compared",
    "tracking": "the search tracks its trials itself",
    "output": "every trial has its own folder",
}


class _Range(Section):
    """Low and high, both included."""

    low: float
    high: float

    @model_validator(mode="after")
    def _is_a_range(self) -> _Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class UniformDomain(_Range):
    """A decimal number, equally likely everywhere."""

    name: Literal["uniform"]


class LogUniformDomain(_Range):
    """A decimal number, equally likely in every decade: for weights and learning rates."""

    name: Literal["log_uniform"]
    low: Positive


class IntegerDomain(_Range):
    """A whole number from ``low`` to ``high``, both included."""

    name: Literal["integer"]
    low: int
    high: int


def _label(value: Any) -> str:
    """A section by its name and its other keys, ``push_k(k=2)``; anything else as JSON."""
    if not isinstance(value, dict) or "name" not in value:
        return json.dumps(value)
    others = ", ".join(f"{key}={json.dumps(item)}" for key, item in value.items() if key != "name")
    return f"{value['name']}({others})" if others else str(value["name"])


class ChoiceDomain(Section):
    """One of several values: numbers, names, or whole sections such as ``{name: push_k, k: 2}``."""

    name: Literal["choice"]
    values: Annotated[tuple[Any, ...], Field(strict=False, min_length=2)]

    @property
    def labels(self) -> tuple[str | int | float | bool | None, ...]:
        """The values as a searcher and a table can hold them: a section becomes a short text."""
        return tuple(_label(value) if isinstance(value, dict | list) else value for value in self.values)


Domain = Annotated[
    UniformDomain | LogUniformDomain | IntegerDomain | ChoiceDomain,
    Field(discriminator="name"),
]


class TpeSearcher(Section):
    """Optuna's tree-structured Parzen estimator; the first ``start_trials`` are drawn at random."""

    name: Literal["tpe"]
    seed: int = 0
    start_trials: Count = 8


class RandomSearcher(Section):
    """Independent draws."""

    name: Literal["random"]
    seed: int = 0


class GridSearcher(Section):
    """Every combination of ``choice`` values and ``integer`` ranges, once."""

    name: Literal["grid"]


class AshaScheduler(Section):
    """Asynchronous successive halving over rounds (Li 2020): at every rung the best 1/``reduction_factor`` go on.

    ``grace_rounds`` defaults to the warm-up and a quarter of all rounds.
    """

    name: Literal["asha"]
    grace_rounds: Count | None = None
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0


class MedianScheduler(Section):
    """Ends a trial whose best value is below the median of the others' running means (Golovin 2017)."""

    name: Literal["median"]
    grace_rounds: Count | None = None
    min_trials: Count = 3


class NoScheduler(Section):
    """Every trial runs to its end."""

    name: Literal["none"]


class BudgetConfig(Section):
    """When the search ends: after ``trials``, or ``hours`` from its start or resume.

    ``concurrent_trials`` bounds the trials that run at a time below what the cluster holds: for memory, as every
    trial has its own site processes.
    """

    trials: Count
    hours: Positive | None = None
    concurrent_trials: Count | None = None


class FinalConfig(Section):
    """The winner and the federation's own values are trained anew with each of these seeds, and only then tested.

    ``at_end``: as soon as the search has ended by itself, without ``gcml tune --final``.
    """

    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=3)] = (1, 2, 3)
    at_end: bool = False


class SearchConfig(Section):
    """One search, whole.

    ``base`` is a federation's configuration file, relative to this file; ``base_overrides`` are applied to it as by
    ``gcml run --set``. ``driver_cpus`` is the share of each trial's own driver, which computes next to nothing.
    """

    name: Name
    base: Name
    base_overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()
    folder: Name
    space: Annotated[dict[str, Domain], Field(min_length=1)]
    objective: Objective = "mean_dice"
    searcher: Annotated[TpeSearcher | RandomSearcher | GridSearcher, Field(discriminator="name")]
    scheduler: Annotated[AshaScheduler | MedianScheduler | NoScheduler, Field(discriminator="name")]
    budget: BudgetConfig
    final: FinalConfig = FinalConfig()
    driver_cpus: NonNegative = 0.0
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _keys_may_be_searched(self) -> SearchConfig:
        for key in self.space:
            parts = key.split(".")
            starts = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
            wrong = next((start for start in starts if start in FIXED), None)
            if wrong is not None or key in ("data", "federation"):
                reason = FIXED[wrong] if wrong else "it holds keys that trials are compared by; name the key within it"
                raise ValueError(f"space.{key} cannot be searched: {reason}")
            if whole := next((start for start in starts[:-1] if start in self.space), None):
                raise ValueError(f"space.{key} is part of space.{whole}: search the whole or its parts")
        return self

    @model_validator(mode="after")
    def _two_objectives_need_their_own_searcher(self) -> SearchConfig:
        if self.objective == "dice_and_megabytes" and (self.searcher.name, self.scheduler.name) != ("tpe", "none"):
            raise ValueError(
                "objective dice_and_megabytes needs searcher tpe and scheduler none: nothing else takes two objectives"
            )
        return self

    @model_validator(mode="after")
    def _a_grid_is_finite_and_affordable(self) -> SearchConfig:
        if not isinstance(self.searcher, GridSearcher):
            return self
        endless = [key for key, domain in self.space.items() if isinstance(domain, UniformDomain | LogUniformDomain)]
        if endless:
            raise ValueError(f"searcher grid needs name: choice or integer, but a range is given for {endless}")
        points = math.prod(len(grid_values(domain)) for domain in self.space.values())
        if points > self.budget.trials:
            raise ValueError(f"the grid has {points} points, budget.trials is {self.budget.trials}; raise it")
        return self


def grid_values(domain: Domain) -> tuple[Any, ...]:
    """All values of a domain that has finitely many."""
    if isinstance(domain, ChoiceDomain):
        return domain.labels
    assert isinstance(domain, IntegerDomain)
    return tuple(range(domain.low, domain.high + 1))
