"""What Ray Tune keeps of a search in its folder, and whether the search can go on from it.

Ray Tune would take a state that it cannot read for none, and end with an error about something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle

from gcml_ray.errors import CheckpointError

TUNE_FOLDER = "ray_tune"
TRIALS = "experiment_state-*.json"
_FILES: dict[str, Callable[[bytes], Any]] = {  # newest last, by their names
    "tuner.pkl": cloudpickle.loads,
    TRIALS: json.loads,
    "search_gen_state-*.json": cloudpickle.loads,
    "searcher-state-*.pkl": cloudpickle.loads,
}


def has_trials(folder: Path) -> bool:
    """Whether Ray Tune has come so far in a search's folder that it knows of trials."""
    return any((folder / TUNE_FOLDER).glob(TRIALS))


def check_readable(folder: Path) -> None:
    """Whether the newest state in a search's folder is whole.

    Raises:
        CheckpointError: a file of it cannot be read.
    """
    for pattern, load in _FILES.items():
        for path in sorted((folder / TUNE_FOLDER).glob(pattern))[-1:]:
            try:
                load(path.read_bytes())
            except Exception as error:  # whatever a pickle that was cut may raise
                raise CheckpointError(
                    f"{path} cannot be read ({type(error).__name__}: {error}), and without this state of Ray Tune the "
                    "search cannot go on. Bring the file back, or begin in another folder; what this one's trials have "
                    "found stays in its records"
                ) from error
