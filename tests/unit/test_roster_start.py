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
from tests.fakes import FakeTrainers, calls_of, fake_config
from tests.runs import Run, drive


class LossyPool(LocalPool):
    """Loses the process of a site, with all others in it, in its first ``num_lost`` starts, as Ray tells it."""

    num_lost: int
    lossy: str

    def wait(self, timeout_s: float) -> list[Outcome]:
        """The outcomes, of which some are replaced."""
        return [self._maybe_lost(outcome) for outcome in super().wait(timeout_s)]

    def _maybe_lost(self, outcome: Outcome) -> Outcome:
        if (outcome.site, outcome.method) != (self.lossy, "start") or self.num_lost == 0:
            return outcome
        self.num_lost -= 1
        self.restart(self.lossy)
        return replace(
            outcome, result=None, failure=SiteFailure(self.lossy, 0, "start", "unreachable", "socket closed")
        )


def run_lossy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, num_lost: int, lossy: str = "B", sites_per_actor: int = 1
) -> Run:
    monkeypatch.setattr(roster, "START_PAUSES_S", (0.0, 0.0))
    config = fake_config(tmp_path, resources={"sites_per_actor": sites_per_actor})
    pool = LossyPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers())
    pool.num_lost, pool.lossy = num_lost, lossy
    return drive(config, pool)


def test_site_that_is_lost_twice_while_it_starts_takes_part_from_the_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_lossy(tmp_path, monkeypatch, num_lost=2)
    assert run.summary.status == "finished"
    assert run.trained("B") == [1, 2, 3, 4]
    assert run.failures() == []


def test_sites_whose_shared_process_is_lost_at_the_start_are_all_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A and B have answered before the process that all share is lost: the new one knows none of them."""
    run = run_lossy(tmp_path, monkeypatch, num_lost=1, lossy="C", sites_per_actor=3)
    assert [calls_of(run.folder, site, "start") for site in "ABC"] == [[0, 0]] * 3
    assert [run.trained(site) for site in "ABC"] == [[1, 2, 3, 4]] * 3
    assert run.failures() == []


def test_site_that_never_starts_ends_the_run_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SiteError, match="socket closed"):
        run_lossy(tmp_path, monkeypatch, num_lost=3)
