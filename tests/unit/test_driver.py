from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import roster
from actors.driver import Driver
from actors.local_pool import LocalPool
from actors.site_pool import Outcome
from gcml_ray.errors import CheckpointError, SiteError
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.push.wire import Buffer
from gcml_ray.records import RoundRecord, SiteFailure, SiteInfo
from gcml_ray.seeding import numpy_generator
from tests.fakes import FakeTrainers, Fault, calls_of, fake_config, final_weights
from tests.runs import RecordingListener, RecordingTracker, Run, run_locally
from tests.timed_pools import DeafPool, TimedPool


def raises_in(rounds: range, *, site: str = "B", stage: Any = "train") -> list[Fault]:
    return [Fault(site, number, stage, "raise") for number in rounds]


# --- rounds as planned -------------------------------------------------------------------------


def test_phases_and_edges_are_as_planned(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"warmup_rounds": 1, "cooldown_rounds": 1})
    records = run_locally(config).folder.rounds()
    assert [record.plan.phase for record in records] == ["warmup", "exchange", "exchange", "cooldown"]
    ring = [("A", "B"), ("B", "C"), ("C", "A")]
    edges = [[(push.sender, push.receiver) for push in record.pushes] for record in records]
    assert edges == [[], ring, ring, []]


def test_every_site_trains_in_every_round(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path))
    assert [run.trained(site) for site in "ABC"] == [[1, 2, 3, 4]] * 3


def test_incoming_weights_reach_the_receivers_training(tmp_path: Path) -> None:
    """A ring A -> B -> A: w = (own + incoming) / 2 + draw, with the weights from before the round's training."""
    config = fake_config(tmp_path, sites=("A", "B"), federation={"rounds": 2})

    def draw(site: str, number: int) -> Buffer:
        return numpy_generator(7, "train", site, number).standard_normal(8, dtype=np.float32)

    a1, b1 = draw("A", 1), draw("B", 1)
    mean = np.mean([a1, b1], axis=0, dtype=np.float32)
    np.testing.assert_array_equal(final_weights(run_locally(config).folder)["A"], mean + draw("A", 2))


def test_same_config_and_seed_give_the_same_weights(tmp_path: Path) -> None:
    first, second = (final_weights(run_locally(fake_config(tmp_path / name)).folder) for name in ("1", "2"))
    for site in "ABC":
        np.testing.assert_array_equal(first[site], second[site])


def test_evaluation_by_rhythm_at_the_end_of_warmup_and_at_the_end(tmp_path: Path) -> None:
    config = fake_config(tmp_path, federation={"rounds": 8, "evaluate_every": 3, "warmup_rounds": 2})
    evaluated = [record.trained[0].validation_dice is not None for record in run_locally(config).listener.rounds]
    assert [number for number, done in enumerate(evaluated, start=1) if done] == [2, 3, 6, 8]


def test_finished_run_is_told_to_tracker_and_listener(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path))
    assert (run.summary.status, run.summary.last_round) == ("finished", 4)
    assert [info.site for info in run.tracker.infos] == ["A", "B", "C"]
    assert [record.plan.round_number for record in run.tracker.rounds] == [1, 2, 3, 4]
    assert run.tracker.rounds == run.listener.rounds
    assert [report.site for report in run.tracker.scores] == ["A", "B", "C"]
    assert len(run.listener.evaluated) == len(run.summary.evaluations) == 3


def test_cases_csv_has_a_row_a_case_and_model(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=("A", "B"), federation={"warmup_rounds": 1})
    folder = run_locally(config).folder
    rows = list(csv.DictReader(folder.cases_file.open()))
    assert len(rows) == 2 * 2 * 2
    assert {(row["site"], row["case"], row["model"], row["dice"]) for row in rows} >= {
        ("A", "x", "personalised", "0.8"),
        ("B", "y", "before_gossip", "0.6"),
    }


def test_model_before_gossip_is_tested_only_where_there_was_a_warmup(tmp_path: Path) -> None:
    folder = run_locally(fake_config(tmp_path)).folder
    assert {score.model for score in folder.cases()} == {"personalised"}


