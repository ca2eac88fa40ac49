"""A site whose process is lost while it starts is asked again, a few times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from actors import roster
from actors.local_pool import LocalPool
from actors.site_pool import Outcome
from gcml_ray.errors import SiteError
from gcml_ray.records import SiteFailure
from tests.fake_runs import Run, drive
from tests.fakes import FakeTrainers, fake_config


class LossyPool(LocalPool):
    """Loses the process of B in its first ``num_lost`` starts, as Ray tells it."""

    num_lost: int

    def wait(self, timeout_s: float) -> list[Outcome]:
        """The outcomes, of which some are replaced."""
        return [self._maybe_lost(outcome) for outcome in super().wait(timeout_s)]

    def _maybe_lost(self, outcome: Outcome) -> Outcome:
        if (outcome.site, outcome.method) != ("B", "start") or self.num_lost == 0:
            return outcome
        self.num_lost -= 1
        return replace(outcome, result=None, failure=SiteFailure("B", 0, "start", "unreachable", "socket closed"))


def run_lossy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, num_lost: int) -> Run:
    monkeypatch.setattr(roster, "START_PAUSES_S", (0.0, 0.0))
    config = fake_config(tmp_path)
    pool = LossyPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers())
    pool.num_lost = num_lost
    return drive(config, pool)


def test_site_that_is_lost_twice_while_it_starts_takes_part_from_the_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_lossy(tmp_path, monkeypatch, num_lost=2)
    assert run.summary.status == "finished"
    assert run.trained("B") == [1, 2, 3, 4]
    assert run.failures() == []


def test_site_that_never_starts_ends_the_run_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SiteError, match="socket closed"):
        run_lossy(tmp_path, monkeypatch, num_lost=3)
