"""A comparison with fake trainers: which cells run, which fail, how it is stopped, and what is tracked."""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

import actors.compare
from gcml_ray.cli.compare import where_things_are
from gcml_ray.comparison.config import ComparisonConfig
from gcml_ray.comparison.output import finished_cells
from gcml_ray.config import Config
from gcml_ray.console.comparison import CellsConsole
from gcml_ray.errors import ConfigError
from gcml_ray.files.run_folder import TRACKING_FILE, RunFolder
from gcml_ray.records import WAITS_FOR_ROOM, EvaluationReport, SiteStatus, Split
from tests.comparison_runs import METHODS, Watch, break_gossip, make_comparison, run
from tests.fakes import FakeTrainers, Fault, calls_of
from tests.made_up_run import made_up_config, made_up_round
from tests.runs import RecordingListener


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds and have tests of their own."""
    monkeypatch.setattr("gcml_ray.report.run.write_plots", lambda _: ())
    monkeypatch.setattr("gcml_ray.report.comparison.draw_plots", lambda *_: ())


def run_folder(comparison: ComparisonConfig, cell: str) -> RunFolder:
    return RunFolder(Path(comparison.output) / cell)


# --- cells -------------------------------------------------------------------------------------


def test_every_cell_runs_once_and_the_tables_hold_all_methods(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path, seeds=(0, 1))
    watch = Watch()
    ending = run(comparison, watch)
    assert watch.titles[0] == "fakes 1/6: local, seed 0"
    assert len(finished_cells(comparison)) == len(watch.titles) == 6
    assert sorted(row.method for row in ending.tables.rows) == ["gcml", "gossip_avg", "local"]
    assert not ending.is_stopped
    assert not ending.failures
    assert (tmp_path / "runs" / "table.md").is_file()


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    run(comparison)
    again = Watch()
    ending = run(comparison, again)
    assert again.titles == []
    assert len(ending.tables.rows) == 3


def test_cell_that_another_process_has_finished_in_the_meantime_is_not_run_again(tmp_path: Path) -> None:
    """A second `gcml compare` of the same file runs all cells while this one is at its first."""
    comparison = make_comparison(tmp_path)
    written: dict[Path, int] = {}

    def run_all(title: str, _: RecordingListener) -> None:
        if title.startswith("fakes 1/3"):
            run(comparison)
            written.update({path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.csv")})

    ending = run(comparison, Watch(on_cell=run_all))
    assert (ending.failures, len(ending.tables.rows), len(written)) == ({}, 3, 3)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_tables_alone_run_nothing_and_hold_what_is_finished(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    run(comparison, make_trainer=break_gossip)
    watch = Watch()
    ending = run(comparison, watch, tables_only=True)
    assert watch.titles == []
    assert {row.method for row in ending.tables.rows} == {"local", "gcml"}


def test_results_that_cannot_be_written_are_said_before_the_first_cell(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    Path(comparison.results).write_text("a file where a folder should be")
    watch = Watch()
    with pytest.raises(ConfigError, match=r"results: .*results cannot be made or written"):
        run(comparison, watch)
    assert watch.titles == []


def test_failing_cell_whose_log_cannot_be_written_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    comparison = make_comparison(tmp_path)
    monkeypatch.setattr(actors.compare, "run_federation", full)
    for method in METHODS:
        path = run_folder(comparison, f"{method}_seed0").path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a file where a folder should be")
    ending = run(comparison)
    assert len(ending.failures) == 3
    assert all(reason.endswith("No space left on device") for reason in ending.failures.values())


def test_a_cell_whose_site_missed_rounds_is_no_equal_and_is_not_tabulated(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)

    def make_trainer(config: Config, *arguments: Any, **options: Any) -> Any:
        faults = (Fault("B", 2, "train", "raise"),) if config.method.name == "gcml" else ()
        return FakeTrainers(faults)(config, *arguments, **options)

    ending = run(comparison, make_trainer=make_trainer)
    assert [cell.method for cell in finished_cells(comparison)] == ["local", "gossip_avg"]
    reason = ending.failures["gcml, seed 0"]
    assert reason.startswith("B missed 1 of 4 rounds (broken train of B in round 2 (")
    assert reason.endswith("delete " + str(run_folder(comparison, "gcml_seed0").path) + " to run it anew")
    num_calls = len(calls_of(run_folder(comparison, "gcml_seed0"), "A", "evaluate"))
    assert run(comparison).failures == {"gcml, seed 0": reason}
    assert len(calls_of(run_folder(comparison, "gcml_seed0"), "A", "evaluate")) == num_calls, "nothing is tested again"


def test_failing_cell_stops_no_other_and_is_listed_with_its_reason(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    watch = Watch()
    ending = run(comparison, watch, make_trainer=break_gossip)
    assert [cell.method for cell in finished_cells(comparison)] == ["local", "gcml"]
    assert list(ending.failures) == ["gossip_avg, seed 0"]
    assert "broken start of A" in ending.failures["gossip_avg, seed 0"]
    assert any(line.startswith("gossip_avg, seed 0 failed") for line in watch.lines)
    assert not ending.is_stopped


def test_cell_that_lost_a_site_is_no_cell(tmp_path: Path) -> None:
    """B raises in three rounds and is dropped: the run finishes, but its mean would be over other sites."""
    comparison = make_comparison(tmp_path)
    ending = run(comparison, None, *(Fault("B", number, "train", "raise") for number in (1, 2, 3)))
    assert finished_cells(comparison) == ()
    assert len(ending.failures) == len(METHODS)
    reason = ending.failures["gcml, seed 0"]
    assert "B: train, raised" in reason
    assert f"delete {run_folder(comparison, 'gcml_seed0').path}" in reason


def test_cell_without_a_sites_personal_scores_is_no_cell_and_is_tested_again(tmp_path: Path) -> None:
    """B's model before gossip was scored, so B has rows; its mean would be missing in the table all the same."""

    def forgetful(config: Config, site: str, folder: Path, **options: Any) -> Any:
        trainer = FakeTrainers()(config, site, folder, **options)
        test = trainer.evaluate

        def evaluate(*, split: Split, model: str) -> EvaluationReport:
            if (site, model) == ("B", "personalised"):
                raise ValueError("lost")
            return test(split=split, model=model)

        trainer.evaluate = evaluate  # type: ignore[method-assign]
        return trainer

    comparison = make_comparison(tmp_path, federation={"warmup_rounds": 1})
    ending = run(comparison, make_trainer=forgetful)
    assert finished_cells(comparison) == ()
    assert ending.failures["gcml, seed 0"].startswith("not tested: B (personalised): ")
    assert run(comparison).failures == {}
    assert len(finished_cells(comparison)) == len(METHODS)
    assert calls_of(run_folder(comparison, "gcml_seed0"), "B", "train") == [1, 2, 3, 4]


