"""A search without a cluster: places, reports of a trial, what mattered, tables and plots."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.cluster import Node
from gcml_ray.console.search import SearchConsole, final_table, search_table, search_verdict
from gcml_ray.errors import CheckpointError, ClusterError, ConfigError
from gcml_ray.files.folder_lock import held
from gcml_ray.report.search import write_search_plots
from gcml_ray.search.records import FinalRecord, FinalScore, SearchRecord, TrialPoint, TrialRecord
from tests.search_makers import make_search, record, text_of
from tests.signal_handlers import handled
from tune.importance import importances
from tune.ray_state import check_readable
from tune.search import _begin, _new_tuner, check_trial_fits, run_search, stopping, trial_resources
from tune.trainable import RoundReporter, TrialError, points_in
from tune.trial_config import Search
from tune.watch import Watch

# --- its folder --------------------------------------------------------------------------------


def test_a_second_search_in_a_folder_in_use_changes_nothing_there(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    before = set(search.folder.glob("*"))
    with held(search.folder), pytest.raises(ConfigError, match=r"folder: .* is in use by another process"):
        run_search(search, views=(), stop=threading.Event())
    assert set(search.folder.glob("*")) - before == {search.folder / ".lock"}


def test_a_search_that_was_killed_before_its_first_trial_begins_anew(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    (search.folder / "ray_tune").mkdir(parents=True)
    (search.folder / "ray_tune" / "tuner.pkl").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"no trial had begun. Give the search's file again"):
        run_search(search, views=(), stop=threading.Event(), resume=True)
    _begin(search)
    assert not (search.folder / "ray_tune").exists()
    assert (search.folder / "search.json").exists()


@pytest.mark.parametrize(
    "name", ["tuner.pkl", "experiment_state-2.json", "search_gen_state-2.json", "searcher-state-2.pkl"]
)
def test_a_search_whose_newest_state_is_damaged_names_the_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "ray_tune"
    folder.mkdir()
    for kind in ("tuner.pkl", "experiment_state-{}.json", "search_gen_state-{}.json", "searcher-state-{}.pkl"):
        for number in (1, 2):
            whole = json.dumps({"a": 1}).encode() if kind.startswith("experiment") else pickle.dumps({"a": 1})
            (folder / kind.format(number)).write_bytes(whole)
    check_readable(tmp_path)
    for older in folder.glob("*-1.*"):
        older.write_bytes(b"")
    check_readable(tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*begin in another folder"):
        check_readable(tmp_path)


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_trials_at_a_time_are_bounded_with_ray_tunes_own_searchers_too(tmp_path: Path, searcher: str) -> None:
    """They have a bound of their own, beside which Ray Tune ignores that of its configuration, with a warning."""
    space = {"method.merge": {"name": "choice", "values": ["keep_local", "select_best"]}}
    budget = {"trials": 4, "concurrent_trials": 1}
    search = make_search(tmp_path, searcher={"name": searcher}, space=space, budget=budget)
    tuner = _new_tuner(search, lambda _: None)
    generator = tuner._local_tuner._tune_config.search_alg
    assert (generator.max_concurrent, tuner._local_tuner._tune_config.max_concurrent_trials) == (1, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_ray_tune_to_end_and_a_second_one_ends_now(number: int) -> None:
    """SIGUSR1 stands for Ray Tune's own handler; without it nothing runs that could save a state."""
    heard: list[int] = []
    with handled(number, signal.default_int_handler):
        with stopping(stop := threading.Event()):
            signal.signal(signal.SIGUSR1, lambda got, _: heard.append(got))
            os.kill(os.getpid(), number)
            assert stop.is_set()
            assert heard == [signal.SIGUSR1]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        with stopping(threading.Event()), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_search_under_nohup_hears_no_closed_terminal() -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN), stopping(stop := threading.Event()):
        os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.is_set()


# --- places ------------------------------------------------------------------------------------


def bundles(folder: Path, *, driver_cpus: float = 0.0, **resources: Any) -> list[dict[str, float]]:
    search = make_search(folder, base={"resources": {"pool": "ray"} | resources}, driver_cpus=driver_cpus)
    return list(trial_resources(search, ["A", "B"]).bundles)


