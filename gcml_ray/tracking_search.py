"""Tracking a search in MLflow: one run for the search, one child run a trial.

A trial's own federation is not tracked; what it reports each round goes to its child run, with step = round:
``val/dice_mean``, ``val/dice_worst``, ``SITE/val/dice``, ``traffic/megabytes``, ``time/seconds`` and ``objective``.
As with a federation, tracking never stops a search.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcml_ray.config import Config
from gcml_ray.run_folder import replace_file
from gcml_ray.search_records import Objective, SearchRecord, TrialPoint, TrialRecord
from gcml_ray.tracking import connect_to, find_experiment, tracking_uri
from gcml_ray.tracking_metrics import flat_params, safe_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_STATUS = {"finished": "FINISHED", "cut": "KILLED", "stopped": "KILLED", "failed": "FAILED"}


class SearchTracker:
    """Writes a search's runs; does nothing where tracking is off.

    Args:
        base: the federation that the search varies; says where to track.
        folder: the search's folder; ``tracking.json`` in it names the run, and a resume reads it.
        name: of the search.
        objective: what is maximised.
        params: the search's own, by key; the run is begun with them when the first trial is.
    """

    def __init__(
        self, base: Config, folder: Path, *, name: str, objective: Objective, params: Mapping[str, str]
    ) -> None:
        self.num_failures = 0
        self._params = params
        self._base = base
        self._folder = folder
        self._name = name
        self._objective: Objective = objective
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._run_id = ""
        self._children: dict[str, str] = {}
        self._sent: dict[str, int] = {}

    def on_trial(self, trial: TrialRecord) -> None:
        """Sends what is new of a trial."""
        self._guard("on_trial", lambda: self._send(trial))

    def finish(self, search: SearchRecord, artifacts: Sequence[Path], *, is_stopped: bool) -> None:
        """Sends what is left, keeps files with the search's run and closes it."""

        def close() -> None:
            client = self._ready_client()
            for trial in search.trials:
                self._send(trial)
            for path in artifacts:
                client.log_artifact(self._run_id, str(path))
            if search.best is not None:
                client.log_metric(self._run_id, "best/objective", search.best.value(search.objective))
                client.set_tag(self._run_id, "gcml.best_trial", str(search.best.number))
            client.set_terminated(self._run_id, status="KILLED" if is_stopped else "FINISHED")

        self._guard("finish", close)

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        """Tracking must never stop a search, whatever MLflow, its database or the network raises."""
        if not self._base.tracking.enabled:
            return
        try:
            call()
        except Exception as error:
            self.num_failures += 1
            level = logging.WARNING if self.num_failures == 1 else logging.DEBUG
            log.log(level, "MLflow: %s failed (%r). The search goes on", what, error)

    def _ready_client(self) -> MlflowClient:
        """The client, with the search's run begun; what failed in an earlier call is tried again."""
        if self._client is None:
            self._client = connect_to(tracking_uri(self._base, self._folder))
        if not self._run_id:
            self._begin(self._client, tracking_uri(self._base, self._folder))
        return self._client

    def _begin(self, client: MlflowClient, uri: str) -> None:
        """Begins the search's run, or goes on with it."""
        from mlflow.entities import Param  # noqa: PLC0415 - slow, and only where tracking is on

        self._experiment_id = find_experiment(client, self._base.tracking.experiment, uri)
        file = self._folder / "tracking.json"
        if file.exists() and (known := json.loads(file.read_text(encoding="utf-8")))["uri"] == uri:
            self._run_id = known["run_id"]
            client.update_run(self._run_id, status="RUNNING")
            self._reopen_children(client)
            return
        tags = {"gcml.role": "search", "gcml.folder": str(self._folder.resolve()), "mlflow.source.name": "gcml"}
        self._run_id = client.create_run(self._experiment_id, tags=tags, run_name=self._name).info.run_id
        names = {"uri": uri, "experiment_id": self._experiment_id, "run_id": self._run_id}
        replace_file(file, json.dumps(names, indent=2) + "\n")
        client.log_batch(self._run_id, params=[Param(key, value) for key, value in self._params.items()])

    def _reopen_children(self, client: MlflowClient) -> None:
        query = f"tags.`mlflow.parentRunId` = '{self._run_id}'"
        for child in client.search_runs([self._experiment_id], query):
            trial_id, run_id = child.data.tags["gcml.trial"], child.info.run_id
            self._children[trial_id] = run_id
            history = client.get_metric_history(run_id, "objective")
            self._sent[trial_id] = max((metric.step for metric in history), default=0)

    def _send(self, trial: TrialRecord) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415 - slow, and only where tracking is on

        client = self._ready_client()
        run_id = self._children.get(trial.trial_id) or self._create_child(client, trial)
        now_ms = int(time.time() * 1000)
        for point in trial.points:
            if point.round_number > self._sent.get(trial.trial_id, 0):
                values = self._metrics(point).items()
                metrics = [Metric(key, float(value), now_ms, point.round_number) for key, value in values]
                client.log_batch(run_id, metrics=metrics)
                self._sent[trial.trial_id] = point.round_number
        client.set_tag(run_id, "gcml.status", trial.status)
        if trial.reason:
            client.set_tag(run_id, "gcml.reason", trial.reason[:4000])
        if trial.status in _STATUS:
            client.set_terminated(run_id, status=_STATUS[trial.status])
        elif trial.status == "running":
            client.update_run(run_id, status="RUNNING")

    def _create_child(self, client: MlflowClient, trial: TrialRecord) -> str:
        from mlflow.entities import Param  # noqa: PLC0415 - slow, and only where tracking is on

        tags = {"mlflow.parentRunId": self._run_id, "gcml.role": "trial", "gcml.trial": trial.trial_id}
        tags |= {"mlflow.source.name": "gcml"}
        run = client.create_run(self._experiment_id, tags=tags, run_name=f"trial {trial.number}")
        run_id = self._children[trial.trial_id] = str(run.info.run_id)
        client.log_batch(run_id, params=[Param(key, value) for key, value in flat_params(trial.params).items()])
        return run_id

    def _metrics(self, point: TrialPoint) -> dict[str, float]:
        values = {
            "objective": point.value(self._objective),
            "val/dice_mean": point.mean_dice,
            "val/dice_worst": point.worst_dice,
            "traffic/megabytes": point.megabytes,
            "time/seconds": point.seconds,
        }
        return values | {safe_key(f"{site}/val/dice"): dice for site, dice in point.site_dice.items()}
