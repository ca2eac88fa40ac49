"""The driver is killed, interrupted once, interrupted twice: the folder can be resumed and no actor is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gcml_ray.config import Config
from gcml_ray.config.file import save_config
from gcml_ray.files.run_folder import RunFolder
from tests.cluster.ray_runs import wait_for_none
from tests.fakes import calls_of, fake_config, final_weights, release, run_folder
from tests.runs import run_locally
from tests.waiting import wait_until

SITES = ("A", "B")
ROUNDS, HELD = 6, 4
SCRIPT = f"""
import signal
import sys
from gcml_ray.cli import main as cli
import actors.run
from tests.fakes import FakeTrainers, Fault

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    run = actors.run.run_federation
    held = tuple(Fault(site, {HELD}, "train", "held") for site in {SITES})
    actors.run.run_federation = lambda *a, **k: run(*a, **k, make_trainer=FakeTrainers(held))
    sys.exit(cli.main())
"""


def config_of(folder: Path, **federation: object) -> Config:
    rounds = {"rounds": ROUNDS, "local_steps": 2} | federation
    return fake_config(folder, sites=SITES, federation=rounds, resources={"pool": "ray", "address": "local"})


class Driver:
    """``gcml run`` with fake trainers that are held in a round, in a process group of its own."""

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, tmpdir: str) -> None:
        self.tmpdir = tmpdir
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT)
        self.config_file = folder / "config.yaml"
        self.output = folder / "output.txt"
        self.run = run_folder(config_of(folder))

    def start(self, *arguments: str) -> None:
        """Runs the command; what it says goes to a file."""
        environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "RAY_TMPDIR": self.tmpdir}
        command = [sys.executable, str(self.script), "run", *arguments]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(  # noqa: S603 - our own script
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def begin(self, **federation: object) -> None:
        """A run whose sites are held in a round, all those before it are done."""
        save_config(config_of(self.config_file.parent, **federation), self.config_file)
        self.start(str(self.config_file))

        def is_held() -> bool:
            assert self.process.poll() is None, self.said()
            return all(is_in_round(self.run, site) for site in SITES)

        assert wait_until(is_held, timeout_s=240), self.said()

    def release(self) -> None:
        """Lets the sites go on, now or when they come to that round."""
        for site in SITES:
            release(self.run, site, HELD)

    def said(self) -> str:
        """All output so far."""
        return self.output.read_text()

    def end(self) -> int:
        """Waits for the end; the exit code."""
        return self.process.wait(timeout=120)

    def trained(self) -> list[tuple[str, int]]:
        """Sites and rounds in the records."""
        return sorted((report.site, report.round_number) for record in self.run.rounds() for report in record.trained)


def is_in_round(run: RunFolder, site: str) -> bool:
    """Whether a site is held, or was."""
    return (run.checkpoints(site) / "calls.txt").exists() and HELD in calls_of(run, site, "train")


def all_until(number: int) -> list[tuple[str, int]]:
    """All sites in all rounds up to one."""
    return [(site, each) for site in SITES for each in range(1, number + 1)]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    """One whose cluster has its files in a short path, as that of a socket lies there; ended with the test."""
    tmpdir = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"dd{os.getpid()}"  # noqa: S108
    tmpdir.mkdir(exist_ok=True)
    made = Driver(tmp_path, str(tmpdir))
    yield made
    if made.process.poll() is None:
        os.killpg(made.process.pid, signal.SIGKILL)
    wait_for_none(made.tmpdir)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_driver_killed_leaves_no_process_and_resumes_where_it_was(tmp_path: Path, driver: Driver, mode: str) -> None:
    driver.begin(mode=mode)
    before = len(driver.run.rounds())
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.end()
    wait_for_none(driver.tmpdir)
    assert driver.run.read_state().status == "running"
    assert driver.run.read_state().last_complete_round == before >= HELD - 1, "only the round in flight is lost"
    driver.release()
    driver.start("--resume", str(driver.run.path))
    assert driver.end() == 0, driver.said()
    assert driver.run.read_state().status == "finished"
    assert driver.trained() == all_until(ROUNDS)
    if mode == "sync":
        config = config_of(tmp_path / "whole")
        whole = run_locally(config.model_copy(update={"resources": fake_config(tmp_path / "x").resources}))
        for site, weights in final_weights(whole.folder).items():
            np.testing.assert_array_equal(final_weights(driver.run)[site], weights)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_one_interrupt_finishes_the_round_and_stops(driver: Driver, mode: str) -> None:
    driver.begin(mode=mode)
    driver.process.send_signal(signal.SIGINT)
    assert wait_until(lambda: "Ctrl-C again" in driver.said())
    driver.release()
    driver.end()
    assert driver.run.read_state().status == "stopped"
    assert "--resume" in driver.said()
    assert driver.trained() == all_until(HELD)


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,), (signal.SIGHUP,)],
    ids=["twice", "terminate", "hang up"],
)
def test_two_interrupts_or_a_termination_stop_at_once(driver: Driver, signals: tuple[int, ...]) -> None:
    """The round in progress would never end."""
    driver.begin()
    for index, number in enumerate(signals):
        assert wait_until(lambda seen=index: not seen or "Ctrl-C again" in driver.said())  # one at a time
        driver.process.send_signal(number)
    assert driver.end() == 130
    assert driver.run.read_state().status == "stopped"
    assert "--resume" in driver.said()
    assert driver.trained() == all_until(HELD - 1)
