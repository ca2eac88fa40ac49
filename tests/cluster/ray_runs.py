"""Runs of a driver over the connected Ray cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from actors.ray_pool import RayPool
from actors.site_pool import Outcome
from gcml_ray.config import Config
from tests.fakes import FakeTrainers, Fault
from tests.runs import RecordingListener, Run, drive
from tests.waiting import wait_until


def ray_pool(config: Config, *faults: Fault, num_values: int = 8, **options: Any) -> RayPool:
    """A pool of fake trainers as actors."""
    trainers = FakeTrainers(faults, num_values=num_values)
    return RayPool(config, config.output.folder, run_id="run", make_trainer=trainers, **options)


@contextmanager
def launched(config: Config, sites: Sequence[str], *faults: Fault, **options: Any) -> Iterator[RayPool]:
    """A pool in which these sites have actors for the length of a block, however it ends."""
    pool = ray_pool(config, *faults, **options)
    try:
        pool.launch(sites)
        yield pool
    finally:
        pool.shutdown()


def start_all(pool: RayPool, sites: Sequence[str]) -> None:
    """Starts sites of a pool, and waits until all are ready."""
    for site in sites:
        pool.start(site, resume_round=0)
    assert [outcome.failure for outcome in next_outcomes(pool, len(sites))] == [None] * len(sites)


def next_outcomes(pool: RayPool, count: int = 1) -> list[Outcome]:
    """The answers to as many open calls."""
    outcomes: list[Outcome] = []
    assert wait_until(lambda: len(outcomes) >= count or outcomes.extend(pool.wait(1.0)))
    return outcomes


def run_on_ray(
    config: Config,
    *faults: Fault,
    num_values: int = 8,
    resume: bool = False,
    listener: RecordingListener | None = None,
    **options: Any,
) -> Run:
    """A run of fake trainers as actors."""
    pool = ray_pool(config, *faults, num_values=num_values, **options)
    return drive(config, pool, resume=resume, listener=listener)


def processes_naming(folder: str) -> list[str]:
    """Command lines that name a folder: those of the Ray cluster whose files lie there, and of its workers."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)  # noqa: S607
    return [line for line in listing.stdout.splitlines() if folder in line]


def wait_for_none(folder: str, *, timeout_s: float = 60) -> None:
    """Fails where a process that names the folder is still there after a while."""
    assert wait_until(lambda: not processes_naming(folder), timeout_s=timeout_s), processes_naming(folder)
