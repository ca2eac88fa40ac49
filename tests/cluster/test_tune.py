"""Searches over fake federations on real Ray: every trial with its own site actors, all of them gone at the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from gcml_ray.config.file import load_config
from gcml_ray.errors import CheckpointError, ClusterError, ConfigError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.push.wire import Buffer, PushHeader
from gcml_ray.records import TrainOrder, TrainReport
from gcml_ray.search.records import SearchRecord, TrialRecord
from gcml_ray.tracking.search import SearchTracker
from tests.fakes import FakeTrainers, Fault, FlakyTrainer, calls_of, release
from tests.search_makers import write_search
from tune.search import run_search
from tune.search_file import load_search, reopen_search
from tune.trial_config import Search

pytestmark = pytest.mark.usefixtures("ray_local")

STEPS = {"federation.local_steps": {"name": "choice", "values": [3, 1]}}


class GradedTrainer(FlakyTrainer):
    """Its validation Dice is a tenth of the local steps, so that trials differ."""

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """The same round, graded."""
        return replace(super().train_round(order, pushes), validation_dice=self.config.federation.local_steps / 10)


class GradedTrainers(FakeTrainers):
    """Makes them."""

    def __call__(self, config: Any, site: str, folder: Path, *, use_gpu: bool, on_progress: Any) -> GradedTrainer:
        """A trainer of one site."""
        del use_gpu
        mine = tuple(fault for fault in self.faults if fault.site == site)
        return GradedTrainer(config, site, folder, num_values=self.num_values, on_progress=on_progress, faults=mine)


class RecordingView:
    """Keeps every state of every trial."""

    def __init__(self, on_change: Callable[[TrialRecord], object] = bool) -> None:
        self.states: list[TrialRecord] = []
        self.on_change = on_change

    def on_trial(self, trial: TrialRecord) -> None:
        """Keeps it."""
        self.states.append(trial)
        self.on_change(trial)

    @property
    def most_at_a_time(self) -> int:
        """How many trials ran at the same time at most."""
        running: set[int] = set()
        most = 0
        for state in self.states:
            (running.add if state.status == "running" else running.discard)(state.number)
            most = max(most, len(running))
        return most


def make_search(folder: Path, *, cpus_per_site: float = 1.0, gpus_per_site: float = 0.0, **keys: Any) -> Search:
    """A search over sites A and B as actors, which take 3 local steps; every grid point is a trial."""
    resources = {"pool": "ray", "cpus_per_site": cpus_per_site, "gpus_per_site": gpus_per_site}
    base = {"sites": ("A", "B"), "resources": resources, "federation": {"local_steps": 3}}
    given: dict[str, Any] = {"searcher": {"name": "grid"}, "space": STEPS, "budget": {"trials": 8}}
    return load_search(write_search(folder, base=base, **(given | {"keep_checkpoints": True} | keys)))


def trial_run(search: Search, trial: TrialRecord) -> RunFolder:
    return RunFolder(search.folder / "trials" / trial.trial_id)


def let_train(search: Search, trial: TrialRecord, round_number: int) -> None:
    """Releases site A of a trial that is held in a round."""
    release(trial_run(search, trial), "A", round_number)


def search_now(search: Search, *faults: Fault, views: Sequence[Any] = (), **options: Any) -> SearchRecord:
    stop = options.pop("stop", threading.Event())
    return run_search(search, views=views, stop=stop, make_trainer=GradedTrainers(faults), **options)


def test_trials_finish_are_cut_or_fail_each_on_its_own(tmp_path: Path) -> None:
    """Three trials of 2 x 3 CPUs on 8 CPUs: one at a time. No local step at all is a value that no trial can take."""
    space = {"federation.local_steps": {"name": "choice", "values": [3, 1, 0]}}
    scheduler = {"name": "asha", "grace_rounds": 1, "reduction_factor": 2}
    search = make_search(tmp_path, cpus_per_site=3.0, space=space, scheduler=scheduler)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = search.base.tracking.model_copy(update={"enabled": True, "uri": uri})
    view, tracked = RecordingView(), search.base.model_copy(update={"tracking": tracking})
    tracker = SearchTracker(tracked, search.folder, name="fake", objective="mean_dice", params={"trials": "8"})
    record = search_now(search, views=[view, tracker])
    tracker.finish(record, [search.folder / "best.yaml"], is_stopped=False)

    trials = {trial.params["federation.local_steps"]: trial for trial in record.trials}
    assert {steps: trial.status for steps, trial in trials.items()} == {3: "finished", 1: "cut", 0: "failed"}
    assert "federation.local_steps: received 0" in trials[0].reason
    assert [point.round_number for point in trials[3].points] == [1, 2, 3, 4]
    assert trials[1].last_round < 4
    assert view.most_at_a_time == 1
    assert load_config(search.folder / "best.yaml").federation.local_steps == 3
    for steps in (3, 1):
        run = trial_run(search, trials[steps])
        assert [calls_of(run, site, "evaluate") for site in "AB"] == [[], []], "a trial never scores test cases"
        assert not run.cases_file.exists()
        assert any(transfer.accepted for transfer in run.transfers()), "weights went from actor to actor"
    check_tracked(uri, record)


def check_tracked(uri: str, record: SearchRecord) -> None:
    """One run for the search with its best configuration, and a child run a trial."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("gcml-ray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["gcml.role"] == "search"]
    children = {run.data.tags["gcml.trial"]: run for run in runs if run.data.tags["gcml.role"] == "trial"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert {id_: run.data.tags["gcml.status"] for id_, run in children.items()} == {
        trial.trial_id: trial.status for trial in record.trials
    }
    assert record.best is not None
    history = client.get_metric_history(children[record.best.trial_id].info.run_id, "objective")
    assert [(metric.step, metric.value) for metric in history] == [(number, 0.3) for number in (1, 2, 3, 4)]
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["best.yaml"]


def test_stopped_search_keeps_finished_trials_and_goes_on_with_the_others(tmp_path: Path) -> None:
    """Ctrl-C after round 2 of the second trial, which can do one more round and no other; one trial runs at a time."""
    search = make_search(tmp_path, cpus_per_site=3.0)
    stop = threading.Event()

    def interrupt(trial: TrialRecord) -> None:
        if trial.last_round != 2:
            return
        if trial.number == 1:
            let_train(search, trial, 4)
        elif not stop.is_set():
            os.kill(os.getpid(), signal.SIGINT)
        let_train(search, trial, 3)

    held = [Fault("A", number, "train", "held") for number in (3, 4)]
    first = search_now(search, *held, views=[RecordingView(interrupt)], stop=stop)
    with pytest.raises(ConfigError, match=r"already holds a search. Continue it with `gcml tune --resume"):
        search_now(search)
    assert [trial.status for trial in first.trials] == ["finished", "stopped"]
    (state,) = (search.folder / "ray_tune").glob("experiment_state-*.json")
    whole = state.read_bytes()
    state.write_bytes(whole[:-300])
    with pytest.raises(CheckpointError, match=rf"{state.name} cannot be read"):
        search_now(reopen_search(search.folder), resume=True)
    state.write_bytes(whole)
    again = search_now(reopen_search(search.folder), resume=True)
    assert [trial.status for trial in again.trials] == ["finished", "finished"]
    assert [trial.params for trial in again.trials] == [trial.params for trial in first.trials]
    for trial in again.trials:
        assert [point.round_number for point in trial.points] == [1, 2, 3, 4]
    one, two = (trial_run(search, trial) for trial in again.trials)
    assert (len(calls_of(one, "A", "start")), len(calls_of(two, "A", "start"))) == (1, 2)
    assert calls_of(one, "A", "train") == [1, 2, 3, 4]
    assert [calls_of(two, "A", "train").count(number) for number in (1, 2)] == [1, 1], "it went on, from a checkpoint"


def test_trial_whose_site_cannot_start_fails_with_the_words_of_the_site(tmp_path: Path) -> None:
    search = make_search(tmp_path, searcher={"name": "random"}, budget={"trials": 1})
    record = search_now(search, Fault("B", 0, "start", "raise"))
    assert [trial.status for trial in record.trials] == ["failed"]
    assert "broken start of B" in record.trials[0].reason
    assert record.best is None


def test_more_trials_than_the_cluster_holds_wait_for_their_share_of_a_gpu(tmp_path: Path) -> None:
    """Two sites with half a GPU each: of 3 trials 2 run at a time on 2 GPUs. The first has the federation's values.

    No trial gets through its second round before two run; of both a first round is known by then.
    """
    space = {"federation.local_steps": {"name": "choice", "values": [1, 2, 3]}}
    search = make_search(tmp_path, gpus_per_site=0.5, space=space)

    def let_go_on(_: TrialRecord) -> None:
        begun = {state.number: state for state in view.states if state.last_round}
        if len(begun) >= 2:
            for trial in begun.values():
                let_train(search, trial, 2)

    view = RecordingView(let_go_on)
    record = search_now(search, Fault("A", 2, "train", "held"), views=[view])
    assert [trial.status for trial in record.trials] == ["finished"] * 3
    assert view.most_at_a_time == 2
    assert record.default_trial == record.trials[0]
    assert [trial.params["federation.local_steps"] for trial in record.trials] == [3, 1, 2]


def test_site_that_dies_within_a_trial_does_not_end_it(tmp_path: Path) -> None:
    """Its new process may come too late for the fakes' short rounds; test_faults.py has the restart itself."""
    search = make_search(tmp_path, searcher={"name": "random"}, budget={"trials": 1})
    record = search_now(search, Fault("A", 2, "train", "die"))
    assert [(trial.status, trial.last_round) for trial in record.trials] == [("finished", 4)]
    run = trial_run(search, record.trials[0])
    assert calls_of(run, "B", "train") == [1, 2, 3, 4]
    failed = [(failure.site, failure.round_number) for each in run.rounds() for failure in each.failures]
    assert failed == [("A", 2)]


def test_trial_in_the_time_of_which_the_budget_runs_out_is_stopped(tmp_path: Path) -> None:
    """A round in which A hangs for an hour, and 4 seconds for the search."""
    search = make_search(tmp_path, budget={"trials": 2, "hours": 4 / 3600}, cpus_per_site=3.0)
    record = search_now(search, Fault("A", 2, "train", "hang"))
    assert {trial.status for trial in record.trials} <= {"stopped", "waiting"}, "waiting where it had no time to begin"
    assert record.best is None


def test_second_ctrl_c_ends_the_search_now(tmp_path: Path) -> None:
    """While A hangs; no site and no placement group is left behind, as after every test here."""
    search = make_search(tmp_path)

    def interrupt(trial: TrialRecord) -> None:
        if trial.last_round == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        search_now(search, Fault("A", 2, "train", "hang"), views=[RecordingView(interrupt)])
    again = search_now(reopen_search(search.folder), resume=True)
    assert {trial.status for trial in again.trials} == {"finished"}


def test_trial_that_needs_more_than_the_cluster_has_is_an_error_at_once(tmp_path: Path) -> None:
    for _ in range(2):  # what failed before its first trial may be tried again
        with pytest.raises(ClusterError, match=r"2 sites x \(5 CPU, 0 GPU\) do not fit.*resources.cpus_per_site="):
            search_now(make_search(tmp_path, cpus_per_site=5.0))
