"""How long a run has taken, and how long it will take."""

from __future__ import annotations

import math
import time
from datetime import timedelta

from gcml_ray.config import Config
from gcml_ray.gossip.phases import rounds_left
from gcml_ray.prediction.averages import mean
from gcml_ray.records import RoundRecord

LONGEST_S = 10 * 365 * 86400.0


class Clock:
    """Time left: from past rounds of the same phase; without a barrier from the pace of the slowest site."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, list[float]] = {}
        self._own_rounds: dict[str, int] = {}
        self._began_at: dict[str, tuple[int, float]] = {}  # by site: its first round here, and the seconds before it

    @property
    def elapsed(self) -> str:
        """Time since the run began."""
        return _in_words(time.monotonic() - self._began)

    def add(self, record: RoundRecord) -> None:
        """Notes how long a round took."""
        for report in record.trained:
            first, _ = self._began_at.get(report.site, (math.inf, 0.0))
            if report.round_number < first:  # new here, or back from an older checkpoint
                self._began_at[report.site] = (report.round_number, self._passed)
            self._own_rounds[report.site] = report.round_number
        self._seconds.setdefault(record.plan.phase, []).append(record.seconds)

    @property
    def _passed(self) -> float:
        """Seconds of all rounds up to now."""
        return sum(map(sum, self._seconds.values()))

    def left(self, config: Config, round_number: int) -> str:
        """An estimate of the time that the rounds after this one take; empty before the first."""
        if not self._seconds:
            return ""
        everything = [value for values in self._seconds.values() for value in values]
        if config.federation.mode == "async":
            to_come = [
                (config.federation.rounds - self._own_rounds[site])
                * (self._passed - before)
                / (self._own_rounds[site] - first + 1)
                for site, (first, before) in self._began_at.items()
            ]
            return _in_words(max(to_come)) if to_come else ""
        lengths = {phase: mean(values[-10:]) for phase, values in self._seconds.items()}
        left = rounds_left(config.federation, round_number)
        return _in_words(sum(rounds * lengths.get(phase, mean(everything)) for phase, rounds in left.items()))


def _in_words(seconds: float) -> str:
    if seconds > LONGEST_S:
        return "years"
    return str(timedelta(seconds=round(seconds)))