def test_state_of_a_finished_run(tmp_path: Path) -> None:
    state = run_locally(fake_config(tmp_path)).folder.read_state()
    assert state == RunState(4, "finished", ("A", "B", "C"), {"A": 4, "B": 4, "C": 4}, {})


# --- sites that raise --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "export"])
def test_site_that_raises_is_skipped_and_the_round_completes(tmp_path: Path, stage: Any) -> None:
    run = run_locally(fake_config(tmp_path), Fault("B", 2, stage, "raise"))
    assert run.summary.status == "finished"
    assert run.failures() == [("B", 2, "raised", "skip")]
    failure = run.folder.rounds()[1].failures[0]
    assert (failure.error_type, failure.message) == ("ValueError", f"broken {stage} of B in round 2")
    assert [run.trained(site) for site in "AC"] == [[1, 2, 3, 4]] * 2


def test_site_that_raised_in_training_is_back_in_the_next_round(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path), Fault("B", 2, "train", "raise"))
    assert run.trained("B") == [1, 3, 4]
    assert calls_of(run.folder, "B", "train") == [1, 2, 3, 4]
    assert [push.accepted for push in run.folder.rounds()[2].pushes] == [True, True, True]


def test_site_that_could_not_push_still_trains(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path), Fault("B", 2, "export", "raise"))
    assert run.trained("B") == [1, 2, 3, 4]
    assert [push.sender for push in run.folder.rounds()[1].pushes] == ["A", "C"]


def test_three_failures_in_a_row_drop_a_site_and_the_rest_go_on(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path, federation={"rounds": 6}), *raises_in(range(2, 7)))
    assert run.failures() == [("B", 2, "raised", "skip"), ("B", 3, "raised", "skip"), ("B", 4, "raised", "drop")]
    assert run.summary.status == "finished"
    assert run.summary.dropped == {"B": "train, raised: broken train of B in round 4"}
    assert run.trained("A") == [1, 2, 3, 4, 5, 6]
    last = run.folder.rounds()[-1].plan
    assert last.sites == ("A", "C")
    assert {(edge.sender, edge.receiver) for edge in last.edges} == {("A", "C"), ("C", "A")}


def test_good_round_forgives_earlier_failures(tmp_path: Path) -> None:
    faults = [*raises_in(range(1, 3)), *raises_in(range(4, 6))]
    run = run_locally(fake_config(tmp_path, federation={"rounds": 6}), *faults)
    assert run.summary.dropped == {}
    assert run.trained("B") == [3, 6]


def test_push_to_a_site_that_was_dropped_in_this_round_is_only_refused(tmp_path: Path) -> None:
    """B fails in training twice, then in its push of round 3, and is dropped between push and training."""
    faults = [*raises_in(range(1, 3)), Fault("B", 3, "export", "raise")]
    run = run_locally(fake_config(tmp_path), *faults)
    assert run.failures()[-1] == ("B", 3, "raised", "drop")
    assert run.summary.status == "finished"
    assert calls_of(run.folder, "B", "train") == [1, 2]


def test_site_that_cannot_be_tested_leaves_the_others_scores(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path), Fault("B", 4, "evaluate", "raise"))
    assert run.summary.status == "finished"
    assert [report.site for report in run.summary.evaluations] == ["A", "C"]
    assert run.failures() == [("B", 4, "raised", "skip")]
    assert run.summary.untested == ("B (personalised)",)


def test_run_that_was_tested_everywhere_has_no_untested_site(tmp_path: Path) -> None:
    assert run_locally(fake_config(tmp_path)).summary.untested == ()


def test_site_that_was_dropped_is_not_among_the_untested(tmp_path: Path) -> None:
    run = run_locally(fake_config(tmp_path), *raises_in(range(1, 4), site="B"))
    assert (list(run.summary.dropped), run.summary.untested) == (["B"], ())


def test_run_folder_that_is_removed_during_the_run_ends_it_with_what_has_happened(tmp_path: Path) -> None:
    def remove(record: RoundRecord) -> None:
        if record.plan.round_number == 2:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(CheckpointError, match=r"run/config.yaml was there when the run began and is not any more"):
        run_locally(fake_config(tmp_path), listener=RecordingListener(on_end=remove))


