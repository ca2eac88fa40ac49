"""What tracking does where MLflow, its database or the network fails: training goes on, and nothing is sent twice."""

from __future__ import annotations

import io
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from rich.console import Console

from gcml_ray.cli.running import watched
from gcml_ray.files.log_file import logged_to
from gcml_ray.tracking.client import connect_to, how_to_open, reason
from gcml_ray.tracking.metrics import federation_metrics, site_metrics, training_metrics
from gcml_ray.tracking.run import MlflowTracker
from gcml_ray.tracking.run_ids import read_run_id, write_run_id
from tests.made_up_run import made_up_config, made_up_evaluation, made_up_infos, made_up_round
from tests.unit.test_tracking import SITES, make_report, make_round


class FlakyClient:
    """Keeps what it is sent; calls fail while ``is_down``."""

    def __init__(self) -> None:
        self.is_down = True
        self.metrics: list[tuple[str, str, int]] = []
        self.params: dict[str, dict[str, str]] = {}
        self.ended: dict[str, str] = {}

    def _answer(self) -> None:
        if self.is_down:
            raise ConnectionError("no route to host")

    def get_experiment_by_name(self, _: str) -> None:
        self._answer()

    def create_experiment(self, name: str, **_: Any) -> str:
        self._answer()
        return name

    def create_run(self, _: str, *, tags: dict[str, str], run_name: str) -> Run:
        self._answer()

        class Info:
            run_id = tags.get("gcml.site", "federation")

        return type("FakeRun", (), {"info": Info, "name": run_name})()

    def log_batch(self, run_id: str, *, metrics: Sequence[Metric], params: Sequence[Param]) -> None:
        self._answer()
        self.metrics += [(run_id, metric.key, metric.step) for metric in metrics]
        self.params.setdefault(run_id, {}).update({param.key: param.value for param in params})

    def set_terminated(self, run_id: str, *, status: str) -> None:
        self._answer()
        self.ended[run_id] = status


def flaky_tracker(client: FlakyClient, folder: Path) -> MlflowTracker:
    return MlflowTracker(lambda: client, uri="http://far:1", folder=folder)  # type: ignore[arg-type,return-value]


def tracked_sites(folder: Path) -> tuple[FlakyClient, MlflowTracker]:
    """A tracker whose server is up, with the sites' runs begun."""
    client = FlakyClient()
    client.is_down = False
    tracker = flaky_tracker(client, folder)
    tracker.start(made_up_config(folder))
    tracker.log_sites(made_up_infos(SITES))
    return client, tracker


def test_failing_server_is_warned_of_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = flaky_tracker(FlakyClient(), tmp_path)
    with caplog.at_level(logging.WARNING):
        tracker.start(made_up_config(tmp_path))
        tracker.log_sites(made_up_infos(SITES))
        tracker.log_round(made_up_round(1, SITES))
        tracker.log_scores([made_up_evaluation("CS", "personalised")])
        tracker.log_artifacts([tmp_path])
    assert tracker.num_failures == 5
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow at http://far:1: start failed (ConnectionError: no route to host). Training goes on"
    ]


def test_what_could_not_be_sent_is_sent_once_the_server_is_back(tmp_path: Path) -> None:
    client = FlakyClient()
    tracker = flaky_tracker(client, tmp_path)
    tracker.start(made_up_config(tmp_path))
    tracker.log_sites(made_up_infos(SITES))
    tracker.log_round(make_round())
    client.is_down = False
    reports = tuple(replace(report, round_number=6) for report in make_round().trained)
    tracker.log_round(replace(make_round(), plan=replace(make_round().plan, round_number=6), trained=reports))
    assert {step for run, key, step in client.metrics if (run, key) == ("DU", "val/dice/after_round")} == {5, 6}
    assert client.params["federation"]["method.dcml.lambda"] == "0.2"
    assert client.params["DU"]["num_train"] == "21"


def test_nothing_is_sent_twice(tmp_path: Path) -> None:
    client, tracker = tracked_sites(tmp_path)
    tracker.log_round(make_round())
    tracker.finish("finished")
    assert len(client.metrics) == len(set(client.metrics))


