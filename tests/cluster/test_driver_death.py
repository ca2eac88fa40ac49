"""The driver is killed, interrupted once, interrupted twice: the folder can be resumed and no actor is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gcml_ray.config import Config
from gcml_ray.config.file import save_config
from gcml_ray.files.run_folder import RunFolder
from tests.cluster.ray_runs import wait_for_none
from tests.fake_runs import run_locally
from tests.fakes import fake_config, final_weights

SCRIPT = """
import sys
from gcml_ray.cli import main as cli
import actors.federation as federation
from tests.fakes import FakeTrainers, Fault

if __name__ == "__main__":
    run = federation.run_federation
    slow = tuple(Fault(s, n, "train", "slow", seconds=0.5) for s in "AB" for n in range(1, 13))
    federation.run_federation = lambda *a, **k: run(*a, **k, make_trainer=FakeTrainers(slow))
    sys.exit(cli.main())
"""


def config_of(folder: Path, **federation: object) -> Config:
    rounds = {"rounds": 12, "local_steps": 2} | federation
    return fake_config(folder, sites=("A", "B"), federation=rounds, resources={"pool": "ray", "address": "local"})


@pytest.fixture
def own_tmpdir() -> str:
    """Short: the path of a socket lies in it."""
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"dd{os.getpid()}"  # noqa: S108
    path.mkdir(exist_ok=True)
    return str(path)


def start(folder: Path, tmpdir: str, *arguments: str) -> subprocess.Popen[str]:
    """``gcml run`` with fake trainers, in a process group of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "RAY_TMPDIR": tmpdir}
    return subprocess.Popen(  # noqa: S603 - our own script
        [sys.executable, str(script), "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def begin(folder: Path, tmpdir: str, **federation: object) -> tuple[subprocess.Popen[str], RunFolder]:
    """A run that has finished at least three rounds."""
    config = config_of(folder, **federation)
    save_config(config, folder / "config.yaml")
    process = start(folder, tmpdir, str(folder / "config.yaml"))
    run = RunFolder(Path(config.output.folder))
    deadline = time.monotonic() + 90
    while len(run.rounds() if run.rounds_file.exists() else ()) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no round within 90 s"
        time.sleep(0.1)
    return process, run


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_driver_killed_leaves_no_process_and_resumes_where_it_was(tmp_path: Path, own_tmpdir: str, mode: str) -> None:
    process, run = begin(tmp_path, own_tmpdir, mode=mode)
    before = len(run.rounds())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    wait_for_none(own_tmpdir)
    assert run.read_state().status == "running"
    assert run.read_state().last_complete_round >= before - 1, "at most the round in flight is lost"
    resumed = start(tmp_path, own_tmpdir, "--resume", str(run.path))
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert run.read_state().status == "finished"
    done = [(r.site, r.round_number) for record in run.rounds() for r in record.trained]
    assert sorted(done) == [(site, number) for site in "AB" for number in range(1, 13)]
    if mode == "sync":
        whole = run_locally(
            config_of(tmp_path / "whole").model_copy(update={"resources": fake_config(tmp_path / "x").resources})
        )
        for site, weights in final_weights(whole.folder).items():
            np.testing.assert_array_equal(final_weights(run)[site], weights)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_one_interrupt_finishes_the_round_and_stops(tmp_path: Path, own_tmpdir: str, mode: str) -> None:
    process, run = begin(tmp_path, own_tmpdir, mode=mode)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert run.read_state().status == "stopped"
    assert "--resume" in output
    assert 3 <= run.read_state().last_complete_round < 12
    wait_for_none(own_tmpdir)


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,), (signal.SIGHUP,)],
    ids=["twice", "terminate", "hang up"],
)
def test_two_interrupts_or_a_termination_stop_at_once(
    tmp_path: Path, own_tmpdir: str, signals: tuple[int, ...]
) -> None:
    process, run = begin(tmp_path, own_tmpdir)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=30)
    assert run.read_state().status == "stopped"
    assert process.returncode == 130
    assert "--resume" in output
    wait_for_none(own_tmpdir)