# --- malformed pushes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "not finite"),
        ("size", "size: expected 8 values, got 7"),
        ("contract", "data contract: mr->tumour is not ct->lesion"),
        ("stale", "stale: round 1, the oldest accepted is 2"),
        ("run", "run: another is not this run"),
        ("fingerprint", "architecture: huge is not tiny"),
        ("checksum", "checksum"),
        ("dtype", "dtype: expected a flat float32 array, got float64"),
        ("sender", "sender: stranger is not a site"),
        ("num_train", "num_train: 500, but A has registered 5 training cases"),
    ],
)
def test_malformed_push_is_refused_with_its_reason_and_the_round_goes_on(
    tmp_path: Path, kind: str, reason: str
) -> None:
    run = run_locally(fake_config(tmp_path), Fault("A", 2, "export", kind))
    (refused,) = [push for record in run.folder.rounds() for push in record.pushes if not push.accepted]
    assert refused.receiver == "B"
    assert refused.reason.startswith(reason)
    rows = list(csv.DictReader(run.folder.transfers_file.open()))
    assert [row["reason"] for row in rows if row["accepted"] == "no"] == [refused.reason]
    assert (run.summary.status, run.failures()) == ("finished", [])
    reports = {report.site: report for report in run.folder.rounds()[1].trained}
    assert (reports["B"].peers, reports["C"].peers) == ((), ("B",))


# --- start -------------------------------------------------------------------------------------


def test_start_failures_of_two_sites_are_reported_together(tmp_path: Path) -> None:
    faults = [Fault(site, 0, "start", "raise") for site in "AC"]
    with pytest.raises(SiteError) as error:
        run_locally(fake_config(tmp_path), *faults)
    assert "site A: broken start of A" in str(error.value)
    assert "site C: broken start of C" in str(error.value)


def test_single_start_failure_names_site_and_cause(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="site B, round 0, start: broken start of B in round 0"):
        run_locally(fake_config(tmp_path), Fault("B", 0, "start", "raise"))


# --- late sites --------------------------------------------------------------------------------


def run_deaf(tmp_path: Path, is_lost: Callable[[str, str, int], bool], **federation: Any) -> Run:
    clocks = {"round_timeout_s": 0.1, "push_timeout_s": 0.1, "start_timeout_s": 0.1, "rejoin_timeout_s": 0.1}
    pool = DeafPool(fake_config(tmp_path, federation=clocks | federation))
    pool.is_lost = is_lost
    return pool.drive()


@pytest.mark.parametrize(("method", "seconds"), [("train", "0.1"), ("push", "0.3")])
def test_late_site_is_restarted_and_the_round_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, seconds: str
) -> None:
    """A sender has as long as its receivers, 0.1 s, and 0.2 s more to say who of them has not answered."""
    monkeypatch.setattr(roster, "GRACE_S", 0.2)
    run = run_deaf(tmp_path, lambda *call: call == ("B", method, 2))
    assert run.failures() == [("B", 2, "late", "restart")]
    assert run.summary.status == "finished"
    assert run.listener.failures[0][0].message == f"no answer within {seconds} s"
    assert run.trained("B")[-2:] == [3, 4]
    assert run.restored("B") == [0, 1]


def test_late_site_that_does_not_come_back_is_dropped_and_said_so(tmp_path: Path) -> None:
    starts: list[str] = []

    def is_lost(site: str, method: str, number: int) -> bool:
        starts.extend([site] if method == "start" else [])
        is_second_start = method == "start" and starts.count("B") > 1
        return site == "B" and (is_second_start or (method, number) == ("train", 2))

    run = run_deaf(tmp_path, is_lost, rejoin_timeout_s=0.01)
    assert run.failures() == [("B", 2, "late", "restart"), ("B", 2, "late", "drop")]
    assert run.summary.dropped == {"B": "did not come back: no answer within 0.01 s"}
    assert [failure.stage for failure, _ in run.listener.failures] == ["train", "start"]
    assert run.trained("C") == [1, 2, 3, 4]


