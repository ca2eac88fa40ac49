"""The test at the end of a run, where sites' processes are lost in it or just before."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from actors.local_pool import LocalPool
from actors.site_pool import Outcome, SiteDiedError, SiteHungError
from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError, NoModelError
from gcml_ray.records import SiteFailure
from tests.fakes import FakeTrainers, Fault, calls_of, fake_config
from tests.runs import Run, drive, run_locally
from tests.unit.test_driver import raises_in

TEST_ROUND = 4  # what a failure in the test counts for: the last round


class LosingPool(LocalPool):
    """One of its sites loses its process in so many of its tests, counted over both models."""

    site = "B"
    stage = "evaluate"
    loses: tuple[int, ...] = (1,)
    error: type[BaseException] = SiteDiedError
    comes_back = True

    def __init__(self, config: Config, *faults: Fault) -> None:
        super().__init__(config, config.output.folder, run_id="run", make_trainer=FakeTrainers(faults))
        self.tests = self.starts = 0

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Raises in place of the site's call."""
        site, method = self._queue[0][:2] if self._queue else ("", "")
        if (site, method) == (self.site, "start"):
            self.starts += 1
            if self.starts > 1 and not self.comes_back:
                self._queue.popleft()
                return [Outcome(site, method, failure=SiteFailure(site, 0, method, "unreachable", "no node"))]
        if (site, method) == (self.site, self.stage):
            self.tests += 1
            if self.tests in self.loses:
                setattr(self._sites[site], method, self._lose)
        return super().wait(timeout_s)

    def _lose(self, *arguments: object) -> NoReturn:
        raise self.error(f"lost with {arguments}")


def pairs_of(run: Run) -> list[tuple[str, str]]:
    """(site, model) of every report."""
    return sorted((report.site, report.model) for report in run.summary.evaluations)


ALL = [(site, "personalised") for site in "ABC"]


@pytest.mark.parametrize(("error", "kind"), [(SiteDiedError, "died"), (SiteHungError, "late"), (SystemExit, "died")])
def test_site_that_is_lost_in_its_test_is_restarted_from_its_last_round_and_tested(
    tmp_path: Path, error: type[Exception], kind: str
) -> None:
    pool = LosingPool(fake_config(tmp_path))
    pool.error = error
    run = drive(fake_config(tmp_path), pool)
    assert (run.summary.untested, pairs_of(run)) == ((), ALL)
    assert run.failures() == [("B", TEST_ROUND, kind, "restart")]
    assert run.restored("B") == [0, TEST_ROUND]
    assert [report.round_number for report in run.summary.evaluations] == [TEST_ROUND] * 3
    assert [calls_of(run.folder, site, "evaluate") for site in "ABC"] == [[TEST_ROUND]] * 3, "no site is asked twice"


def test_site_that_is_lost_again_is_named_and_a_resume_tests_it(tmp_path: Path) -> None:
    config = fake_config(tmp_path)
    pool = LosingPool(config)
    pool.loses = (1, 2)
    run = drive(config, pool)
    assert (run.summary.status, run.summary.untested, run.summary.dropped) == ("finished", ("B (personalised)",), {})
    assert run.failures() == [("B", TEST_ROUND, "died", "restart"), ("B", TEST_ROUND, "died", "skip")]
    resumed = run_locally(config, resume=True)
    assert (resumed.summary.untested, pairs_of(resumed)) == ((), ALL)


def test_site_that_does_not_come_back_in_time_is_not_given_up(tmp_path: Path) -> None:
    """A run that finished without it would leave it without scores for good; a resume tests it once it is back."""
    config = fake_config(tmp_path, federation={"rejoin_timeout_s": 0.2})
    pool = LosingPool(config)
    pool.comes_back = False
    run = drive(config, pool)
    assert (run.summary.untested, run.summary.dropped, pairs_of(run)) == (("B (personalised)",), {}, [ALL[0], ALL[2]])
    stages = [(failure.stage, failure.kind, decision.value) for failure, decision in run.listener.failures]
    assert stages == [
        ("evaluate", "died", "restart"),
        ("start", "unreachable", "skip"),
        ("evaluate", "unreachable", "skip"),
    ]
    assert pool.tests == 1
    assert run_locally(config, resume=True).summary.untested == ()


