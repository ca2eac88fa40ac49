"""``gcml compare``: runs every cell (method x seed) that is not finished, and tabulates what is.

Cells run one after the other in the main thread, or several at a time in a thread each; their sites are actors of
their own then. A cell that fails is a record: the others go on.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path

from actors.listener import Listener
from actors.run import PLOTTING, RUN_THREADS, case_sites_of, ray_session, run_federation, sites_of
from actors.site import TrainerFactory
from gcml_ray.comparison.cells import read_cell, write_cell
from gcml_ray.comparison.config import ComparisonConfig, cell_config
from gcml_ray.comparison.equality import who_missed_rounds
from gcml_ray.comparison.output import Tables, cell_file, make_cell, write_tables
from gcml_ray.config import Config
from gcml_ray.config.differences import differences
from gcml_ray.config.file import load_config
from gcml_ray.errors import ConfigError, DataError, GcmlError
from gcml_ray.files.folder_lock import check_writable
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import RunOutcome
from gcml_ray.tracking.comparison import ComparisonTracker

STOPPED = "stopped"


@dataclass(frozen=True)
class Task:
    """A cell to run."""

    method: str
    seed: int
    config: Config

    @property
    def title(self) -> str:
        """The cell in words."""
        return f"{self.method}, seed {self.seed}"

    @property
    def folder(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(Path(self.config.output.folder))


@dataclass(frozen=True)
class Views:
    """Who shows the cells: ``cell`` gives a listener and a stop event for a title, ``abort`` ends all cells now."""

    cell: Callable[[str], AbstractContextManager[tuple[Listener, threading.Event]]]
    abort: Callable[[], None]


@dataclass(frozen=True)
class Ending:
    """How a comparison ended. ``failures``: the reason of each cell that failed, by its title."""

    is_stopped: bool
    tables: Tables
    failures: dict[str, str] = field(default_factory=dict)


OpenViews = Callable[[int], AbstractContextManager[Views]]  # how many cells run at a time


def run_comparison(
    comparison: ComparisonConfig,
    overrides: Sequence[str],
    *,
    open_views: OpenViews,
    say: Callable[[str], None],
    at_once: int | None = None,
    tables_only: bool = False,
    make_trainer: TrainerFactory | None = None,
) -> Ending:
    """Runs what is missing; a cell that is finished is never run again.

    Args:
        comparison: what is compared.
        overrides: ``--set`` for every cell.
        open_views: gives who shows the cells.
        say: shows one line.
        at_once: how many cells run at a time; None as many as the cluster has room for.
        tables_only: runs nothing, tabulates what is finished.
        make_trainer: see :class:`actors.site.Site`.

    Raises:
        ConfigError: a finished cell was made with another configuration, or several at a time are asked for where the
            sites share this process.
        ClusterError: the cluster is out of reach.
    """
    tasks = [
        Task(method, seed, cell_config(comparison, method, seed, overrides))
        for seed in comparison.seeds
        for method in comparison.methods
    ]
    unit = tasks[0].config.data.distance_unit
    todo = [task for task in tasks if not _is_finished(comparison, task)]
    say(f"{comparison.name}: {len(tasks)} cells, {len(tasks) - len(todo)} finished")
    if not todo or tables_only:
        return Ending(False, _conclude(comparison, unit)[0])
    check_writable(Path(comparison.results), key="results")
    tracker = ComparisonTracker(comparison, todo[0].config)
    status: RunOutcome = "stopped"
    try:
        with ray_session(todo[0].config):
            number = _num_at_once(todo, at_once)
            if number > 1:
                say(f"{number} cells at a time")
            tracker.begin()
            with open_views(number) as views:
                attempt = _Attempt(comparison, views, make_trainer)
                endings = _run_cells(todo, attempt, number, tracker=tracker, say=say)
        failures = {title: ending for title, ending in endings.items() if ending not in ("", STOPPED)}
        is_stopped = STOPPED in endings.values() or len(endings) < len(todo)
        status = "stopped" if is_stopped else "failed" if failures else "finished"
    finally:
        try:
            tables, plots = _conclude(comparison, unit)
        except BaseException:
            tracker.finish((), (), "failed")
            raise
        tracker.finish(tables.rows, (*tables.files, *plots), status)
    return Ending(is_stopped, tables, failures)


def _run_cells(
    todo: Sequence[Task], attempt: _Attempt, number: int, *, tracker: ComparisonTracker, say: Callable[[str], None]
) -> dict[str, str]:
    """Runs cells, ``number`` at a time, and writes the tables after each; how each ended, by its title."""
    endings: dict[str, str] = {}
    run = _one_by_one(todo, attempt) if number == 1 else _side_by_side(todo, attempt, number)
    with closing(run) as ended:  # whatever happens here, no cell goes on without us
        for task, ending in ended:
            endings[task.title] = ending
            tracker.on_cell(task.folder)
            if not ending:
                write_tables(attempt.comparison, unit=task.config.data.distance_unit)
                say(f"{task.title} finished ({len(endings)} of {len(todo)} cells)")
            elif ending != STOPPED:
                say(f"{task.title} failed: {ending.splitlines()[0]}")
    return endings


def _conclude(comparison: ComparisonConfig, unit: str) -> tuple[Tables, tuple[Path, ...]]:
    """Tables and plots of all that is finished."""
    from gcml_ray.report.comparison import draw_plots  # noqa: PLC0415 - matplotlib, slow

    tables = write_tables(comparison, unit=unit)
    with PLOTTING:
        return tables, draw_plots(comparison, tables.rows)


def _is_finished(comparison: ComparisonConfig, task: Task) -> bool:
    path = cell_file(comparison, task.method, task.seed)
    if not path.exists():
        return False
    identity = read_cell(path).identity
    if identity != task.config.identity:
        raise ConfigError(
            f"{path} was made with another configuration ({identity}, not {task.config.identity}). If that was by "
            f"--set, give the same again; else delete it and {task.folder.path} to run the cell again, or give the "
            "comparison another output and results folder"
        )
    return True


# --- how many ----------------------------------------------------------------------------------


def _num_at_once(todo: Sequence[Task], wanted: int | None) -> int:
    """How many cells run at a time: what is asked for, or what fits; 1 where the sites share this process."""
    if any(task.config.resources.pool == "local" for task in todo):
        if wanted is not None and wanted > 1:
            raise ConfigError(
                f"--at-once {wanted} needs sites in processes of their own, but resources.pool is local: they would "
                "share this one. Leave --at-once out, or set resources.pool=ray"
            )
        return 1
    if wanted is not None:
        return min(wanted, len(todo))
    from actors.cluster import nodes, num_that_fit  # noqa: PLC0415 - a plain GPU machine has no ray

    available = nodes()
    room = min(num_that_fit(task.config.resources, sites_of(task.config), available) for task in todo)
    return max(1, min(room, len(todo)))


# --- running -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    """Runs one cell; empty where it finished, else the reason why not."""

    comparison: ComparisonConfig
    views: Views
    make_trainer: TrainerFactory | None
    was_stopped: threading.Event = field(default_factory=threading.Event)

    def __call__(self, task: Task, title: str) -> str:
        try:
            with self.views.cell(title) as (listener, stop):
                try:
                    return STOPPED if stop.is_set() else self._run(task, listener=listener, stop=stop)
                finally:
                    if stop.is_set():  # too late for this cell, maybe, but not for the next one
                        self.was_stopped.set()
        except GcmlError as error:
            return str(error)
        except Exception as error:  # a fault in one cell must not take the others along
            reason = f"{type(error).__name__}: {error}"
            try:
                task.folder.path.mkdir(parents=True, exist_ok=True)
                with task.folder.log_file.open("a", encoding="utf-8") as file:
                    file.write(traceback.format_exc())
            except OSError:  # such as a full disk, which may be the fault itself
                return reason
            return f"{reason} (traceback in {task.folder.log_file})"

    def _run(self, task: Task, *, listener: Listener, stop: threading.Event) -> str:
        """Begins the cell, or goes on with it; nothing to do where another process has finished it in the meantime."""
        if _is_finished(self.comparison, task):
            return ""
        resume = task.folder.state_file.exists()
        if resume and (saved := load_config(task.folder.config_file)).identity != task.config.identity:
            raise ConfigError(
                f"{task.folder.path} holds an unfinished cell of another configuration, it differs in "
                f"{differences(saved, task.config)}: delete it to run the cell anew"
            )
        if resume and task.folder.read_state().status == "finished":
            _check_rounds(task)  # before a test, which would not mend it
        summary = run_federation(
            task.config, listener=listener, stop=stop, resume=resume, make_trainer=self.make_trainer
        )
        if summary.status == "stopped":
            return STOPPED
        if summary.status != "finished":
            reasons = "; ".join(f"{site}: {reason}" for site, reason in summary.dropped.items())
            return f"every site was lost ({reasons})"
        cell = make_cell(task.method, task.seed, task.config, summary.evaluations, task.folder.rounds())
        if summary.untested:
            return f"not tested: {', '.join(summary.untested)}: the next run of this comparison tests again"
        if lost := sorted(set(_last_sites(task.config)) - {score.site for score in cell.scores}):
            reasons = "; ".join(f"{site}: {summary.dropped.get(site, 'not there')}" for site in lost)
            return f"its sites are not those of the other cells ({reasons}): delete {task.folder.path} to run it anew"
        _check_rounds(task)
        write_cell(cell_file(self.comparison, task.method, task.seed), cell)
        return ""


def _check_rounds(task: Task) -> None:
    """Whether every site has taken about as many steps as those of other cells, and got about as many means.

    Raises:
        DataError: a site, or the server, has failed in too many rounds.
    """
    if words := who_missed_rounds(task.folder.rounds(), mode=task.config.federation.mode):
        raise DataError(f"{words}, so it is no equal: delete {task.folder.path} to run it anew")


def _last_sites(config: Config) -> list[str]:
    """Who is there at the end of a run in which nobody is lost."""
    schedule = config.federation.schedule
    return [site for site in case_sites_of(config) if site not in schedule or schedule[site].leaves is None]


def _one_by_one(todo: Sequence[Task], attempt: _Attempt) -> Generator[tuple[Task, str]]:
    """Each cell in this thread, and how it ended; after a stop no other one begins."""
    for number, task in enumerate(todo, start=1):
        ending = attempt(task, f"{attempt.comparison.name} {number}/{len(todo)}: {task.title}")
        yield task, ending
        if attempt.was_stopped.is_set():
            return


def _side_by_side(todo: Sequence[Task], attempt: _Attempt, num_at_once: int) -> Generator[tuple[Task, str]]:
    """The cells in so many threads, and how each ended, as they end."""
    with ThreadPoolExecutor(num_at_once, thread_name_prefix=RUN_THREADS) as threads:
        futures = {threads.submit(attempt, task, task.title): task for task in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            attempt.views.abort()
            threads.shutdown(wait=True, cancel_futures=True)
            raise
