"""The MLflow run above other runs: that of a search over its trials, or of a comparison over its cells.

It is begun with the first thing that is sent. Its id stands in ``tracking.json``, so that whoever goes on later goes on
with it. As with a federation, tracking never stops the work.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.tracking.client import connect_to, find_experiment, reason, tracking_uri
from gcml_ray.tracking.run_ids import read_run_id, write_run_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


class ParentRun:
    """One parent run; does nothing where tracking is off.

    Args:
        config: says whether, where and into which experiment to track.
        run_folder: a run folder that this configuration tracks from; the default database lies beside it.
        file: ``tracking.json``, which names the run and is read to go on with it.
        name: of the run.
        role: ``search`` or ``comparison``; a tag, and the word for what goes on where tracking fails.
        params: of the run, by key.
        on_reopen: told the client where the run is gone on with.
    """

    def __init__(
        self,
        config: Config,
        run_folder: Path,
        *,
        file: Path,
        name: str,
        role: str,
        params: Mapping[str, str],
        on_reopen: Callable[[MlflowClient], None] | None = None,
    ) -> None:
        self.num_failures = 0
        self.experiment_id = ""
        self.run_id = ""
        self._config = config
        self._run_folder = run_folder
        self._file = file
        self._name = name
        self._role = role
        self._params = params
        self._on_reopen = on_reopen
        self._client: MlflowClient | None = None

    def guard(self, what: str, call: Callable[[MlflowClient], None]) -> None:
        """Calls with the client; whatever MLflow, its database or the network raises is logged and no more."""
        if not self._config.tracking.enabled:
            return
        try:
            call(self._ready_client())
        except Exception as error:
            self.num_failures += 1
            level = logging.WARNING if self.num_failures == 1 else logging.DEBUG
            log.log(level, "MLflow: %s failed (%s). The %s goes on", what, reason(error), self._role)

    def adopt(self, folder: RunFolder, tags: Mapping[str, str] | None = None) -> None:
        """Puts a federation's run below this one, named as its folder; one that was never tracked has none."""

        def put_below(client: MlflowClient) -> None:
            if folder.tracking_file.exists():
                run_id = json.loads(folder.tracking_file.read_text(encoding="utf-8"))["run_id"]
                for name, value in {"mlflow.parentRunId": self.run_id, **(tags or {})}.items():
                    client.set_tag(run_id, name, value)
                client.update_run(run_id, name=folder.path.name)

        self.guard("adopt", put_below)

    def _ready_client(self) -> MlflowClient:
        """The client, with the run begun; what failed in an earlier call is tried again."""
        uri = tracking_uri(self._config, self._run_folder)
        if self._client is None:
            self._client = connect_to(uri)
        if not self.run_id:
            self._begin(self._client, uri)
        return self._client

    def _begin(self, client: MlflowClient, uri: str) -> None:
        """Begins the run, or goes on with it."""
        from mlflow.entities import Param  # noqa: PLC0415 - slow, and only where tracking is on

        self.experiment_id = find_experiment(client, self._config.tracking.experiment, uri)
        known = read_run_id(self._file, uri=uri)
        if known is not None and self._reopen(client, known):
            return
        folder = str(self._file.parent.resolve())
        tags = {"gcml.role": self._role, "gcml.folder": folder, "mlflow.source.name": "gcml"}
        self.run_id = client.create_run(self.experiment_id, tags=tags, run_name=self._name).info.run_id
        write_run_id(self._file, uri=uri, experiment_id=self.experiment_id, run_id=self.run_id)
        client.log_batch(self.run_id, params=[Param(key, value) for key, value in self._params.items()])

    def _reopen(self, client: MlflowClient, run_id: str) -> bool:
        """Goes on with a run; False where the database knows it no more."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - slow, and only where tracking is on

        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("MLflow has no run %s any more: a new one begins", run_id)
            return False
        self.run_id = run_id
        if self._on_reopen is not None:
            self._on_reopen(client)
        return True
