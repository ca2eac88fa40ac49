"""Tracking a search in MLflow: one run for the search, one child run a trial.

Below it are the final runs too, with a run a site of their own.

A trial's own federation is not tracked; what it reports each round goes to its child run, with step = round:
``val/dice_mean``, ``val/dice_worst``, ``SITE/val/dice``, ``traffic/megabytes``, ``time/seconds`` and ``objective``.
As with a federation, tracking never stops a search.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from gcml_ray.config import Config
from gcml_ray.files.run_folder import TRACKING_FILE, RunFolder
from gcml_ray.search.records import FinalRecord, Objective, SearchRecord, TrialPoint, TrialRecord, mean_dices
from gcml_ray.tracking.client import children_of, without_passwords
from gcml_ray.tracking.metrics import flat_params, safe_key
from gcml_ray.tracking.parent import ParentRun
from gcml_ray.tracking.run import MLFLOW_STATUS

if TYPE_CHECKING:
    from mlflow import MlflowClient


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
        self._objective: Objective = objective
        self._parent = ParentRun(
            base,
            folder,
            file=folder / TRACKING_FILE,
            name=name,
            role="search",
            params=params,
            on_reopen=self._reopen_children,
        )
        self._children: dict[str, str] = {}
        self._sent: dict[str, int] = {}

    def on_trial(self, trial: TrialRecord) -> None:
        """Sends what is new of a trial."""
        self._parent.guard("on_trial", lambda client: self._send(client, trial))

    def finish(self, search: SearchRecord, artifacts: Sequence[Path], *, is_stopped: bool) -> None:
        """Sends what is left, keeps files with the search's run and closes it."""

        def close(client: MlflowClient) -> None:
            for trial in search.trials:
                self._send(client, trial)
            for path in without_passwords(artifacts):
                client.log_artifact(self._parent.run_id, str(path))
            if search.best is not None:
                client.log_metric(self._parent.run_id, "best/objective", search.best.value(search.objective))
                client.set_tag(self._parent.run_id, "gcml.best_trial", str(search.best.number))
            client.set_terminated(self._parent.run_id, status="KILLED" if is_stopped else "FINISHED")

        self._parent.guard("finish", close)

    def abandon(self, status: Literal["KILLED", "FAILED"]) -> None:
        """Closes the runs of a search that ended before its time, if they were begun; what was sent stays."""

        def close(client: MlflowClient) -> None:
            for child in children_of(client, self._parent.experiment_id, self._parent.run_id):
                if child.info.status == "RUNNING":
                    client.set_terminated(child.info.run_id, status=status)
            client.set_terminated(self._parent.run_id, status=status)

        if self._parent.run_id:
            self._parent.guard("abandon", close)

    def _reopen_children(self, client: MlflowClient) -> None:
        for child in children_of(client, self._parent.experiment_id, self._parent.run_id):
            if child.data.tags.get("gcml.role") != "trial":  # a final run
                continue
            trial_id, run_id = child.data.tags["gcml.trial"], child.info.run_id
            self._children[trial_id] = run_id
            history = client.get_metric_history(run_id, "objective")
            self._sent[trial_id] = max((metric.step for metric in history), default=0)

    def _send(self, client: MlflowClient, trial: TrialRecord) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415 - slow, and only where tracking is on

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
        if trial.status in MLFLOW_STATUS:
            client.set_terminated(run_id, status=MLFLOW_STATUS[trial.status])
        elif trial.status == "running":
            client.update_run(run_id, status="RUNNING")

    def _create_child(self, client: MlflowClient, trial: TrialRecord) -> str:
        from mlflow.entities import Param  # noqa: PLC0415 - slow, and only where tracking is on

        tags = {"mlflow.parentRunId": self._parent.run_id, "gcml.role": "trial", "gcml.trial": trial.trial_id}
        tags |= {"mlflow.source.name": "gcml"}
        run = client.create_run(self._parent.experiment_id, tags=tags, run_name=f"trial {trial.number}")
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


class FinalTracker:
    """Puts the final runs below the search's own; their sites' runs are below them. Does nothing where tracking is off.

    Args:
        base: the federation that the search varies; says where to track.
        folder: the search's folder.
        name: of the search.
    """

    def __init__(self, base: Config, folder: Path, *, name: str) -> None:
        self._parent = ParentRun(base, folder, file=folder / TRACKING_FILE, name=name, role="search", params={})

    def on_run(self, folder: RunFolder, *, is_default: bool) -> None:
        """Puts a run that has ended below the search's."""
        self._parent.adopt(folder, tags={"gcml.final": "default" if is_default else "winner"})

    def finish(self, final: FinalRecord | None) -> None:
        """Logs what came of it, if anything did, and closes the search's run again."""

        def close(client: MlflowClient) -> None:
            if final is None:
                client.set_terminated(self._parent.run_id, status="KILLED")
                return
            for name, scores in (("winner", final.scores), ("default", final.default_scores)):
                if scores:
                    client.log_metric(self._parent.run_id, f"final/{name}/test/dice", fmean(mean_dices(scores)))
                    client.log_metric(self._parent.run_id, f"final/{name}/test/dice_sd", stdev(mean_dices(scores)))
            client.set_tag(self._parent.run_id, "gcml.verdict", final.verdict)
            client.set_terminated(self._parent.run_id, status="FINISHED")

        self._parent.guard("finish", close)
