"""What of a search's folder others read: ``search.json`` and a record a trial. No Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gcml_ray.errors import CheckpointError
from gcml_ray.files.record_json import Record, from_json, to_json
from gcml_ray.files.whole_files import replace_file
from gcml_ray.search.records import FinalRecord, SearchRecord, TrialRecord

RECORD_FILE, FINAL_FILE, TRIALS_FOLDER = "search.json", "final.json", "records"


def write_search_record(search: SearchRecord, folder: Path) -> None:
    """Keeps all of a search but its trials, each of which has a file of its own."""
    replace_file(folder / RECORD_FILE, to_json(replace(search, trials=())) + "\n")


def read_search_record(folder: Path) -> SearchRecord:
    """A search with its trials so far, in the order of their making.

    Raises:
        CheckpointError: the folder holds no search, or a file of it cannot be read.
    """
    return replace(_read(SearchRecord, folder / RECORD_FILE), trials=read_trials(folder))


def read_trials(folder: Path) -> tuple[TrialRecord, ...]:
    """The trials so far, in the order of their making.

    Raises:
        CheckpointError: the record of one cannot be read.
    """
    trials = [_read(TrialRecord, path) for path in (folder / TRIALS_FOLDER).glob("*.json")]
    return tuple(sorted(trials, key=lambda trial: trial.number))


def read_final(folder: Path) -> FinalRecord | None:
    """The scores of a winner that was tested; None where none was.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = folder / FINAL_FILE
    return _read(FinalRecord, path) if path.exists() else None


def _read(kind: type[Record], path: Path) -> Record:
    try:
        return from_json(kind, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); bring it back") from error
