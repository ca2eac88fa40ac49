"""A search in MLflow that ends before its time."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient

from gcml_ray.config import Config
from gcml_ray.search.records import TrialRecord
from gcml_ray.tracking.search import SearchTracker
from tests.made_up_run import made_up_config


def tracker_in(folder: Path) -> SearchTracker:
    values = made_up_config(folder).model_dump(by_alias=True)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    config = Config.model_validate(values | {"tracking": {"enabled": True, "uri": uri}})
    return SearchTracker(config, folder / "search", name="s", objective="mean_dice", params={})


def statuses(folder: Path) -> dict[str, str]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run.info.status for run in client.search_runs(ids)}


def test_a_search_that_is_abandoned_leaves_no_run_that_seems_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    tracker = tracker_in(tmp_path)
    tracker.on_trial(TrialRecord(0, "a", "running"))
    tracker.on_trial(TrialRecord(1, "b", "finished"))
    assert statuses(tmp_path) == {"s": "RUNNING", "trial 0": "RUNNING", "trial 1": "FINISHED"}
    tracker.abandon("KILLED")
    assert statuses(tmp_path) == {"s": "KILLED", "trial 0": "KILLED", "trial 1": "FINISHED"}


def test_a_search_that_never_began_makes_no_run(tmp_path: Path) -> None:
    tracker_in(tmp_path).abandon("FAILED")
    assert not (tmp_path / "mlflow.db").exists()
