"""Several cells of a comparison at a time: how they end, whose log is whose, what aborts them, how many fit."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from actors.cluster import Node, num_that_fit
from actors.compare import Task, Views, _Attempt, _side_by_side
from gcml_ray.comparison.config import ComparisonConfig, cell_config
from gcml_ray.comparison.output import Tables, finished_cells
from gcml_ray.config import ResourcesConfig
from gcml_ray.errors import ConfigError
from tests.comparison_runs import Watch, break_gossip, make_comparison, run
from tests.fakes import FakeTrainers
from tests.runs import RecordingListener


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds and have tests of their own."""
    monkeypatch.setattr("gcml_ray.report.run.write_plots", lambda _: ())
    monkeypatch.setattr("gcml_ray.report.comparison.draw_plots", lambda *_: ())


def test_several_at_a_time_need_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--at-once 2 needs .* resources\.pool is local"):
        run(make_comparison(tmp_path), at_once=2)


def tasks_of(comparison: ComparisonConfig) -> list[Task]:
    return [
        Task(method, seed, cell_config(comparison, method, seed, []))
        for seed in comparison.seeds
        for method in comparison.methods
    ]


def test_cells_side_by_side_end_as_they_do_one_by_one(tmp_path: Path) -> None:
    """Fake sites need no process of their own: this is about threads, logs and endings alone."""
    comparison = make_comparison(tmp_path, seeds=(0, 1))
    todo = tasks_of(comparison)
    attempt = _Attempt(comparison, Views(Watch().cell, lambda: None), break_gossip)
    endings = {task.title: ending for task, ending in _side_by_side(todo, attempt, 3)}
    assert len(endings) == 6
    assert {title.partition(",")[0] for title, ending in endings.items() if ending} == {"gossip_avg"}
    assert len(finished_cells(comparison)) == 4


def test_logs_of_cells_side_by_side_are_not_mixed(tmp_path: Path) -> None:
    """Both cells have begun before either goes on, so each log is open while the other cell speaks."""
    both = threading.Barrier(2, timeout=20)

    def speak(title: str, listener: RecordingListener) -> None:
        def on_end(record: Any) -> None:
            if record.plan.round_number == 1:
                both.wait()
                logging.getLogger("actors.driver").info("here is %s", title)
                both.wait()

        listener.on_end = on_end

    comparison = make_comparison(tmp_path)
    todo = [task for task in tasks_of(comparison) if task.method != "local"]
    attempt = _Attempt(comparison, Views(Watch(on_cell=speak).cell, lambda: None), FakeTrainers())
    assert [ending for _, ending in _side_by_side(todo, attempt, 2)] == ["", ""]
    for task in todo:
        lines = [line for line in task.folder.log_file.read_text().splitlines() if "here is" in line]
        assert len(lines) == 1
        assert lines[0].endswith(task.title)


def test_interrupt_aborts_the_cells_that_run(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path)
    watch = Watch()
    attempt = _Attempt(comparison, Views(watch.cell, watch.is_aborted.set), FakeTrainers())
    endings = _side_by_side(tasks_of(comparison), attempt, 2)
    next(endings)
    with pytest.raises(KeyboardInterrupt):
        endings.throw(KeyboardInterrupt)
    assert watch.is_aborted.is_set()


def test_error_beside_the_cells_aborts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the first cell's table is written; two cells run at a time."""
    monkeypatch.setattr("actors.compare._num_at_once", lambda *_: 2)
    full = OSError(errno.ENOSPC, "No space left on device")
    outcomes = iter([full])

    def write(*_: Any, **__: Any) -> Tables:
        if error := next(outcomes, None):
            raise error
        return Tables((), (), (), "mm")

    monkeypatch.setattr("actors.compare.write_tables", write)
    watch = Watch()
    with pytest.raises(OSError, match="No space left"):
        run(make_comparison(tmp_path), watch=watch)
    assert watch.is_aborted.is_set()


def resources(**changes: Any) -> ResourcesConfig:
    return ResourcesConfig.model_validate({"cpus_per_site": 2.0} | changes)


def node(cpus: float, gpus: float = 0, site: str = "") -> Node:
    return Node("n", cpus, gpus, {"site": site})


@pytest.mark.parametrize(
    ("asked", "available", "expected"),
    [
        (resources(), [node(16)], 2),  # 3 sites x 2 CPUs = 6 of 16
        (resources(), [node(5), node(5)], 1),  # room for 2 + 2 sites
        (resources(), [node(4)], 0),
        (resources(gpus_per_site=0.5), [node(64, gpus=2)], 1),  # room for 4 sites
        (resources(placement="label"), [node(9, site="A"), node(4, site="B"), node(6, site="C")], 2),  # 4, 2, 3
        (resources(placement="label"), [node(9, site="A"), node(4, site="B")], 0),
    ],
)
def test_cluster_holds_whole_federations(asked: ResourcesConfig, available: list[Node], expected: int) -> None:
    assert num_that_fit(asked, ["A", "B", "C"], available) == expected
