"""Pools of fakes by a clock of their own: calls that are lost, or answered late, cost no real time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from actors import roster
from actors.local_pool import LocalPool
from actors.site_pool import Outcome
from gcml_ray.config import Config
from tests.fakes import FakeTrainers, Fault
from tests.runs import RecordingListener, Run, drive
from tests.waiting import Clock


class TimedPool(LocalPool):
    """Has the driver's clock pass when it waits for what does not come, and when a site trains for ``train_s``."""

    train_s = 0.0

    def __init__(self, config: Config, *faults: Fault) -> None:
        super().__init__(config, config.output.folder, run_id="run", make_trainer=FakeTrainers(faults))
        self.clock = Clock()

    def wait(self, timeout_s: float) -> list[Outcome]:
        outcomes = super().wait(timeout_s)
        seconds = [self.train_s for outcome in outcomes if outcome.method == "train"]
        self.clock.sleep(sum(seconds) if outcomes else timeout_s)
        return outcomes

    def drive(self, *, stop_after: int = 0) -> Run:
        """A run by that clock, stopped after a round if one is given."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(roster, "time", self.clock)
            return drive(self._config, self, listener=RecordingListener(stop_after=stop_after))


class DeafPool(TimedPool):
    """Loses the calls that ``is_lost`` names: their outcome never comes."""

    is_lost: Callable[[str, str, int], bool]

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        if not self.is_lost(site, method, round_number):
            super().submit(site, method, *arguments, round_number=round_number)


class LatePool(TimedPool):
    """Answers one call only when another one is next, or ``after_s`` seconds later.

    ``late`` and ``until``: (site, method, round) of both.
    """

    is_parallel = True
    late: tuple[str, str, int]
    until: tuple[str, str, int] | None = None
    after_s = 20.0

    def __init__(self, config: Config, *faults: Fault) -> None:
        super().__init__(config, *faults)
        self._held: Any = None
        self._is_due_at = float("inf")

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Keeps the late call back."""
        site, method, _, number = self._queue[0] if self._queue else ("", "", (), 0)
        if (site, method, number) == self.late and self._held is None:
            self._held, self._is_due_at = self._queue.popleft(), self.clock.now + self.after_s
            return []
        if (site, method, number) == self.until or self.clock.now >= self._is_due_at:
            self._queue.appendleft(self._held)
            self._is_due_at, self.until = float("inf"), None
        return super().wait(timeout_s)
