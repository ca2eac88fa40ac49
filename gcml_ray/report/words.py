"""What plots and pages say in the same words: orders, names of models and phases, differences and sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from gcml_ray.records import BEFORE_GOSSIP, ENSEMBLE, PERSONALISED, SHARED, RoundRecord
from gcml_ray.search.records import TrialStatus

MODELS = {
    PERSONALISED: "personalised",
    BEFORE_GOSSIP: "before gossip",
    SHARED: "shared model",
    ENSEMBLE: "with its peers",
}
PHASES = {"warmup": "warm-up", "exchange": "exchange", "cooldown": "cool-down"}
ENDINGS: dict[TrialStatus, str] = {  # of a trial of a search
    "finished": "finished",
    "cut": "cut by the scheduler",
    "stopped": "stopped with the search",
    "running": "running",
    "waiting": "waiting",
    "failed": "failed",
}
OBJECTIVES = {  # of a search, along an axis
    "mean_dice": "validation Dice, mean of sites",
    "worst_dice": "validation Dice, worst site",
    "dice_per_megabyte": "validation Dice / (1 + MB a site)",
    "dice_and_megabytes": "validation Dice, mean of sites",
}


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """By name, ``site2`` before ``site10``."""

    def key(name: str) -> list[tuple[bool, str]]:
        parts = re.split(r"(\d+)", name)
        return [(not part.isdecimal(), part.zfill(9) if part.isdecimal() else part) for part in parts]

    return tuple(sorted(names, key=key))


def points(value: float) -> str:
    """A difference of Dice in points (hundredths)."""
    return "-" if math.isnan(value) else f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: no minus before a zero


def megabytes(size_bytes: float) -> str:
    """A size to read."""
    size = size_bytes / 1e6
    if 0 < size < 1:
        return f"{1e3 * size:.3g} kB"
    if size >= 10_000:
        return f"{size / 1e3:,.1f} GB"
    return f"{size:,.0f} MB" if size >= 100 else f"{size:.3g} MB"


def validation_series(rounds: Sequence[RoundRecord], site: str) -> dict[int, float]:
    """A site's validation Dice by round, where it was scored.

    What a late site has reported counts for the round in which it was late, not for the one in which that came.
    """
    late = {record.plan.round_number for record in rounds if site in record.late}
    series = {
        report.round_number if report.round_number in late else record.plan.round_number: report.validation_dice
        for record in rounds
        for report in record.trained
        if report.site == site and report.validation_dice is not None
    }
    return dict(sorted(series.items()))
