"""Tracking a federation in MLflow: one run for the federation, one child run a site.

Names and meaning of all metrics are in :mod:`gcml_ray.tracking.metrics`. Tracking never stops a
federation: what could not be sent is kept, and sent with the next round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gcml_ray.config import Config
from gcml_ray.files.run_folder import TRACKING_FILE
from gcml_ray.records import EvaluationReport, RoundRecord, RunOutcome, SiteInfo
from gcml_ray.tracking.client import children_of, connect_to, find_experiment, reason, tracking_uri, without_passwords
from gcml_ray.tracking.metrics import (
    Metrics,
    federation_metrics,
    federation_score_metrics,
    flat_params,
    score_metrics,
    site_metrics,
    training_metrics,
)
from gcml_ray.tracking.run_ids import read_run_id, write_run_id
from gcml_ray.wording import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

MLFLOW_STATUS = {"finished": "FINISHED", "cut": "KILLED", "stopped": "KILLED", "failed": "FAILED"}
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # a batch of MLflow's protocol
_MAX_TAG = 5000  # characters of a tag that MLflow takes
LASTING = {"log_artifacts", "log_model"}  # uploads: they are not retried
_MAX_PENDING = 200_000  # metrics kept while the server is away, about 50 MB


class Tracker(Protocol):
    """Where the driver sends what it knows about a run."""

    @property
    def is_unreachable(self) -> bool:
        """Whether every attempt to reach the place has failed."""

    def start(self, config: Config) -> None:
        """Begin, or go on with, the run of a federation; a new database takes seconds."""

    def log_sites(self, infos: Sequence[SiteInfo]) -> None:
        """Begin the runs of the sites."""

    def log_round(self, record: RoundRecord) -> None:
        """Log one finished round."""

    def log_scores(self, reports: Sequence[EvaluationReport]) -> None:
        """Log the means of case scores."""

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Keep files, and folders with their name, with the federation's run."""

    def log_model(self, site: str, path: Path) -> None:
        """Keep a site's model with the site's run."""

    def finish(self, status: RunOutcome) -> None:
        """Close all runs."""


