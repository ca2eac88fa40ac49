"""The end of a search: its winner and the own values of the federation, trained anew with new seeds and tested once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from actors.listener import Listener
from actors.run import ray_session, run_federation
from actors.site import TrainerFactory
from gcml_ray.config import Config
from gcml_ray.config.file import load_config
from gcml_ray.errors import CheckpointError, ClusterError, ConfigError
from gcml_ray.files.record_json import to_json
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.files.whole_files import replace_file
from gcml_ray.prediction.averages import site_means
from gcml_ray.records import PERSONALISED
from gcml_ray.search.folder import FINAL_FILE, read_final
from gcml_ray.search.records import FinalRecord, FinalScore
from gcml_ray.tracking.client import tracking_uri
from gcml_ray.tracking.search import FinalTracker
from gcml_ray.wording import in_shell
from tune.search import BEST_FILE
from tune.trial_config import Search, base_params, best_config

FINAL_FOLDER = "final"
Watch = Callable[[str], AbstractContextManager[tuple[Listener, threading.Event]]]


@dataclass(frozen=True)
class _Run:
    """One final run: the winner's or that of the federation's own values."""

    seed: int
    is_default: bool
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output.folder))


def run_final(search: Search, *, watch: Watch, make_trainer: TrainerFactory | None = None) -> FinalRecord | None:
    """Trains and tests winner and own values for every seed of ``final.seeds``; runs that are over are not run again.

    Args:
        search: a search that has a winner.
        watch: a listener and a stop event for one run, by its title.
        make_trainer: see :class:`actors.site.Site`.

    Returns:
        The scores, those on disk where the winner was tested before; None where it was stopped.

    Raises:
        CheckpointError: there is no winner, or another winner was tested already.
        ClusterError: every site of a run was lost, or one that other runs have tested.
    """
    winner = _winner(search)
    runs = _runs(search, winner)
    done = read_final(search.folder)
    if done is not None:
        if done.identity != _identity(winner):
            raise CheckpointError(_other_winner(search.folder / FINAL_FILE))
        if done.default_scores or not any(run.is_default for run in runs):
            return done
    for run in runs:  # before the first of them looks at a test case
        _check_same_winner(run)
    tracker = FinalTracker(search.base, search.folder, name=search.config.name)
    final = None
    try:
        with ray_session(winner):
            for run in runs:
                if not _train_and_test(run, watch=watch, make_trainer=make_trainer):
                    return None
                tracker.on_run(run.folder, is_default=run.is_default)
        found = [(run, _score(run)) for run in runs]
        _check_same_sites(found)
        scores = [tuple(score for run, score in found if run.is_default is default) for default in (False, True)]
        final = FinalRecord(search.config.name, _identity(winner), *scores)
        replace_file(search.folder / FINAL_FILE, to_json(final) + "\n")
    finally:
        tracker.finish(final)
    return final


def _winner(search: Search) -> Config:
    path = search.folder / BEST_FILE
    if not path.exists():
        raise CheckpointError(
            f"{search.folder} has no {BEST_FILE}: no trial has finished. "
            f"Go on with `gcml tune --resume {in_shell(search.folder)}`"
        )
    return load_config(path)


def _runs(search: Search, winner: Config) -> list[_Run]:
    """What is run, a seed after the other; the federation's own values only where others won."""
    runs = []
    default = _default(search)
    for seed in search.config.final.seeds:
        runs.append(_Run(seed, False, _final_config(search, winner, seed, what="seed")))
        if default is not None and _identity(default) != _identity(winner):
            runs.append(_Run(seed, True, _final_config(search, default, seed, what="default_seed")))
    return runs


def _default(search: Search) -> Config | None:
    """The federation with its own values; None where a search of an older version did not try them."""
    try:
        return best_config(search, base_params(search))
    except ConfigError:
        return None


def _final_config(search: Search, config: Config, seed: int, *, what: str) -> Config:
    """A configuration with another seed, in a folder of its own, tracked beside the search."""
    folder = search.folder / FINAL_FOLDER / f"{what}_{seed}"
    uri = tracking_uri(search.base, search.folder) if config.tracking.enabled else config.tracking.uri
    return config.model_copy(
        update={
            "name": f"{search.config.name}-final-{what.replace('_', '-')}{seed}",
            "federation": config.federation.model_copy(update={"seed": seed}),
            "output": config.output.model_copy(update={"folder": str(folder)}),
            "tracking": config.tracking.model_copy(update={"uri": uri}),
        }
    )


def _identity(config: Config) -> str:
    """What decides a configuration's results, its seed aside."""
    return config.model_copy(update={"federation": config.federation.model_copy(update={"seed": 0})}).identity


def _check_same_winner(run: _Run) -> None:
    folder = run.folder
    if folder.state_file.exists() and load_config(folder.config_file).identity != run.config.identity:
        raise CheckpointError(_other_winner(folder.path))


def _other_winner(path: Path) -> str:
    return (
        f"{path} is of another winner. Choosing between winners that were both tested would be tuning on test cases; "
        "if you must, start a search in another folder"
    )


def _train_and_test(run: _Run, *, watch: Watch, make_trainer: TrainerFactory | None) -> bool:
    """One run, unless it is over already; whether it is over now, and the next one may begin."""
    folder = run.folder
    has_begun = folder.state_file.exists()
    if has_begun and _is_tested(run):
        return True
    with watch(run.config.name) as (listener, stop):
        summary = run_federation(run.config, listener=listener, stop=stop, resume=has_begun, make_trainer=make_trainer)
    if summary.status == "failed":
        raise ClusterError(f"every site was lost; see {folder.log_file}, and run the final again")
    if summary.untested:
        raise ClusterError(f"not tested: {', '.join(summary.untested)}; see {folder.log_file}, and run the final again")
    return summary.status == "finished" and not stop.is_set()


def _is_tested(run: _Run) -> bool:
    """Whether all rounds are over, and every site that is left has scores."""
    state = run.folder.read_state()
    return state.status == "finished" and _score(run).site_dice.keys() >= set(state.alive)


def _check_same_sites(found: Sequence[tuple[_Run, FinalScore]]) -> None:
    """Refuses means over different sites: one may have been given up in a run."""
    sites = {site for _, score in found for site in score.site_dice}
    for run, score in found:
        if missing := sorted(sites - score.site_dice.keys()):
            raise ClusterError(
                f"{run.folder.path} has no test scores of {', '.join(missing)}, which other runs of the final have; "
                "its log.txt says why: delete the folder, and run the final again"
            )


def _score(run: _Run) -> FinalScore:
    """Test Dice of each site's personalised model, mean over cases and classes."""
    scores = [score for score in run.folder.cases() if (score.split, score.model) == ("test", PERSONALISED)]
    return FinalScore(run.seed, site_means(scores))