def test_restart_goes_to_the_round_the_driver_knows_not_to_a_leftover_file(tmp_path: Path) -> None:
    """A file of round 9 lies there from before a resume; restored, it would refuse every push as stale."""
    leftover = tmp_path / "run" / "checkpoints" / "B"
    leftover.mkdir(parents=True)
    np.save(leftover / "round_00009.npy", np.zeros(8, dtype=np.float32))
    run = run_deaf(tmp_path, lambda *call: call == ("B", "train", 2))
    assert run.restored("B") == [0, 1]


def test_site_that_does_not_start_in_time_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"site B, round 0, start: no answer within 0.1 s"):
        run_deaf(tmp_path, lambda *call: call[:2] == ("B", "start"))


def test_site_without_a_process_is_told_from_one_that_is_slow(tmp_path: Path) -> None:
    class FullPool(DeafPool):
        def has_process(self, site: str) -> bool:
            return site != "B"

    pool = FullPool(fake_config(tmp_path, federation={"start_timeout_s": 0.1}))
    pool.is_lost = lambda *call: call[:2] in {("B", "start"), ("C", "start")}
    with pytest.raises(SiteError, match=r"site B: no answer within 0.1 s: it has no process yet; other jobs") as error:
        pool.drive()
    assert str(error.value).endswith("site C: no answer within 0.1 s")


def test_sites_of_one_process_are_not_late_because_they_wait_for_each_other(tmp_path: Path) -> None:
    """Three sites of 0.2 s each, one after the other, with 0.3 s for a round."""
    pool = TimedPool(fake_config(tmp_path, federation={"rounds": 1, "round_timeout_s": 0.3}))
    pool.train_s = 0.2
    assert pool.drive().failures() == []


# --- the pool's side ---------------------------------------------------------------------------


def test_outcome_of_another_call_is_not_taken_for_the_one_waited_for(tmp_path: Path) -> None:
    config = fake_config(tmp_path, sites=("A", "B"))
    pool = LocalPool(config, config.output.folder, run_id="run", make_trainer=FakeTrainers())
    pool.launch(["A", "B"])
    pool.submit("A", "status", round_number=1)
    pool.start("A", resume_round=0)
    folder, listener = RunFolder.create(config.output.folder, config), RecordingListener()
    driver = Driver(config, pool, folder, tracker=RecordingTracker(), listener=listener, stop=listener.stop)
    driver.roster._open("A", "start", 0, 1)
    (outcome,) = driver.roster.gather(["A"], "start")
    assert isinstance(outcome.result, SiteInfo)


class DiesLatePool(TimedPool):
    """B's training of round 3 is late, and its process dies while the others train in round 4."""

    is_parallel = True
    is_held = False

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        assert site in self._sites, "a call to a site that has left"
        super().submit(site, method, *arguments, round_number=round_number)

    def wait(self, timeout_s: float) -> list[Outcome]:
        site, method, _, number = self._queue[0] if self._queue else ("", "", (), 0)
        if (site, method, number) == ("B", "train", 3):
            self._queue.popleft()
            self.is_held = True
            return []
        if self.is_held and (method, number) == ("train", 4):
            self.is_held = False
            failure = SiteFailure("B", 3, "train", "died", "its process ended")
            return [Outcome("B", "train", failure=failure), *super().wait(timeout_s)]
        return super().wait(timeout_s)


def test_who_is_dropped_for_what_came_late_is_in_no_later_plan(tmp_path: Path) -> None:
    """B has raised twice before: its third failure in a row is told of while round 4 trains without it."""
    config = fake_config(tmp_path, federation={"rounds": 6, "round_deadline_s": 1.0})
    run = DiesLatePool(config, *raises_in(range(1, 3))).drive()
    assert [plan.sites for plan in run.listener.plans][-2:] == [("A", "C")] * 2
    assert list(run.summary.dropped) == ["B"]
    assert [(site, number, kind) for site, number, kind, _ in run.failures()][-1] == ("B", 3, "died")
