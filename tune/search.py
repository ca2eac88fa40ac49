"""The search itself: Ray Tune over federations, resumable, and what came of it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from actors.cluster import Node, check_capacity, connected, nodes
from actors.run import sites_of
from actors.site import TrainerFactory
from gcml_ray.config.file import save_config
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.files.folder_lock import held, not_writable
from gcml_ray.files.log_file import logged_to
from gcml_ray.search.folder import read_trials, write_search_record
from gcml_ray.search.records import SearchRecord
from gcml_ray.signals import endings_handled_by
from gcml_ray.wording import in_shell
from tune.importance import importances
from tune.node_cache import removed_at_the_end
from tune.ray_state import TUNE_FOLDER, check_readable, has_trials
from tune.search_file import save_search
from tune.space import (
    AshaScheduler,
    ChoiceDomain,
    Domain,
    GridSearcher,
    IntegerDomain,
    LogUniformDomain,
    MedianScheduler,
    TpeSearcher,
    grid_values,
)
from tune.trainable import make_trainable
from tune.trial_config import Search, base_params, best_config
from tune.watch import Deadline, SearchView, TuneEvents, Watch

log = logging.getLogger(__name__)

# A trial that goes on after a resume reports the rounds since its checkpoint to Optuna again.
warnings.filterwarnings("ignore", message="The reported value is ignored", category=UserWarning)

BEST_FILE = "best.yaml"
LOG_FILE = "log.txt"
LOGGERS = ("ray.tune", "tune", "gcml_ray.console.search")  # what they say goes into it
_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints a banner even when told to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records hold all of it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # see _stopping
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_search(
    search: Search,
    *,
    views: Sequence[SearchView],
    stop: threading.Event,
    resume: bool = False,
    retry_failed: bool = False,
    make_trainer: TrainerFactory | None = None,
) -> SearchRecord:
    """Runs a search to its end or to where it is stopped; trials that fail are records and end nothing.

    Args:
        search: what to do; with ``resume`` the one saved in its folder.
        views: told of every trial.
        stop: set by Ctrl-C; the search can be resumed then.
        resume: finished trials stay, others go on from their checkpoints.
        retry_failed: on a resume, also start failed trials again.
        make_trainer: see :class:`actors.site.Site`.

    Raises:
        ConfigError: the folder already holds a search, or another process works in it, or the federation's own values
            are not in the space.
        CheckpointError: there is nothing to resume.
        ClusterError: the cluster is out of reach, or too small for a single trial.
    """
    sites = sites_of(search.base)
    os.environ.update(_SETTINGS)
    deadline = Deadline(search.config.budget.hours)
    watch = Watch(
        search.folder,
        rounds=search.base.federation.rounds,
        views=views,
        is_ending=lambda: stop.is_set() or deadline.is_over,
        keep_checkpoints=search.config.keep_checkpoints,
    )
    with (
        _own_folder(search, resume=resume),
        connected(search.base.resources) as where,
        logged_to(search.folder / LOG_FILE, LOGGERS, only_there=True),  # not between the lines of the table
    ):
        log.info("searching on %s", where)
        check_trial_fits(search, sites, nodes())
        trainable = ray_tune.with_resources(
            make_trainable(search, make_trainer=make_trainer), trial_resources(search, sites)
        )
        if resume:
            tuner = ray_tune.Tuner.restore(
                str(search.folder / TUNE_FOLDER), trainable=trainable, resume_errored=retry_failed
            )
        else:
            tuner = _new_tuner(search, trainable)
        with stopping(stop), removed_at_the_end(search), _watched_by(watch):
            tuner.fit()
        watch.settle()
    return conclude(search, watch)


def conclude(search: Search, watch: Watch) -> SearchRecord:
    """The result of a search, its best configuration written to ``best.yaml``."""
    record = replace(blank_record(search), trials=watch.trials)
    if record.best is not None:
        save_config(best_config(search, record.best.params), search.folder / BEST_FILE)
    record = replace(record, importances=importances(search, record))
    write_search_record(record, search.folder)
    return record


def blank_record(search: Search) -> SearchRecord:
    """The record of a search without its trials."""
    try:
        default = base_params(search)
    except ConfigError:  # of a search that began before its first trial had to be the federation's own
        default = {}
    return SearchRecord(search.config.name, search.config.objective, search.base.federation.rounds, (), default=default)


@contextmanager
def _own_folder(search: Search, *, resume: bool) -> Iterator[None]:
    """Makes the folder of a new search, or finds that of one to resume; no other process works in it meanwhile."""
    if not resume:
        base_params(search)  # an error before there is a folder
    elif not has_trials(search.folder):
        raise CheckpointError(
            f"{search.folder} has no state of Ray Tune to resume from: no trial had begun. Give the search's file "
            "again, as the first time"
        )
    else:
        check_readable(search.folder)
    with held(search.folder, key="folder"):
        if not resume:
            _begin(search)
        yield


def _begin(search: Search) -> None:
    if has_trials(search.folder):
        raise ConfigError(
            f"folder: {search.folder} already holds a search. Continue it with "
            f"`gcml tune --resume {in_shell(search.folder)}`, or give another folder"
        )
    if read_trials(search.folder):
        raise ConfigError(
            f"folder: {search.folder} holds records of trials, but no state of Ray Tune: give another folder"
        )
    try:
        if (search.folder / TUNE_FOLDER).exists():  # of one that failed before its first trial
            shutil.rmtree(search.folder / TUNE_FOLDER)
        save_search(search)
        write_search_record(blank_record(search), search.folder)
    except OSError as error:
        raise not_writable(search.folder, error, key="folder") from error


@contextmanager
def _watched_by(watch: Watch) -> Iterator[None]:
    TuneEvents.watch = watch
    try:
        yield
    finally:
        TuneEvents.watch = None


@contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C, a termination or a terminal that closes, once: Ray Tune saves its state and ends; twice: now.

    Who has asked for a signal to be ignored (``nohup``) is left alone. Ray Tune's own way to be ended is SIGUSR1; it
    does not say afterwards that it was.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        is_up = signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN)
        if stop.is_set() or not is_up:
            raise KeyboardInterrupt
        stop.set()
        os.kill(os.getpid(), signal.SIGUSR1)

    try:
        with endings_handled_by(interrupt):
            yield
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


# --- places ----------------------------------------------------------------------------------


def trial_resources(search: Search, sites: Sequence[str]) -> ray_tune.PlacementGroupFactory:
    """One bundle for the trial's driver and one a site, or an actor of several; Ray frees the group however it ends.

    With ``resources.pool: local`` the sites share the driver's process, and there is one bundle.
    """
    resources = search.base.resources
    site = {"CPU": resources.cpus_per_site} | ({"GPU": resources.gpus_per_site} if resources.gpus_per_site else {})
    if resources.pool == "local":
        return ray_tune.PlacementGroupFactory([site])
    driver = {"CPU": search.config.driver_cpus} if search.config.driver_cpus else {}
    options: dict[str, Any] = {}
    if resources.placement == "label":
        on_own_node = [{resources.label_key: name} for name in sites]
        options["bundle_label_selector"] = [{}, *on_own_node] if driver else on_own_node
    bundles = [dict(site) for _ in range(resources.num_actors(len(sites)))]
    return ray_tune.PlacementGroupFactory([driver, *bundles], strategy="PACK", **options)


def check_trial_fits(search: Search, sites: Sequence[str], available: Sequence[Node]) -> None:
    """Whether one trial fits on the empty cluster; one that does not would wait for ever.

    Raises:
        ClusterError: with what was asked, what there is, and the setting to change.
    """
    resources = search.base.resources
    if resources.pool == "local":
        check_capacity(resources, ["all sites of a trial"], available)
        return
    largest = max(available, key=lambda node: node.cpus)
    left = [
        replace(node, cpus=node.cpus - search.config.driver_cpus) if node is largest else node for node in available
    ]
    check_capacity(resources, sites, left)


# --- Ray Tune --------------------------------------------------------------------------------


def _new_tuner(search: Search, trainable: Any) -> ray_tune.Tuner:
    config = search.config
    is_grid = isinstance(config.searcher, GridSearcher)
    first = base_params(search)
    space = {key: _tune_domain(domain, is_grid=is_grid, first=first[key]) for key, domain in config.space.items()}
    hours = config.budget.hours
    return ray_tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric=None if _is_pareto(search) else config.objective,
            mode=None if _is_pareto(search) else "max",
            num_samples=1 if is_grid else config.budget.trials,
            max_concurrent_trials=config.budget.concurrent_trials if isinstance(config.searcher, TpeSearcher) else None,
            time_budget_s=None if hours is None else 3600 * hours,
            search_alg=_searcher(search, first),
            scheduler=_scheduler(search),
        ),
        run_config=ray_tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(search.folder),
            verbose=0,
            callbacks=[TuneEvents()],
            failure_config=ray_tune.FailureConfig(max_failures=0),
        ),
    )


def _tune_domain(domain: Domain, *, is_grid: bool, first: Any) -> Any:
    if is_grid:  # the federation's own value first, so that its own values together are the first trial
        return ray_tune.grid_search([first, *(value for value in grid_values(domain) if value != first)])
    if isinstance(domain, ChoiceDomain):
        return ray_tune.choice(list(domain.labels))
    if isinstance(domain, IntegerDomain):
        return ray_tune.randint(domain.low, domain.high + 1)
    make = ray_tune.loguniform if isinstance(domain, LogUniformDomain) else ray_tune.uniform
    return make(domain.low, domain.high)


def _is_pareto(search: Search) -> bool:
    """Whether there are two objectives."""
    return search.config.objective == "dice_and_megabytes"


def _searcher(search: Search, first: dict[str, Any]) -> Any:
    """The searcher, with what it tries first; Ray Tune wants those of its own to bound the trials at a time."""
    searcher, at_a_time = search.config.searcher, search.config.budget.concurrent_trials or 0
    if isinstance(searcher, TpeSearcher):
        import optuna  # noqa: PLC0415 - slow, and only where it is used

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=searcher.seed, n_startup_trials=searcher.start_trials)
        if _is_pareto(search):
            two: dict[str, Any] = {"metric": ["mean_dice", "megabytes"], "mode": ["max", "min"]}
            return OptunaSearch(sampler=sampler, points_to_evaluate=[first], **two)
        return OptunaSearch(sampler=sampler, points_to_evaluate=[first])
    if isinstance(searcher, GridSearcher):
        return BasicVariantGenerator(max_concurrent=at_a_time)
    return BasicVariantGenerator(max_concurrent=at_a_time, points_to_evaluate=[first], random_state=searcher.seed)


def _scheduler(search: Search) -> TrialScheduler | None:
    """The scheduler, over rounds."""
    scheduler = search.config.scheduler
    if isinstance(scheduler, AshaScheduler):
        # A trial ends by itself after its last round: one more keeps the scheduler from ending it first.
        last = search.base.federation.rounds + 1
        return ASHAScheduler(
            time_attr="round",
            max_t=last,
            grace_period=min(search.grace_rounds, last),
            reduction_factor=scheduler.reduction_factor,
        )
    if isinstance(scheduler, MedianScheduler):
        return MedianStoppingRule(
            time_attr="round",
            grace_period=search.grace_rounds,
            min_samples_required=scheduler.min_trials,
            min_time_slice=search.base.federation.rounds,  # never pause a trial: its sites would have to start again
        )
    return None