def test_a_trial_has_one_bundle_a_site_and_one_for_its_driver(tmp_path: Path) -> None:
    found = bundles(tmp_path, driver_cpus=0.5, cpus_per_site=2.0, gpus_per_site=0.25)
    assert found == [{"CPU": 0.5}, {"CPU": 2.0, "GPU": 0.25}, {"CPU": 2.0, "GPU": 0.25}]


def test_a_driver_that_asks_for_nothing_gets_no_bundle(tmp_path: Path) -> None:
    assert bundles(tmp_path, cpus_per_site=0.5) == [{"CPU": 0.5}, {"CPU": 0.5}]


def test_sites_that_share_an_actor_share_its_bundle(tmp_path: Path) -> None:
    assert bundles(tmp_path, sites_per_actor=2, cpus_per_site=1.0) == [{"CPU": 1.0}]


def test_sites_in_one_process_share_one_bundle(tmp_path: Path) -> None:
    assert bundles(tmp_path, pool="local", cpus_per_site=2.0) == [{"CPU": 2.0}]


def test_each_bundle_is_on_the_node_of_its_site_where_labels_place_it(tmp_path: Path) -> None:
    search = make_search(tmp_path, base={"resources": {"pool": "ray", "placement": "label"}})
    options = trial_resources(search, ["A", "B"])._kwargs
    assert options["bundle_label_selector"] == [{"site": "A"}, {"site": "B"}]


def test_the_driver_of_a_trial_needs_room_too(tmp_path: Path) -> None:
    """2 x 1 CPU fit on 2 CPUs, and 0.5 more do not."""
    search = make_search(tmp_path, base={"resources": {"pool": "ray", "cpus_per_site": 1.0}}, driver_cpus=0.5)
    with pytest.raises(ClusterError, match=r"2 sites x \(1 CPU, 0 GPU\) do not fit"):
        check_trial_fits(search, ["A", "B"], [Node("n", 2.0, 0.0, {})])
    check_trial_fits(search, ["A", "B"], [Node("n", 2.5, 0.0, {})])


# --- reports -----------------------------------------------------------------------------------


def reporter(reports: list[dict[str, Any]], *, last_round: int = 3) -> RoundReporter:
    return RoundReporter(("A", "B"), last_round=last_round, report=reports.append)


def test_the_last_round_is_reported_when_the_federation_has_ended() -> None:
    reports: list[dict[str, Any]] = []
    trial = reporter(reports)
    for number in (1, 2, 3):
        trial.on_round_end(record(number, {"A": 0.1 * number, "B": 0.2 * number}))
    assert [report["round"] for report in reports] == [1, 2]
    trial.report_last()
    assert [report["mean_dice"] for report in reports] == pytest.approx([0.15, 0.3, 0.45])


def test_without_a_barrier_the_newest_record_stands_for_the_last_round() -> None:
    """The slow site B has done one round of three in record 3, all of them in record 5."""
    reports: list[dict[str, Any]] = []
    trial = reporter(reports)
    records = ({"A": 0.1, "B": 0.1}, {"A": 0.5}, {"A": 0.5}, {"B": 0.4}, {"B": 0.7})
    for number, dice in enumerate(records, start=1):
        trial.on_round_end(record(number, dice))
    assert [report["round"] for report in reports] == [1, 2]
    trial.report_last()
    assert (reports[-1]["round"], reports[-1]["mean_dice"]) == (3, pytest.approx(0.6))


def test_rounds_of_an_earlier_process_come_with_the_next_report() -> None:
    reports: list[dict[str, Any]] = []
    trial = reporter(reports)
    trial.replay([record(1, {"A": 0.8, "B": 0.8})])
    trial.on_round_end(record(2, {"A": 0.1, "B": 0.1}))
    (report,) = reports
    assert [point.round_number for point in points_in(report)] == [1, 2]
    assert report["mean_dice"] == pytest.approx(0.8), "the best model so far is the earlier one"


def test_a_trial_whose_last_round_was_not_evaluated_is_an_error() -> None:
    with pytest.raises(TrialError, match="no site was evaluated in the last round, 3"):
        reporter([]).report_last()


