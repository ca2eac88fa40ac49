"""Runs of a driver over the connected Ray cluster."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from actors.pool import RayPool
from gcml_ray.config import Config
from tests.fake_runs import RecordingListener, Run, drive
from tests.fakes import FakeTrainers, Fault


def ray_pool(config: Config, *faults: Fault, num_values: int = 8, **options: Any) -> RayPool:
    """A pool of fake trainers as actors."""
    trainers = FakeTrainers(faults, num_values=num_values)
    return RayPool(config, config.output.folder, run_id="run", make_trainer=trainers, **options)


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
    deadline = time.monotonic() + timeout_s
    while processes_naming(folder) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert processes_naming(folder) == []