@pytest.mark.parametrize(
    ("status", "expected"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_all_runs_end_with_the_federations_status(tmp_path: Path, status: Any, expected: str) -> None:
    client, tracker = tracked_sites(tmp_path)
    tracker.finish(status)
    assert client.ended == dict.fromkeys(("federation", *SITES), expected)


def test_what_a_late_site_reports_has_the_round_that_it_is_about(tmp_path: Path) -> None:
    """DU was late in round 3; round 5, which it is in too, gets both reports. HT is still busy and not in the plan."""
    client, tracker = tracked_sites(tmp_path)
    reports = [replace(make_report("DU", dice=0.5), round_number=number) for number in (3, 5)]
    reports.append(replace(make_report("HT", dice=0.5), round_number=4))
    plan = replace(make_round().plan, sites=("CS", "DU"))
    tracker.log_round(replace(make_round(), plan=plan, trained=tuple(reports), left_out={"HT": "busy"}))
    steps = {
        site: [step for run, key, step in client.metrics if (run, key) == (site, "time/train_s")] for site in SITES
    }
    assert steps == {"CS": [], "DU": [3, 5], "HT": [4]}
    parts = [(run, step) for run, key, step in client.metrics if key == "participation/has_trained"]
    assert parts == [("CS", 5), ("DU", 5), ("HT", 5)]


def test_finish_says_how_much_was_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = flaky_tracker(FlakyClient(), tmp_path)
    tracker.start(made_up_config(tmp_path))
    tracker.log_sites(made_up_infos(("CS",)))
    report = make_report("CS", dice=0.5)
    record = replace(make_round(), plan=replace(make_round().plan, sites=("CS",)), trained=(report,))
    tracker.log_round(record)
    tracker.finish("finished")
    num_metrics = sum(map(len, (federation_metrics(record), site_metrics(record, "CS"), training_metrics(report))))
    assert (
        f"failed 4 times in this run; {num_metrics} metrics were not sent (they are in {tmp_path}"
        in caplog.messages[-1]
    )


def test_failure_that_was_made_up_for_is_no_alarm_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two runs make the tables of one new database at the same time, for example: one of them fails at first."""
    client = FlakyClient()
    tracker = flaky_tracker(client, tmp_path)
    tracker.start(made_up_config(tmp_path))
    client.is_down = False
    with caplog.at_level("INFO"):
        tracker.finish("finished")
    assert [(each.levelname, each.message.split("; ")[-1]) for each in caplog.records[1:]] == [
        ("INFO", "all was sent later")
    ]


def test_files_that_were_not_sent_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = FlakyClient()
    client.is_down = False
    tracker = flaky_tracker(client, tmp_path)
    tracker.start(made_up_config(tmp_path))
    tracker.log_model("nowhere", tmp_path / "missing.safetensors")
    tracker.finish("finished")
    assert "failed 1 times in this run; 0 metrics and files were not sent" in caplog.messages[-1]


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"uri": 1}', '{"run_id": 3}', "x", '"run_id"'])
def test_damaged_ids_of_a_run_begin_a_new_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "tracking.json").write_text(content)
    assert read_run_id(tmp_path / "tracking.json", uri="sqlite:///a.db") is None


def test_a_copy_of_a_run_folder_does_not_write_into_the_run_of_the_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, copy, moved = (tmp_path / name / "tracking.json" for name in ("first", "copy", "moved"))
    for file in (first, copy, moved):
        file.parent.mkdir()
    write_run_id(first, uri="u", experiment_id="1", run_id="7")
    copy.write_text(first.read_text())
    assert read_run_id(first, uri="u") == "7"
    assert read_run_id(copy, uri="u") is None
    assert f"{copy.parent} is a copy of {first.parent}, which keeps its MLflow run" in caplog.text
    first.rename(moved)
    assert read_run_id(moved, uri="u") == "7"
    write_run_id(first, uri="u", experiment_id="1", run_id="8")
    assert read_run_id(moved, uri="u") == "7", "another run has taken the old place"


def test_a_failure_is_one_line_that_names_the_fault_at_the_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException) as no_server:
        MlflowClient("http://127.0.0.1:1").get_run("a")
    assert reason(no_server.value) == "ConnectionRefusedError: [Errno 111] Connection refused"
    assert reason(TimeoutError()) == "TimeoutError"
    with pytest.raises(MlflowException) as mistyped:
        MlflowClient("postgress://h/x").search_experiments()
    assert "postgress://h/x" in reason(mistyped.value), "MLflow's words, not the KeyError below"
    circle = ValueError("a")
    circle.__cause__ = circle
    assert reason(circle) == "ValueError: a"


def test_a_fault_of_the_database_shows_no_statements(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    database = tmp_path / "mlflow.db"
    client = connect_to(f"sqlite:///{database}")
    run_id = client.create_run(client.create_experiment("full")).info.run_id
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE latest_metrics")  # whatever the database answers with an OperationalError
    with pytest.raises(MlflowException) as broken:
        client.log_metric(run_id, "dice", 0.5)
    assert reason(broken.value) == "OperationalError: no such table: latest_metrics"
    assert "SELECT" not in "".join(capfd.readouterr())


def test_a_person_sees_once_that_mlflow_is_away(tmp_path: Path) -> None:
    text = io.StringIO()
    client = FlakyClient()
    with watched(Console(file=text, width=200), "run"), logged_to(tmp_path / "log.txt", ("gcml_ray",)):
        tracker = flaky_tracker(client, tmp_path)
        tracker.start(made_up_config(tmp_path))
        tracker.log_round(made_up_round(1, SITES))
    assert (
        text.getvalue()
        == "  ! MLflow at http://far:1: start failed (ConnectionError: no route to host). Training goes on\n"
    )
    assert "start failed" in (tmp_path / "log.txt").read_text()


def test_no_password_is_logged_or_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = "http://ann:pa55@far:1"
    client = FlakyClient()
    tracker = MlflowTracker(lambda: client, uri=uri, folder=tmp_path)  # type: ignore[arg-type,return-value]
    config = made_up_config(tmp_path)
    tracker.start(config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})}))
    client.is_down = False
    tracker.log_sites(made_up_infos(SITES))
    tracker.finish("finished")
    assert "MLflow at http://***@far:1" in caplog.text
    assert client.params["federation"]["tracking.uri"] == "http://***@far:1"
    assert "pa55" not in caplog.text
    assert how_to_open(uri) == "http://***@far:1"
