"""Made-up runs for the tests of report pages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcml_ray.config import Config
from gcml_ray.config.file import save_config
from gcml_ray.files.run_folder import RunFolder, RunState
from tests.made_up_run import made_up_config, made_up_run

SITES = ("CS", "DU", "FG")


def make_run(path: Path, sites: tuple[str, ...] = SITES, *, rounds: int = 12, **changes: Any) -> RunFolder:
    """A finished run with its configuration; ``changes`` replace sections of it."""
    folder = made_up_run(path, sites, rounds=rounds)
    values = made_up_config(path, rounds=rounds).model_dump(mode="json", by_alias=True) | changes
    save_config(Config.model_validate_json(json.dumps(values)), folder.config_file)
    folder.write_state(RunState(rounds, "finished", sites))
    return folder


def without_pushes(folder: RunFolder) -> None:
    """Rewrites a run's rounds as if nobody had pushed."""
    rounds = folder.rounds()
    folder.truncate_after(0)
    for record in rounds:
        folder.append_round(replace(record, pushes=()))
