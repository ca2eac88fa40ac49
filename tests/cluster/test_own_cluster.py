"""A run that starts Ray itself: in a process of its own, whose output and whose ends are looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ray

from tests.cluster.ray_runs import wait_for_none
from tests.fakes import fake_config

SCRIPT = """
import sys, threading, time
from pathlib import Path
from actors.run import run_federation
from actors.listener import NullListener
from gcml_ray.config.file import load_config
from gcml_ray.errors import GcmlError
from tests.fakes import FakeTrainers, Fault

if __name__ == "__main__":
    make_trainer = FakeTrainers((Fault("B", 1, "train", "die"),))
    began = time.monotonic()
    try:
        summary = run_federation(
            load_config(sys.argv[1]), listener=NullListener(), stop=threading.Event(), make_trainer=make_trainer
        )
    except GcmlError as error:
        print(time.monotonic() - began)
        sys.exit(f"{type(error).__name__}: {error}")
    print(summary.status)
"""


def run_script(folder: Path, *, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A federation of two fake sites over Ray in another process."""
    from gcml_ray.config.file import save_config  # noqa: PLC0415 - only this test needs YAML

    config = fake_config(
        folder, sites=("A", "B"), federation={"rounds": 2}, resources={"pool": "ray", "address": address}
    )
    save_config(config, folder / "config.yaml")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(script), str(folder / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())} | environment,
    )


def test_run_with_a_dying_site_starts_and_ends_its_cluster_without_noise(tmp_path: Path) -> None:
    """Not a word of Ray's on stdout or stderr, where a live table may stand; not a process left behind."""
    private = os.environ["RAY_TMPDIR"] + "/own"
    Path(private).mkdir()
    ended = run_script(tmp_path, address="local", RAY_TMPDIR=private)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "finished\n", "")
    assert "restart" in (tmp_path / "run" / "log.txt").read_text()
    wait_for_none(private)


def test_unreachable_ray_address_ends_in_seconds_with_what_to_do(tmp_path: Path) -> None:
    ended = run_script(tmp_path, address="auto", RAY_ADDRESS="127.0.0.1:1")
    assert ended.returncode == 1, ended.stderr
    assert float(ended.stdout) < 30, "of which Ray's import is no part"
    assert ended.stderr.startswith("ClusterError: cannot join the Ray cluster at 127.0.0.1:1")
    assert "Traceback" not in ended.stderr


FREEING = """
import time
import numpy as np, ray
from actors.cluster import connected
from gcml_ray.config import ResourcesConfig
from tests.cluster.test_ray_pool import plasma_objects

with connected(ResourcesConfig(address="local")):
    waits = []
    for _ in range(6):
        reference = ray.put(np.zeros(1_000_000, dtype=np.float32))
        assert plasma_objects() == 1
        began = time.monotonic()
        del reference
        while plasma_objects():
            time.sleep(0.01)
        waits.append(time.monotonic() - began)
print(min(waits[1:]))
"""


def test_a_cluster_of_its_own_frees_models_at_once() -> None:
    """Ray by itself frees once a second: in short rounds models pile up, new ones go to untouched memory.

    An object that is put after a freeing would wait for almost all of that second. The shortest of five waits counts:
    where the machine is busy, the question which objects there are takes its time.
    """
    ended = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-c", FREEING], capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 0.9


GUEST = """
from actors.cluster import connected
from gcml_ray.config import ResourcesConfig

with connected(ResourcesConfig(address="auto")) as where:
    print(where)
"""
HOST = f"""
import os, ray, subprocess, sys
from actors.cluster import connected
from gcml_ray.config import ResourcesConfig

with connected(ResourcesConfig(address="local")):
    print(ray.get_runtime_context().gcs_address)
    environment = {{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}}
    print(subprocess.run([sys.executable, "-c", {GUEST!r}], env=environment, text=True, capture_output=True).stdout)
"""


def test_nobody_joins_a_cluster_that_ends_with_another_run() -> None:
    ray.shutdown()  # the other tests' cluster could be joined as well
    ended = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-c", HOST], capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    host, guest = ended.stdout.split("\n", 1)
    assert "started for this run" in guest
    assert host not in guest