def test_site_that_is_away_since_the_rounds_is_given_up_in_its_time(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rejoin_timeout_s": 0.2})
    pool = LosingPool(config)
    pool.stage, pool.loses, pool.comes_back = "train", (4,), False
    run = drive(config, pool)
    assert (list(run.summary.dropped), run.summary.untested, pairs_of(run)) == (["B"], (), [ALL[0], ALL[2]])
    assert [decision.value for _, decision in run.listener.failures] == ["restart", "drop"]


def test_failures_of_the_rounds_do_not_count_in_the_test(tmp_path: Path) -> None:
    """B has failed in the last two rounds: a third time would drop it from a round."""
    config = fake_config(tmp_path)
    run = drive(config, LosingPool(config, *raises_in(range(3, 5))))
    assert (run.summary.untested, run.summary.dropped) == ((), {})
    assert run.failures()[-1] == ("B", TEST_ROUND, "died", "restart")


def test_every_model_of_a_lost_site_is_tested(tmp_path: Path) -> None:
    """Each site had a model of its own before gossip; B's process is lost in the test of the second of its two."""
    config = fake_config(tmp_path, federation={"warmup_rounds": 1})
    pool = LosingPool(config)
    pool.loses = (2,)
    run = drive(config, pool)
    assert pairs_of(run) == [(site, model) for site in "ABC" for model in ("before_gossip", "personalised")]
    assert run.summary.untested == ()


def test_sites_that_share_a_lost_process_are_all_tested(tmp_path: Path) -> None:
    config = fake_config(tmp_path, resources={"sites_per_actor": 3})
    pool = LosingPool(config)
    pool.site = "A"
    run = drive(config, pool)
    assert (run.summary.untested, pairs_of(run)) == ((), ALL)
    assert {(site, decision) for site, _, _, decision in run.failures()} == {(site, "restart") for site in "ABC"}


def test_other_models_than_the_personalised_one_are_missed_too(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"warmup_rounds": 1})
    pool = LosingPool(config)
    pool.loses = (2, 3)
    assert drive(config, pool).summary.untested == ("B (before_gossip)",)


def test_site_that_has_no_model_before_gossip_is_not_missed(tmp_path: Path) -> None:
    """It has never had one: it joined after the warm-up, or its disk was full."""
    config = fake_config(tmp_path, federation={"warmup_rounds": 1})
    pool = LosingPool(config)
    pool.loses, pool.error = (2,), NoModelError
    run = drive(config, pool)
    assert (run.summary.untested, run.failures()) == ((), [("B", TEST_ROUND, "raised", "skip")])


@pytest.mark.parametrize("error", [CheckpointError, MemoryError])
def test_site_whose_model_before_gossip_is_lost_or_does_not_fit_is_named(
    tmp_path: Path, error: type[Exception]
) -> None:
    config = fake_config(tmp_path, federation={"warmup_rounds": 1})
    pool = LosingPool(config)
    pool.loses, pool.error = (2,), error
    assert drive(config, pool).summary.untested == ("B (before_gossip)",)


# --- every model at every site -----------------------------------------------------------------

CROSS = {"cross_site": True}
PAIRS = {(owner, site) for owner in "ABC" for site in "ABC"}


def across(run: Run) -> list[tuple[str, str]]:
    """(whose model, where) of all rows."""
    return sorted((score.model, score.site) for score in run.folder.cross_site() if score.case == "x")


@pytest.mark.parametrize("stage", ["visit", "score_visitor"])
def test_site_that_is_lost_in_the_cross_site_test_is_restarted_and_asked_once_more(tmp_path: Path, stage: str) -> None:
    config = fake_config(tmp_path, evaluation=CROSS)
    pool = LosingPool(config)
    pool.stage = stage
    run = drive(config, pool)
    assert (run.summary.untested, across(run)) == ((), sorted(PAIRS))
    assert run.failures() == [("B", TEST_ROUND, "died", "restart")]


def test_what_is_missing_of_the_cross_site_test_is_named(tmp_path: Path) -> None:
    config = fake_config(tmp_path, evaluation=CROSS)
    pool = LosingPool(config)
    pool.stage, pool.loses = "score_visitor", (1, 3)  # the second pass begins with A's model
    run = drive(config, pool)
    assert run.summary.untested == ("C's model at B",)
    assert across(run) == sorted(PAIRS - {("C", "B")})
