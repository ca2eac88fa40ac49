"""Where the processor time of a federation's rounds goes, process by process: sites, driver, Ray's own.

The federation of :mod:`benchmarks.floor`, with the processor time of every process on the machine taken between its
third round and its last that counts (Linux). Prints each process's share of the cores, what a step costs a site, and
what part of a round the exchange takes. Other work on the machine shows up as processes of its own.

    python -m benchmarks.processes --sites 4 --rounds 40 --steps 10
    python -m benchmarks.processes --sites 4 --rounds 40 --steps 10 --method local
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from actors.listener import NullListener
from actors.run import ray_session, run_federation
from benchmarks.floor import Size, cpu_seconds, make_config
from gcml_ray.records import RoundRecord, SiteInfo

FIRST = 3  # round; Ray starts interpreters in reserve until then
LEAST_SHARE = 0.002  # of the cores, to be shown
METHODS = {"local": {"name": "local"}, "gossip_avg": {"name": "gossip_avg", "topology": {"name": "push_k", "k": 1}}}


class Window(NullListener):
    """Takes the processor time of all processes after the first rounds and before the last one."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.sites: dict[int, str] = {}
        self.before: dict[int, float] = {}
        self.used: dict[int, float] = {}
        self.seconds = 0.0
        self.exchange: list[float] = []
        self.began = 0.0

    def on_site_ready(self, info: SiteInfo) -> None:
        """Notes a site's process."""
        self.sites[info.pid] = info.site

    def on_round_end(self, record: RoundRecord) -> None:
        """Opens and closes the window."""
        number = record.plan.round_number
        if number == FIRST:
            self.before, self.began = cpu_of_all(), time.monotonic()
        elif FIRST < number <= self.last:
            self.exchange.append(record.stage_seconds.get("push", 0.0) / record.seconds)
        if number == self.last:
            self.seconds = time.monotonic() - self.began
            self.used = {pid: used - self.before.get(pid, 0.0) for pid, used in cpu_of_all().items()}


def cpu_of_all() -> dict[int, float]:
    """Processor seconds of every process so far."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = cpu_seconds(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                continue
    return found


def name_of(pid: int) -> str:
    """The name that a process goes by."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return "ended"


def main() -> None:
    """Runs the federation and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sites", 4), ("rounds", 40), ("steps", 10), ("cores", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=METHODS, default="gossip_avg")
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")
    size = Size(options.sites, options.rounds + FIRST - 1, options.steps, options.cores)
    window = Window(last=options.rounds + FIRST)
    with tempfile.TemporaryDirectory() as scratch:
        config = make_config(Path(scratch), size, run="run", method=METHODS[options.method])
        with ray_session(config):
            run_federation(config, listener=window, stop=threading.Event(), test=False)
            names = {pid: name_of(pid) for pid in window.used}
    names |= {os.getpid(): "driver", **{pid: f"site {site}" for pid, site in window.sites.items()}}
    cores = window.seconds * options.cores
    print(f"{options.rounds} rounds in {window.seconds:.1f} s; share of {options.cores} cores:")
    for pid, used in sorted(window.used.items(), key=lambda one: -one[1]):
        if used / cores >= LEAST_SHARE:
            print(f"{used / cores:7.1%}  {names[pid]}")
    a_step = statistics.mean(window.used[pid] for pid in window.sites) / (options.rounds * options.steps)
    exchange = statistics.median(window.exchange)
    print(f"{1e3 * a_step:.1f} ms of processor time a step and site; exchange {exchange:.1%} of a round")


if __name__ == "__main__":
    main()