class NullTracker:
    """Tracks nothing."""

    is_unreachable = False

    def start(self, config: Config) -> None:
        """Do nothing."""

    def log_sites(self, infos: Sequence[SiteInfo]) -> None:
        """Do nothing."""

    def log_round(self, record: RoundRecord) -> None:
        """Do nothing."""

    def log_scores(self, reports: Sequence[EvaluationReport]) -> None:
        """Do nothing."""

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Do nothing."""

    def log_model(self, site: str, path: Path) -> None:
        """Do nothing."""

    def finish(self, status: RunOutcome) -> None:
        """Do nothing."""


def build_tracker(config: Config, folder: Path) -> Tracker:
    """The tracker that the configuration asks for.

    Args:
        config: ``config.tracking.uri`` is used where it is set, else a sqlite file beside ``folder``.
        folder: the run folder; ``tracking.json`` in it names the MLflow runs, and a resume reads it.

    Raises:
        ConfigError: the URI cannot be a tracking server or a database.
    """
    if not config.tracking.enabled:
        return NullTracker()
    uri = tracking_uri(config, folder)
    return MlflowTracker(lambda: connect_to(uri), uri=uri, folder=folder)


# --- MLflow ------------------------------------------------------------------------------------


@dataclass
class _Pending:
    """What one run has not been sent yet."""

    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # key, value, time in ms, step
    params: dict[str, str] = field(default_factory=dict)


class MlflowTracker:
    """Writes through ``MlflowClient.log_batch`` alone, without MLflow's global state.

    Runs are known by their site's name, the federation's by the empty name.

    Args:
        connect: makes the client; called again until it succeeds once.
        uri: for messages and ``tracking.json``.
        folder: the run folder.
    """

    def __init__(self, connect: Callable[[], MlflowClient], *, uri: str, folder: Path) -> None:
        self.num_failures = 0
        self._connect = connect
        self._uri, self._place = uri, without_secrets(uri)  # the latter to show
        self._folder = folder
        self._failed: set[str] = set()
        self._client: MlflowClient | None = None
        self._config: Config | None = None
        self._infos: tuple[SiteInfo, ...] = ()
        self._experiment_id = ""
        self._run_ids: dict[str, str] = {}
        self._resumed_id: str | None = None
        self._pending: dict[str, _Pending] = {}
        self._reports: dict[tuple[str, str, str], EvaluationReport] = {}

    @property
    def is_unreachable(self) -> bool:
        """See :class:`Tracker`."""
        return self.num_failures > 0 and not self._experiment_id

    def start(self, config: Config) -> None:
        """Begin the run, or go on with the one that ``tracking.json`` names."""
        self._config = config
        self._resumed_id = read_run_id(self._folder / TRACKING_FILE, uri=self._uri)
        self._guard("start", self._flush)

    def log_sites(self, infos: Sequence[SiteInfo]) -> None:
        """Begin the sites' runs."""
        self._infos = tuple(infos)
        self._guard("log_sites", self._flush)

    def log_round(self, record: RoundRecord) -> None:
        """Log one finished round to the federation, to every site that had a part in it, and to who was left out."""
        step = record.plan.round_number
        self._add("", federation_metrics(record), step)
        for site in sorted({*record.plan.sites, *record.left_out}):
            self._add(site, site_metrics(record, site), step)
        for report in record.trained:  # two of one site where the first was late
            self._add(report.site, training_metrics(report), report.round_number)
        self._guard("log_round", self._flush)

    def log_scores(self, reports: Sequence[EvaluationReport]) -> None:
        """Log the means of case scores; the federation's mean is over all sites logged so far."""
        unit = self._config.data.distance_unit if self._config is not None else "unknown_unit"
        self._reports |= {(report.site, report.split, report.model): report for report in reports}
        for report in reports:
            self._add(report.site, score_metrics(report, distance_unit=unit), report.round_number)
            alike = [
                known for known in self._reports.values() if (known.split, known.model) == (report.split, report.model)
            ]
            self._add("", federation_score_metrics(alike), report.round_number)
        self._guard("log_scores", self._flush)

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Keep files, and folders with their name, with the federation's run."""

        def upload() -> None:
            client = self._ready_client()
            for path in without_passwords(paths):
                if path.is_dir():
                    client.log_artifacts(self._run_ids[""], str(path), artifact_path=path.name)
                else:
                    client.log_artifact(self._run_ids[""], str(path))

        self._guard("log_artifacts", upload)

    def log_model(self, site: str, path: Path) -> None:
        """Upload a site's model as ``model/FILE`` of its run."""
        self._guard("log_model", lambda: self._ready_client().log_artifact(self._run_ids[site], str(path), "model"))

    def finish(self, status: RunOutcome) -> None:
        """Send what is left, close all runs and say how often tracking failed; nothing before ``start``."""
        if self._config is None:
            return

        def close() -> None:
            self._flush()
            for run_id in self._run_ids.values():
                self._ready_client().set_terminated(run_id, status=MLFLOW_STATUS[status])

        self._guard("finish", close)
        num_left = sum(len(pending.metrics) for pending in self._pending.values())
        has_lost_files = bool(self._failed & LASTING)
        if num_left or has_lost_files:
            log.warning(
                "MLflow at %s failed %d times in this run; %d metrics%s were not sent (they are in %s)",
                self._place, self.num_failures, num_left, " and files" * has_lost_files, self._folder,
            )  # fmt: skip
        elif self.num_failures:
            log.info("MLflow at %s failed %d times in this run; all was sent later", self._place, self.num_failures)

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        """Tracking must never stop training, whatever MLflow, its database or the network raises."""
        try:
            call()
        except Exception as error:
            self.num_failures += 1
            self._failed.add(what)
            level = logging.WARNING if self.num_failures == 1 else logging.DEBUG
            log.log(level, "MLflow at %s: %s failed (%s). Training goes on", self._place, what, reason(error))

    def _add(self, run: str, metrics: Metrics, step: int) -> None:
        now_ms = int(time.time() * 1000)
        pending = self._pending.setdefault(run, _Pending())
        pending.metrics.extend((key, float(value), now_ms, step) for key, value in metrics.items())
        del pending.metrics[:-_MAX_PENDING]

    def _flush(self) -> None:
        """Send what is pending; what was sent is forgotten, the rest stays for the next call."""
        client = self._ready_client()  # imports mlflow: a part of it first would not wait for another thread's import
        from mlflow.entities import Metric, Param  # noqa: PLC0415 - slow, and only where tracking is on

        for run, pending in self._pending.items():
            run_id = self._run_ids.get(run)
            if run_id is None:
                run_id = self._run_ids[run] = self._create_child(client, run, info=None)
            while pending.params or pending.metrics:
                keys, batch = list(pending.params)[:_MAX_PARAMS], pending.metrics[:_MAX_METRICS]
                client.log_batch(
                    run_id,
                    metrics=[Metric(*metric) for metric in batch],
                    params=[Param(key, pending.params[key]) for key in keys],
                )
                del pending.metrics[: len(batch)]
                for key in keys:
                    del pending.params[key]

    # --- the runs themselves -------------------------------------------------------------------

    def _ready_client(self) -> MlflowClient:
        """The client, with all runs begun; what failed in an earlier call is tried again."""
        if self._client is None:
            self._client = self._connect()
        if self._config is None:
            raise RuntimeError("start was not called")
        if not self._experiment_id:
            self._experiment_id = find_experiment(self._client, self._config.tracking.experiment, self._uri)
        if "" not in self._run_ids:
            self._begin_federation(self._client, self._config)
        for info in self._infos:
            if info.site not in self._run_ids:
                self._run_ids[info.site] = self._create_child(self._client, info.site, info=info)
        return self._client

    def _begin_federation(self, client: MlflowClient, config: Config) -> None:
        if self._resumed_id is not None:
            self._run_ids = _reopened_runs(client, self._resumed_id)
        if not self._run_ids:
            tags = {
                "gcml.role": "federation",
                "gcml.method": config.method.name,
                "gcml.folder": str(self._folder.resolve()),
                "mlflow.source.name": "gcml",
            }
            run = client.create_run(self._experiment_id, tags=tags, run_name=config.name)
            self._run_ids[""] = run.info.run_id
            self._pending.setdefault("", _Pending()).params = flat_params(config.model_dump(mode="json", by_alias=True))
        if config.chaos:
            client.set_tag(self._run_ids[""], "gcml.chaos", config.chaos[:_MAX_TAG])
        file, run_id = self._folder / TRACKING_FILE, self._run_ids[""]
        write_run_id(file, uri=self._uri, experiment_id=self._experiment_id, run_id=run_id)

    def _create_child(self, client: MlflowClient, site: str, *, info: SiteInfo | None) -> str:
        tags = {"mlflow.parentRunId": self._run_ids[""], "gcml.role": "site", "gcml.site": site}
        run = client.create_run(self._experiment_id, tags=tags | {"mlflow.source.name": "gcml"}, run_name=site)
        if info is not None:
            facts = ("num_train", "num_validation", "num_test", "num_parameters", "push_bytes", "device", "node")
            params = flat_params({name: getattr(info, name) for name in facts})
            self._pending.setdefault(site, _Pending()).params = params
        return str(run.info.run_id)


def _reopened_runs(client: MlflowClient, run_id: str) -> dict[str, str]:
    """Ids of a federation's run and its sites' runs, by site; empty where the database knows it no more."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - slow, and only where tracking is on

    try:
        experiment = client.get_run(run_id).info.experiment_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("MLflow has no run %s any more: a new one begins", run_id)
        return {}
    children = children_of(client, experiment, run_id)
    run_ids = {"": run_id} | {child.data.tags["gcml.site"]: child.info.run_id for child in children}
    for known in run_ids.values():
        client.update_run(known, status="RUNNING")
    return run_ids
