"""The end of a search: its winner is trained anew with several seeds, and only then tested, once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from actors.federation import ray_session, run_federation
from actors.listener import Listener
from actors.site import TrainerFactory
from gcml_ray.averages import mean
from gcml_ray.config import Config
from gcml_ray.config_file import load_config
from gcml_ray.errors import CheckpointError, ClusterError
from gcml_ray.record_json import from_json, to_json
from gcml_ray.records import PERSONALISED
from gcml_ray.run_folder import RunFolder, replace_file
from gcml_ray.search_records import FinalRecord, FinalScore
from gcml_ray.tracking import tracking_uri
from tune.search import BEST_FILE
from tune.trial_config import Search

FINAL_FILE, FINAL_FOLDER = "final.json", "final"
Watch = Callable[[str], AbstractContextManager[tuple[Listener, threading.Event]]]


def run_final(search: Search, *, watch: Watch, make_trainer: TrainerFactory | None = None) -> FinalRecord | None:
    """Trains and tests the winner for every seed of ``final.seeds``; runs that are over are not run again.

    Args:
        search: a search that has a winner.
        watch: a listener and a stop event for one run, by its title.
        make_trainer: see :class:`actors.site.Site`.

    Returns:
        The scores, those on disk where the winner was tested before; None where it was stopped.

    Raises:
        CheckpointError: there is no winner, or another winner was tested already.
        ClusterError: every site of a run was lost.
    """
    winner = _winner(search)
    done = read_final(search)
    if done is not None:
        if done.identity != _identity(winner):
            raise CheckpointError(_other_winner(search.folder / FINAL_FILE))
        return done
    configs = {seed: _final_config(search, winner, seed) for seed in search.config.final.seeds}
    for config in configs.values():  # before the first of them looks at a test case
        _check_same_winner(config)
    scores = []
    with ray_session(winner):
        for seed, config in configs.items():
            if not _run(config, watch=watch, make_trainer=make_trainer):
                return None
            scores.append(FinalScore(seed, _test_dice(RunFolder(Path(config.output.folder)))))
    final = FinalRecord(search.config.name, _identity(winner), tuple(scores))
    replace_file(search.folder / FINAL_FILE, to_json(final) + "\n")
    return final


def read_final(search: Search) -> FinalRecord | None:
    """The scores of a winner that was tested before."""
    file = search.folder / FINAL_FILE
    return from_json(FinalRecord, file.read_text(encoding="utf-8")) if file.exists() else None


def _winner(search: Search) -> Config:
    path = search.folder / BEST_FILE
    if not path.exists():
        raise CheckpointError(
            f"{search.folder} has no {BEST_FILE}: no trial has finished. "
            f"Go on with `gcml tune --resume {search.folder}`"
        )
    return load_config(path)


def _final_config(search: Search, winner: Config, seed: int) -> Config:
    """The winner with another seed, in a folder of its own, tracked beside the search."""
    folder = search.folder / FINAL_FOLDER / f"seed_{seed}"
    uri = tracking_uri(search.base, search.folder) if winner.tracking.enabled else winner.tracking.uri
    return winner.model_copy(
        update={
            "name": f"{search.config.name}-final-seed{seed}",
            "federation": winner.federation.model_copy(update={"seed": seed}),
            "output": winner.output.model_copy(update={"folder": str(folder)}),
            "tracking": winner.tracking.model_copy(update={"uri": uri}),
        }
    )


def _identity(winner: Config) -> str:
    """What decides the winner's results, its seed aside."""
    return winner.model_copy(update={"federation": winner.federation.model_copy(update={"seed": 0})}).identity


def _check_same_winner(config: Config) -> None:
    folder = RunFolder(Path(config.output.folder))
    if folder.state_file.exists() and load_config(folder.config_file).identity != config.identity:
        raise CheckpointError(_other_winner(folder.path))


def _other_winner(path: Path) -> str:
    return (
        f"{path} is of another winner. Choosing between winners that were both tested would be tuning on test cases; "
        "if you must, start a search in another folder"
    )


def _run(config: Config, *, watch: Watch, make_trainer: TrainerFactory | None) -> bool:
    """One seed's run, unless it is over already; whether it is over now."""
    folder = RunFolder(Path(config.output.folder))
    has_begun = folder.state_file.exists()
    if has_begun and folder.read_state().status == "finished" and folder.cases_file.exists():
        return True
    with watch(config.name) as (listener, stop):
        summary = run_federation(config, listener=listener, stop=stop, resume=has_begun, make_trainer=make_trainer)
    if summary.status == "failed":
        raise ClusterError(f"every site was lost; see {folder.log_file}, and run the final again")
    return summary.status == "finished"


def _test_dice(folder: RunFolder) -> dict[str, float]:
    """Test Dice of each site's personalised model, mean over cases and classes."""
    scores = [score for score in folder.cases() if (score.split, score.model) == ("test", PERSONALISED)]
    return {
        site: mean(score.dice for score in scores if score.site == site)
        for site in sorted({score.site for score in scores})
    }
