"""How long sites take to be ready, against what a bare process needs for the same.

A bare process is started, imports what a site's process imports and makes one site ready: data, network, optimiser. The
same as many sites are then started as a federation on a Ray cluster that runs already: from the word to start to the
last site's word that it is ready. So many processes on fewer cores cannot be ready before sites / cores times the
bare process's time, which is the floor. All are run in turn.

    python -m benchmarks.start --sites 4 --repeats 5
    python -m benchmarks.start --sites 4 --sites-per-actor 2 --repeats 5

What the imports cost one by one: :mod:`benchmarks.imports`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from actors.listener import NullListener
from actors.run import ray_session, run_federation
from benchmarks.floor import Size, make_config
from gcml_ray.config import Config, ResourcesConfig
from gcml_ray.config.file import save_config
from gcml_ray.records import SiteInfo

LIMIT_S = 600.0
BARE = """
import sys
from pathlib import Path
from actors.site import trainer_in_own_process
from gcml_ray.config.file import load_config
file = Path(sys.argv[1])
config, quiet = load_config(file), lambda *_: None
site = trainer_in_own_process(config, "site1", file.parent / "bare", use_gpu=False, on_progress=quiet)
site.start(resume_round=0)
"""


class Ready(NullListener):
    """Takes the time until all sites are ready, and ends the run then."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.began = 0.0
        self.seconds = 0.0
        self.missing: set[str] = set()

    def on_start(self, config: Config, sites: Sequence[str]) -> None:
        """The word to start."""
        del config
        self.missing = set(sites)
        self.began = time.perf_counter()

    def on_site_ready(self, info: SiteInfo) -> None:
        """One more."""
        self.missing.discard(info.site)
        if not self.missing:
            self.seconds = time.perf_counter() - self.began
            self.stop.set()


def bare_seconds(file: Path) -> float:
    """Of a bare process, from its start to its end."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", BARE, str(file)], check=True, timeout=LIMIT_S, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return time.perf_counter() - began


def federation_seconds(config: Config) -> float:
    """Of a federation, until its last site is ready."""
    ready = Ready()
    run_federation(config, listener=ready, stop=ready.stop, test=False)
    return ready.seconds


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--sites-per-actor", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    size = Size(options.sites, 1, 1, options.cores)
    num_processes = ResourcesConfig(sites_per_actor=options.sites_per_actor).num_actors(options.sites)
    bare, federation = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        resources = {
            "cpus_per_site": min(1.0, options.cores / num_processes),
            "sites_per_actor": options.sites_per_actor,
            "address": "local",
        }
        with ray_session(make_config(folder, size, run="session", resources=resources)):
            for repeat in range(options.repeats):
                config = make_config(folder, size, run=f"run{repeat}", resources=resources)
                save_config(config, file := folder / f"config{repeat}.yaml")
                bare.append(bare_seconds(file))
                federation.append(federation_seconds(config))
    alone, together = statistics.median(bare), statistics.median(federation)
    floor = alone * max(1.0, num_processes / options.cores)
    print(f"{options.sites} sites in {num_processes} processes, {options.cores} cores, medians of {options.repeats}:")
    print(f"one alone {alone:.2f} s, floor {floor:.2f} s, all ready after {together:.2f} s: {together / floor:.2f} x")


if __name__ == "__main__":
    main()
