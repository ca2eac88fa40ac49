"""What a trial is judged by, from the driver's round records alone: validation, never test cases."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gcml_ray.records import RoundRecord
from gcml_ray.search.records import TrialPoint


class TrialProgress:
    """The personalised models of one federation so far.

    A site's personalised model is its checkpoint with the best validation score (docs/method.md, Evaluation), so its
    Dice is the best one seen. A site that was never evaluated counts 0: values that break a site must not win.

    Args:
        sites: all sites that began.
    """

    def __init__(self, sites: Sequence[str]) -> None:
        self._dice = dict.fromkeys(sites, 0.0)
        self._size_bytes = 0
        self._seconds = 0.0

    def add(self, record: RoundRecord) -> TrialPoint | None:
        """Takes a finished round; a point where any site was evaluated in it."""
        self._size_bytes += sum(receipt.size_bytes for receipt in record.pushes)
        self._seconds += record.seconds
        scores = [(report.site, report.validation_dice) for report in record.trained]  # two of a site that was late
        known = [(site, score) for site, score in scores if score is not None and math.isfinite(score)]
        for site, score in known:
            self._dice[site] = max(self._dice.get(site, 0.0), score)
        if not known:
            return None
        return TrialPoint(record.plan.round_number, dict(self._dice), self._size_bytes / 1e6, self._seconds)