def test_a_round_that_is_reported_again_replaces_the_old_one(tmp_path: Path) -> None:
    watch = Watch(tmp_path, rounds=4, views=(), is_ending=lambda: False, keep_checkpoints=True)
    watch.begin("x", {"a": 1}, is_running=True)
    for number, dice in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25)):
        point = {"round_number": number, "site_dice": {"A": dice}, "megabytes": 0.0, "seconds": 1.0}
        watch.progress("x", {"round": number, "points": [point]})
    assert [(point.round_number, point.mean_dice) for point in watch.trials[0].points] == [(1, 0.1), (2, 0.25)]
    again = Watch(tmp_path, rounds=4, views=(), is_ending=lambda: False, keep_checkpoints=True)
    assert again.trials == watch.trials, "a resumed search knows them"


def test_a_failed_trial_keeps_its_reason_when_the_search_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 4, "views": (), "is_ending": lambda: False, "keep_checkpoints": True}
    first = Watch(tmp_path, **options)
    first.begin("x", {"a": 1}, is_running=True)
    first.end("x", reason="its process died")
    resumed = Watch(tmp_path, **options)
    resumed.begin("x", {"a": 1}, is_running=False)  # Ray Tune tells of every trial that there was
    assert (resumed.trials[0].status, resumed.trials[0].reason) == ("failed", "its process died")
    resumed.begin("x", {"a": 1}, is_running=True)  # with --retry-failed
    assert (resumed.trials[0].status, resumed.trials[0].reason) == ("running", "")


def test_a_trial_that_was_lost_in_a_crash_before_it_ran_is_forgotten(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 4, "views": (), "is_ending": lambda: False, "keep_checkpoints": True}
    crashed = Watch(tmp_path, **options)
    crashed.begin("ran", {}, is_running=True)
    crashed.begin("lost", {}, is_running=False)
    again = Watch(tmp_path, **options)
    again.begin("ran", {}, is_running=True)
    again.begin("new", {}, is_running=False)
    again.settle()
    assert [(trial.trial_id, trial.number, trial.status) for trial in again.trials] == [
        ("ran", 1, "stopped"),
        ("new", 3, "waiting"),
    ]
    assert Watch(tmp_path, **options).trials == again.trials


def test_checkpoints_of_trials_that_have_ended_are_removed_unless_wanted(tmp_path: Path) -> None:
    for keep in (True, False):
        watch = Watch(tmp_path, rounds=4, views=(), is_ending=lambda: False, keep_checkpoints=keep)
        checkpoints = tmp_path / "trials" / "x" / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        watch.begin("x", {}, is_running=True)
        watch.end("x")
        assert checkpoints.exists() == keep


def test_trial_that_failed_keeps_what_a_retry_goes_on_from(tmp_path: Path) -> None:
    watch = Watch(tmp_path, rounds=4, views=(), is_ending=lambda: False, keep_checkpoints=False)
    checkpoints = tmp_path / "trials" / "x" / "checkpoints"
    checkpoints.mkdir(parents=True)
    watch.begin("x", {}, is_running=True)
    watch.end("x", reason="its process was killed")
    assert checkpoints.exists()


# --- what mattered -----------------------------------------------------------------------------


def trials_of(count: int) -> tuple[TrialRecord, ...]:
    """The objective follows lambda; beta is noise."""
    weights = [0.01 * 1.6**index for index in range(count)]
    return tuple(
        TrialRecord(
            index + 1,
            f"t{index}",
            "finished",
            {"method.dcml.lambda": weight, "method.dcml.beta": (index * 7 % count) / count},
            (TrialPoint(4, {"A": weight}, 1.0, 1.0),),
        )
        for index, weight in enumerate(weights)
    )


def two_weights(folder: Path) -> Search:
    space = {
        "method.dcml.lambda": {"name": "log_uniform", "low": 0.005, "high": 1.0},
        "method.dcml.beta": {"name": "uniform", "low": 0.0, "high": 1.0},
    }
    return make_search(folder, space=space)


def test_the_key_that_decides_the_objective_matters_most(tmp_path: Path) -> None:
    found = importances(two_weights(tmp_path), SearchRecord("x", "mean_dice", 4, trials_of(8)))
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["method.dcml.lambda"] > 0.6


def test_three_trials_say_nothing_about_what_matters(tmp_path: Path) -> None:
    assert importances(two_weights(tmp_path), SearchRecord("x", "mean_dice", 4, trials_of(3))) == {}


# --- tables and plots --------------------------------------------------------------------------


