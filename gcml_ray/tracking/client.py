"""Reaching MLflow: where a run is tracked, a client that gives up soon, and why a call failed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcml_ray.config import Config
from gcml_ray.errors import ConfigError
from gcml_ray.lean_imports import hidden
from gcml_ray.wording import in_shell, without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)


def tracking_uri(config: Config, folder: Path) -> str:
    """Where a run is tracked: the argument of ``mlflow ui --backend-store-uri``."""
    uri = config.tracking.uri
    if uri is None:
        return f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
    if ("://" not in uri and uri != "databricks") or uri.startswith("file:"):
        raise ConfigError(
            f"tracking.uri: {without_secrets(uri)!r} is a folder, which MLflow no longer writes to. "
            "Give sqlite:////path/mlflow.db or http://server:port, or leave it out"
        )
    return uri


def how_to_open(uri: str) -> str:
    """What shows the runs of a place: a server's address, or the command that serves a database; no password in it."""
    uri = without_secrets(uri)
    return uri if uri.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {in_shell(uri)}"


def reason(error: BaseException) -> str:
    """Why MLflow failed, in one line.

    Where a network, a disk or a database failed that is its own word, without the requests and statements around it;
    else MLflow's.
    """
    chain = [error]
    while (below := _below(chain[-1])) is not None and below not in chain:
        chain.append(below)
    faults = [each for each in chain if isinstance(each, OSError) or type(each).__name__ == "OperationalError"]
    told = faults[-1] if faults else error
    first_line = without_secrets(str(told)).strip().partition("\n")[0]
    return f"{type(told).__name__}: {first_line}" if first_line else type(told).__name__


def _below(error: BaseException) -> BaseException | None:
    """What an error was raised from, or while."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def import_lean_client() -> None:
    """Imports MLflow without tables, which a client that logs runs does not use: 70 MB and a quarter of the time less.

    For a process that is ours alone; see :mod:`gcml_ray.lean_imports`.
    """
    with hidden(("pandas", "pyarrow")):
        from mlflow import MlflowClient  # noqa: F401, PLC0415 - slow, and only where tracking is on


def connect_to(uri: str) -> MlflowClient:
    """A client that gives up within seconds, so that a server that is away cannot hold a round back."""
    for key, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),  # with user and password
        ("MLFLOW_DISABLE_TELEMETRY", "true"),  # a hospital's machine calls nobody
    ):
        os.environ.setdefault(key, value)
    for name in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # pages of SQL; what it raises is told
    from mlflow import MlflowClient  # noqa: PLC0415 - slow, and only where tracking is on

    return MlflowClient(tracking_uri=uri)


def without_passwords(paths: Sequence[Path]) -> list[Path]:
    """The files that may be sent: not a configuration with a password in an address, which the log tells."""
    sent = []
    for path in paths:
        text = path.read_text(encoding="utf-8") if path.suffix == ".yaml" else ""
        if without_secrets(text) == text:
            sent.append(path)
        else:
            log.info("%s holds a password in an address and is not sent to MLflow", path)
    return sent


def children_of(client: MlflowClient, experiment_id: str, run_id: str) -> list[Run]:
    """The runs below another one."""
    wanted = f"tags.`mlflow.parentRunId` = '{run_id}'"
    page = client.search_runs([experiment_id], wanted)
    found = list(page)
    while page.token:  # a page has a thousand
        page = client.search_runs([experiment_id], wanted, page_token=page.token)
        found += page
    return found


def find_experiment(client: MlflowClient, name: str, uri: str) -> str:
    """The id of an experiment, which is made where there is none."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # Without a place of its own, a database store would put artifacts below the working directory.
    place = None
    if uri.startswith("sqlite:///"):
        place = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except Exception:
        found = client.get_experiment_by_name(name)  # another federation made it in the meantime
        if found is None:
            raise
        return str(found.experiment_id)
