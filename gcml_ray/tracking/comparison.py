"""Tracking a comparison in MLflow: one run for the comparison, the runs of its cells below it.

Each cell tracks itself, as any federation does; when it has ended, its run is put below the comparison's. That one has
the table: ``METHOD/test/dice``, ``dice_sd``, ``hd95``, ``hd95_num_undefined``, ``surface_dice``, ``dice_against_best``,
``METHOD/traffic/megabytes`` and ``METHOD/time/seconds``, and the tables and plots as artifacts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcml_ray.comparison.cells import MethodRow
from gcml_ray.comparison.config import ComparisonConfig
from gcml_ray.comparison.table import label
from gcml_ray.config import Config
from gcml_ray.files.run_folder import TRACKING_FILE, RunFolder
from gcml_ray.records import RunOutcome
from gcml_ray.tracking.metrics import Metrics, flat_params, safe_key
from gcml_ray.tracking.parent import ParentRun
from gcml_ray.tracking.run import MLFLOW_STATUS

if TYPE_CHECKING:
    from mlflow import MlflowClient


class ComparisonTracker:
    """Writes a comparison's run; does nothing where tracking is off.

    Args:
        comparison: what is compared.
        cell: the configuration of one of its cells; says where to track.
    """

    def __init__(self, comparison: ComparisonConfig, cell: Config) -> None:
        self._parent = ParentRun(
            cell,
            Path(cell.output.folder),
            file=Path(comparison.output) / TRACKING_FILE,
            name=comparison.name,
            role="comparison",
            params=flat_params(comparison.model_dump(mode="json")),
        )

    def begin(self) -> None:
        """Begins the run before any cell has begun: two cells must not both make a new database."""
        self._parent.guard("begin", lambda _: None)

    def on_cell(self, folder: RunFolder) -> None:
        """Puts a cell's run below the comparison's; a cell that was never tracked has none."""
        self._parent.adopt(folder)

    def finish(self, rows: Sequence[MethodRow], artifacts: Sequence[Path], status: RunOutcome) -> None:
        """Logs the table, keeps files with the run and closes it."""

        def close(client: MlflowClient) -> None:
            for key, value in table_metrics(rows).items():
                client.log_metric(self._parent.run_id, key, value)
            for path in artifacts:
                client.log_artifact(self._parent.run_id, str(path))
            client.set_terminated(self._parent.run_id, status=MLFLOW_STATUS[status])

        self._parent.guard("finish", close)


def table_metrics(rows: Sequence[MethodRow]) -> Metrics:
    """The rows of a comparison's table as numbers by name; undefined ones are left out."""
    metrics: Metrics = {}
    for row in rows:
        values = {
            "test/dice": row.dice,
            "test/dice_sd": row.dice_sd,
            "test/dice_against_best": row.difference,
            "test/hd95": row.hd95,
            "test/hd95_num_undefined": row.num_undefined,
            "test/surface_dice": row.surface_dice,
            "traffic/megabytes": row.sent_bytes / 1e6,
            "time/seconds": row.seconds,
        }
        metrics |= {safe_key(f"{label(row)}/{key}"): value for key, value in values.items() if not math.isnan(value)}
    return metrics
