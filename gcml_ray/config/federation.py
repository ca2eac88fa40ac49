"""The ``federation`` section of a configuration: rounds and clocks, and who takes part when."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from gcml_ray.config.section import AtLeastOne, Count, CountOrZero, Names, NonNegative, Positive, Section


class AttendanceConfig(Section):
    """When a site takes part: from before round ``joins`` until before round ``leaves``."""

    joins: Count = 1
    leaves: Count | None = None

    @model_validator(mode="after")
    def _leaves_later(self) -> AttendanceConfig:
        if self.leaves is not None and self.leaves <= self.joins:
            raise ValueError(f"leaves {self.leaves} must come after joins {self.joins}")
        return self


class FederationConfig(Section):
    """Rounds and clocks. ``rounds`` counts them all: warm-up, exchange and cool-down.

    ``warmup_rounds`` defaults to 10 % of the rounds, ``cooldown_rounds`` to 25 % (both rounded down).
    The round timeout bounds one round's training of one site, evaluation included.
    ``mode: async`` has no barrier: each site goes at its own pace, and takes no push that is more than
    ``max_staleness`` rounds behind it; what such a push weighs in a merge falls with its staleness s as
    (1 + s)^-``staleness_exponent``.

    Clocks: after ``timeout_factor`` times its typical time a call has failed (never before a minute, never after
    the timeout). In a synchronous round nobody waits longer than ``late_factor`` times the slowest site's typical
    time (at least ten seconds more than it), nor than ``round_deadline_s``. A lost site may come back within
    ``rejoin_timeout_s``. After ``time_limit_s`` of rounds, over all resumes, no further one begins.
    """

    rounds: Count
    local_steps: Count
    warmup_rounds: CountOrZero | None = None
    cooldown_rounds: CountOrZero | None = None
    common_init: bool = True
    mode: Literal["sync", "async"] = "sync"
    max_staleness: CountOrZero = 10
    staleness_exponent: NonNegative = 0.5
    seed: int = 0
    sites: Names | None = None
    schedule: dict[str, AttendanceConfig] = Field(default={})
    evaluate_every: Count = 1
    start_timeout_s: Positive = 600.0
    push_timeout_s: Positive = 120.0
    round_timeout_s: Positive = 3600.0
    rejoin_timeout_s: Positive = 3600.0
    timeout_factor: AtLeastOne = 10.0
    late_factor: AtLeastOne | None = 2.0
    round_deadline_s: Positive | None = None
    time_limit_s: Positive | None = None

    @property
    def num_warmup(self) -> int:
        """Rounds at the start in which every site trains alone."""
        return math.floor(self.rounds * 0.1) if self.warmup_rounds is None else self.warmup_rounds

    @property
    def num_cooldown(self) -> int:
        """Rounds at the end in which every site trains alone."""
        return math.floor(self.rounds * 0.25) if self.cooldown_rounds is None else self.cooldown_rounds

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> FederationConfig:
        for key in ("max_staleness", "staleness_exponent"):
            if self.mode == "sync" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} would be ignored: with mode sync no push is behind its receiver")
        if self.mode == "async" and self.round_deadline_s is not None:
            raise ValueError("round_deadline_s would be ignored: with mode async no site waits for another")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> FederationConfig:
        if self.num_warmup + self.num_cooldown > self.rounds:
            raise ValueError(
                f"warmup_rounds {self.num_warmup} + cooldown_rounds {self.num_cooldown} exceed rounds {self.rounds}"
            )
        return self