def test_failed_cell_is_tried_again_by_the_next_run(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    run(comparison, make_trainer=break_gossip)
    watch = Watch()
    assert not run(comparison, watch).failures
    assert watch.titles == ["fakes 1/1: gossip_avg, seed 0"]


def test_fault_of_ours_leaves_its_traceback_in_the_cells_log(tmp_path: Path) -> None:
    def explode(title: str, listener: RecordingListener) -> None:
        if "gossip" in title:
            listener.on_end = lambda _: 1 / 0

    comparison = make_comparison(tmp_path)
    ending = run(comparison, Watch(on_cell=explode))
    assert ending.failures["gossip_avg, seed 0"].startswith("ZeroDivisionError: division by zero (traceback in ")
    assert "ZeroDivisionError" in run_folder(comparison, "gossip_avg_seed0").log_file.read_text()
    assert len(finished_cells(comparison)) == 2


def test_stopped_comparison_begins_no_other_cell_and_goes_on_where_it_was(tmp_path: Path) -> None:
    def stop_in_round_2(title: str, listener: RecordingListener) -> None:
        listener.stop_after = 2 if "gossip" in title else 0

    comparison = make_comparison(tmp_path)
    watch = Watch(on_cell=stop_in_round_2)
    assert run(comparison, watch).is_stopped
    assert len(watch.titles) == 2
    assert not run(comparison).is_stopped
    assert calls_of(run_folder(comparison, "gossip_avg_seed0"), "A", "train") == [1, 2, 3, 4]


def test_stop_in_the_last_round_of_a_cell_lets_it_finish_and_begins_no_other(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)

    def stop_in_the_last_round(title: str, listener: RecordingListener) -> None:
        del title
        listener.stop, listener.stop_after = threading.Event(), 4
        stops.append(listener.stop)

    stops: list[threading.Event] = []

    class OneStopACell(Watch):
        @contextmanager
        def cell(self, title: str) -> Iterator[tuple[RecordingListener, threading.Event]]:
            with super().cell(title) as (listener, _):
                yield listener, stops[-1]

    watch = OneStopACell(on_cell=stop_in_the_last_round)
    ending = run(comparison, watch)
    assert (ending.is_stopped, len(watch.titles), len(finished_cells(comparison))) == (True, 1, 1)


def test_unfinished_cell_of_another_configuration_is_not_gone_on_with(tmp_path: Path) -> None:
    def stop_in_round_2(_: str, listener: RecordingListener) -> None:
        listener.stop_after = 2

    run(make_comparison(tmp_path), Watch(on_cell=stop_in_round_2))
    changed = make_comparison(tmp_path, optimiser={"learning_rate": 0.5})
    ending = run(changed)
    assert "local_seed0 holds an unfinished cell of another configuration" in ending.failures["local, seed 0"]
    assert len(finished_cells(changed)) == 2


def test_finished_cell_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(make_comparison(tmp_path))
    with pytest.raises(ConfigError, match=r"local_seed0\.csv was made with another configuration"):
        run(make_comparison(tmp_path, optimiser={"learning_rate": 0.5}))


# --- tracking ----------------------------------------------------------------------------------


def test_all_cells_stand_below_one_run_with_the_table(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path, tracking={"enabled": True})
    ending = run(comparison, make_trainer=break_gossip)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fakes")
    assert experiment is not None
    by_role: dict[str, list[Any]] = {}
    for each in client.search_runs([experiment.experiment_id]):
        by_role.setdefault(each.data.tags["gcml.role"], []).append(each)
    (parent,) = by_role["comparison"]
    assert parent.info.status == "FAILED"
    assert {each.data.tags["mlflow.parentRunId"] for each in by_role["federation"]} == {parent.info.run_id}
    assert {"local_seed0", "gcml_seed0"} <= {each.info.run_name for each in by_role["federation"]}
    assert parent.data.metrics["gcml/test/dice"] == pytest.approx(ending.tables.rows[0].dice)
    assert {"table.md", "table.csv"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}

    run(comparison)  # the cell that failed
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
    assert len(client.search_runs([experiment.experiment_id], "tags.`gcml.role` = 'comparison'")) == 1
    assert "gossip_avg/test/dice" in client.get_run(parent.info.run_id).data.metrics


# --- the console of several cells --------------------------------------------------------------


def test_where_there_is_no_table_a_minute_of_silence_ends_with_what_the_cells_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(width=200, file=io.StringIO())
    cells = CellsConsole(console, title="both")
    with cells.row("gcml, seed 0") as first, cells.row("local, seed 0"):
        first.on_start(made_up_config(Path("run")), ("A", "B"))
        first.on_round_begin(made_up_round(5, ("A", "B")).plan)
        monkeypatch.setattr(cells, "_told_at", cells._told_at - 61)
        first.on_status(())
        first.on_status(())
    last = console.file.getvalue().splitlines()[1:]
    assert last == ["gcml, seed 0: round 5/30 exchange, 0:00:00 gone; local, seed 0: starting, 0:00:00 gone"]


def test_cells_are_rows_while_they_run_and_abort_reaches_their_driver() -> None:
    config = made_up_config(Path("run"))
    console = Console(width=100, file=io.StringIO(), record=True)
    cells = CellsConsole(console, title="both")
    with cells.row("gcml, seed 0") as first, cells.row("local, seed 0"):
        first.on_start(config, ("A", "B"))
        record = made_up_round(5, ("A", "B"))
        first.on_round_begin(record.plan)
        first.on_round_end(record)
        first.on_status((SiteStatus("A", 5, "train", 1, 5),))
        console.print(cells._table())
        first.on_status((SiteStatus("A", 0, WAITS_FOR_ROOM, 0, 0),))
        console.print(cells._table())
        cells.abort()
        with pytest.raises(KeyboardInterrupt):
            first.on_status(())
    assert cells._rows == []
    text = console.export_text()
    assert "gcml, seed 0 begins" in text
    assert "round 5/30 exchange" in text
    assert "local, seed 0" in text
    assert WAITS_FOR_ROOM in text


def test_last_words_name_the_folders_the_page_and_mlflow_where_it_was_tracked(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    runs = tmp_path / "runs"
    untracked = where_things_are(comparison, [])
    assert untracked == {
        "table, plots and runs": str(runs),
        "finished cells": str(tmp_path / "results"),
        "one page": f"gcml report {runs}",
    }
    runs.mkdir()
    (runs / TRACKING_FILE).touch()
    assert where_things_are(comparison, [])["MLflow"] == f"mlflow ui --backend-store-uri sqlite:///{runs}/mlflow.db"
    elsewhere = where_things_are(comparison, ["tracking.uri=http://server:5000"])
    assert elsewhere["MLflow"] == "http://server:5000"
