"""``tracking.json``: the MLflow run that a folder belongs to, so that whoever goes on later goes on with it."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

from gcml_ray.files.whole_files import replace_file

log = logging.getLogger(__name__)


def read_run_id(file: Path, *, uri: str) -> str | None:
    """The run that an earlier process wrote down.

    None where it was tracked elsewhere than to ``uri``, and where the folder is a copy of one that is still there.
    """
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s cannot be read (%s): a new MLflow run begins", file, error)
        return None
    is_record = isinstance(recorded, dict) and isinstance(recorded.get("run_id"), str)
    if not is_record or recorded.get("uri") != uri:
        return None
    original = Path(str(recorded.get("folder", file.parent))) / file.name
    with suppress(OSError):
        if not original.samefile(file) and original.read_bytes() == file.read_bytes():
            log.warning(
                "%s is a copy of %s, which keeps its MLflow run: a new one begins", file.parent, original.parent
            )
            return None
    return str(recorded["run_id"])


def write_run_id(file: Path, *, uri: str, experiment_id: str, run_id: str) -> None:
    """Writes it in one step."""
    names = {"uri": uri, "experiment_id": experiment_id, "run_id": run_id, "folder": str(file.parent.resolve())}
    replace_file(file, json.dumps(names, indent=2) + "\n")