def mixed() -> SearchRecord:
    """The second of two finished trials is better; one was cut ahead of both, one failed."""

    def points(*dice: float) -> tuple[TrialPoint, ...]:
        return tuple(TrialPoint(number, {"A": value}, number, 1.0) for number, value in enumerate(dice, start=1))

    trials = (
        TrialRecord(1, "a", "finished", {"method.dcml.lambda": 0.1}, points(0.1, 0.2, 0.3, 0.4)),
        TrialRecord(2, "b", "cut", {"method.dcml.lambda": 0.2}, points(0.9)),
        TrialRecord(3, "c", "failed", {"method.dcml.lambda": 0.3}, reason="tau must be positive"),
        TrialRecord(4, "d", "finished", {"method.dcml.lambda": 0.123456}, points(0.1, 0.2, 0.3, 0.5)),
    )
    return SearchRecord("x", "mean_dice", 4, trials, {"method.dcml.lambda": 1.0})


def test_the_table_begins_with_the_best_finished_trial() -> None:
    rows = [line.split() for line in text_of(search_table(mixed())).splitlines() if "/4" in line]
    order = [(row[1], row[3]) for row in rows]
    assert order == [("4", "finished"), ("1", "finished"), ("2", "cut"), ("3", "failed")]


def test_the_verdict_names_the_winner_what_mattered_and_each_failure() -> None:
    text = search_verdict(mixed())
    assert "best: trial 4, validation mean_dice 0.5: lambda=0.1235" in text
    assert "method.dcml.lambda 100 %" in text
    assert "trial 3 failed: tau must be positive" in text


def test_a_console_without_a_terminal_gets_one_line_a_change_of_status() -> None:
    console = Console(width=160, record=True, file=io.StringIO(), force_terminal=False)
    with SearchConsole(console, search=SearchRecord("x", "mean_dice", 4, ())) as live:
        first = mixed().trials[0]
        for seen in (1, 2, 4):
            points = first.points[:seen]
            live.on_trial(TrialRecord(1, "a", "running" if seen < 4 else "finished", first.params, points))
    assert console.export_text().splitlines() == [
        "trial 1 running: lambda=0.1",
        "trial 1 finished in round 4/4: mean_dice 0.4",
    ]


@pytest.mark.parametrize(
    ("winner", "words"),
    [
        ((0.7, 0.8, 0.9), "beats the federation's own values by more than the spread (+0.200"),
        ((0.55, 0.65, 0.75), "within the spread of each other (+0.050"),
        ((0.3, 0.4, 0.5), "worse than the federation's own values by more than the spread (-0.200"),
    ],
)
def test_the_verdict_of_the_final_holds_the_gain_against_the_spread(winner: tuple[float, ...], words: str) -> None:
    """Own values: 0.5, 0.6, 0.7, mean 0.6; standard deviation over seeds 0.1 for both."""

    def scores(dice: tuple[float, ...]) -> tuple[FinalScore, ...]:
        return tuple(FinalScore(seed, {"A": value}) for seed, value in enumerate(dice, start=1))

    assert words in FinalRecord("x", "id", scores(winner), scores((0.5, 0.6, 0.7))).verdict


def test_the_end_of_a_search_holds_the_winner_against_the_federations_own_values() -> None:
    """Trial 1 reached 0.4, the best one 0.5."""
    text = search_verdict(replace(mixed(), default={"method.dcml.lambda": 0.1}))
    assert "the federation's own values (trial 1): 0.4, so +0.1000 on validation" in text


def test_the_final_table_has_mean_and_deviation_over_the_seeds() -> None:
    """Means 0.6 of 0.5, 0.6, 0.7; their standard deviation is 0.1."""
    scores = tuple(FinalScore(seed, {"A": dice}) for seed, dice in ((1, 0.5), (2, 0.6), (3, 0.7)))
    assert "0.600 ± 0.100" in text_of(final_table(FinalRecord("x", "id", scores)))


def test_all_plots_are_drawn_of_a_search_with_every_kind_of_trial(tmp_path: Path) -> None:
    written = write_search_plots(mixed(), tmp_path)
    names = ["objective_by_trial.png", "importance.png", "learning_curves.png", "dice_by_traffic.png"]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 5000 for path in written)


def test_a_search_without_a_result_has_no_plots(tmp_path: Path) -> None:
    assert write_search_plots(SearchRecord("x", "mean_dice", 4, ()), tmp_path) == ()
