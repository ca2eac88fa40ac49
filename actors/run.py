"""One federation from its configuration to its results: folder, pool, driver, tracker, plots."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

from actors.driver import Driver, RunSummary
from actors.listener import Listener
from actors.local_pool import LocalPool
from actors.site import TrainerFactory
from actors.site_pool import SitePool
from gcml_ray.chaos import check_sites
from gcml_ray.config import POOLED, SERVER, Config, PooledMethod, has_server
from gcml_ray.data.datalist import read_datalist, site_names
from gcml_ray.errors import CheckpointError, ConfigError, GcmlError
from gcml_ray.files.folder_lock import held
from gcml_ray.files.log_file import logged_to
from gcml_ray.files.run_folder import MODEL_FILE, RunFolder, RunState
from gcml_ray.files.site_names import site_name_problem
from gcml_ray.records import RunOutcome
from gcml_ray.tracking.background import BackgroundTracker
from gcml_ray.tracking.run import Tracker, build_tracker
from gcml_ray.wording import in_shell

log = logging.getLogger(__name__)

PLOTTING = threading.Lock()  # matplotlib is not made for threads
RUN_THREADS = "gcml-run"  # how the names of threads begin that each run a federation


def sites_of(config: Config) -> tuple[str, ...]:
    """Who trains in a federation: every site, or one that stands for all of them where their cases are pooled.

    Raises:
        ConfigError: see :func:`case_sites_of`.
    """
    sites = case_sites_of(config)
    return (POOLED,) if isinstance(config.method, PooledMethod) else sites


def case_sites_of(config: Config) -> tuple[str, ...]:
    """The sites whose cases take part: those the configuration names, or all in the datalist.

    Raises:
        ConfigError: a site is named that the datalist does not have, or that cannot be a folder's name or is reserved.
    """
    known = site_names(read_datalist(config.data.datalist))
    wanted = config.federation.sites or known
    missing = sorted((set(wanted) | set(config.site_networks)) - set(known))
    if missing:
        raise ConfigError(
            f"federation.sites / site_networks name {missing}, not in {config.data.datalist}; it has {list(known)}"
        )
    for site in sorted(wanted):
        if problem := site_name_problem(site):
            raise ConfigError(f"{config.data.datalist}: {problem}; rename the site")
    return tuple(sorted(wanted))


def run_federation(
    config: Config,
    *,
    listener: Listener,
    stop: threading.Event,
    resume: bool = False,
    make_trainer: TrainerFactory | None = None,
    test: bool = True,
    finish: bool = False,
) -> RunSummary:
    """Runs a federation to its end, or to where it is stopped.

    Args:
        config: the configuration; with ``resume`` the one saved in the run folder.
        listener: shows what happens.
        stop: set it to end after the round in flight; the folder can be resumed.
        resume: go on in ``config.output.folder``, which then must hold a run.
        make_trainer: see :class:`actors.site.Site`.
        test: whether test cases are scored at the end and plots are drawn; a trial of a search does neither.
        finish: with ``resume``: train no round that is left, and test the models as they are.

    Raises:
        GcmlError: the input, the cluster or a site's start is at fault; the message says what to change.
    """
    sites = sites_of(config)
    check_sites(config.chaos, sites, server=SERVER if has_server(config.method) else "")
    with _own_folder(config, resume=resume, is_trial=not test) as folder, _logged_to(folder.log_file):
        state = _state_to_resume(folder, config) if resume else None
        tracker = BackgroundTracker(build_tracker(config, folder.path))
        status: RunOutcome = "failed"
        try:
            with (
                ThreadPoolExecutor(1, thread_name_prefix=f"{threading.current_thread().name}-aside") as aside,
                pool_for(config, folder.path, listener=listener, stop=stop, make_trainer=make_trainer) as pool,
            ):
                if config.chaos:
                    log.warning("faults on purpose (chaos: %s): what this run gives is no result", config.chaos)
                    folder.note_faults(config.chaos)
                driver = Driver(config, pool, folder, tracker=tracker, listener=listener, stop=stop)
                summary = driver.run(sites, resume=state, test=test, finish=finish)
                if test:  # while the sites' processes end
                    kept = aside.submit(_keep_artifacts, folder, tracker, sites)
            status = summary.status
            if test:
                kept.result()
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            tracker.finish(status)
        return summary


@contextmanager
def _own_folder(config: Config, *, resume: bool, is_trial: bool) -> Iterator[RunFolder]:
    """The run's folder, new or as it was, which no other run can use meanwhile.

    A trial of a search takes no lock: one that was stopped at once may be on its way out when the search goes on.
    """
    if not config.output.folder:
        raise ConfigError("output.folder is empty: name the folder that the run is to be written to")
    path = Path(config.output.folder)
    known = RunFolder.open(path) if resume else None
    with nullcontext() if is_trial else held(path) as is_ours:
        folder = known or RunFolder.create(path, config)
        folder.is_ours = is_ours
        yield folder


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """One Ray connection for several federations; nothing where the sites run in this process."""
    if config.resources.pool == "local":
        yield
        return
    from actors.cluster import connected  # noqa: PLC0415 - a plain GPU machine has no ray

    with connected(config.resources):
        yield


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """What the packages log goes into the run folder too, without what runs in other threads say; so does an error."""
    own = threading.current_thread().name

    def is_own(record: logging.LogRecord) -> bool:
        name = str(record.threadName)
        return name == own or name.startswith(f"{own}-") or not name.startswith(RUN_THREADS)

    with logged_to(path, ("gcml_ray", "actors"), is_wanted=is_own):
        try:
            yield
        except (GcmlError, OSError) as error:
            log.error("%s", error)
            raise
        except Exception:
            log.exception("ended by an error that nobody expected")
            raise


def _state_to_resume(folder: RunFolder, config: Config) -> RunState | None:
    """How far the run in a folder is; None where it stopped before its first round.

    Raises:
        CheckpointError: it had rounds, and nothing says any more which checkpoints belong to them; or its state is of
            a round that it does not have.
    """
    if folder.state_file.exists():
        state, last = folder.read_state(), config.federation.rounds
        has_it = state.last_complete_round <= last or config.federation.mode == "async"  # there it counts records
        if state.last_complete_round < 0 or not has_it:
            raise CheckpointError(
                f"{folder.state_file} says that round {state.last_complete_round} is complete, federation.rounds is "
                f"{last}: bring the right file back, or start anew in another output.folder"
            )
        return state
    if rounds := folder.rounds():
        raise CheckpointError(
            f"{folder.state_file} is missing, but {folder.rounds_file.name} beside it holds {len(rounds)} rounds. "
            "Bring the file back to go on, or start anew in another output.folder"
        )
    return None


@contextmanager
def pool_for(
    config: Config, folder: Path, *, listener: Listener, stop: threading.Event, make_trainer: TrainerFactory | None
) -> Iterator[SitePool]:
    """The configured pool; whatever happens inside, its sites are gone at the end."""
    run_id = uuid.uuid4().hex[:12]
    if config.resources.pool == "local":
        listener.on_connected("this process")
        local = LocalPool(config, str(folder), run_id=run_id, make_trainer=make_trainer)
        try:
            yield local
        finally:
            local.shutdown()
        return
    from actors.cluster import connected  # noqa: PLC0415 - a plain GPU machine has no ray
    from actors.ray_pool import RayPool  # noqa: PLC0415

    with connected(config.resources) as where:
        log.info("running on %s", where)
        listener.on_connected(where)
        pool = RayPool(config, str(folder), run_id=run_id, stop=stop, make_trainer=make_trainer)
        try:
            yield pool
        finally:
            pool.shutdown()


def _keep_artifacts(folder: RunFolder, tracker: Tracker, sites: Sequence[str]) -> None:
    """Plots, the files of the run and the models, for the tracker."""
    files = (folder.config_file, folder.cases_file, folder.transfers_file, *_plots(folder))
    tracker.log_artifacts([path for path in files if path.exists()])
    for site in sites:  # on a cluster a site's checkpoints may lie on its own disk: then they stay there
        model = folder.checkpoints(site) / MODEL_FILE
        if model.exists():
            tracker.log_model(site, model)


def _plots(folder: RunFolder) -> tuple[Path, ...]:
    """Draws the plots. They come from the run's files alone, so a disk that does not take them ends no run."""
    from gcml_ray.report.run import write_plots  # noqa: PLC0415 - matplotlib only when there is something to plot

    try:
        with PLOTTING:
            return write_plots(folder) if folder.rounds() else ()
    except OSError as error:
        log.warning(
            "the plots in %s cannot be written (%s); the results are whole: make room, and `gcml run --resume %s` "
            "draws them again; `gcml report %s` shows the same records",
            folder.plots,
            error.strerror or error,
            in_shell(folder.path),
            in_shell(folder.path),
        )
        return ()
