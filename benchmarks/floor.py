"""How much of a federation's time is its training time.

The floor is the bare PyTorch loop of all sites' steps in one process, divided by the cores that the sites may use.
The same steps are then run

- as bare loops in as many processes at once as there are cores: what the machine gives, without any federation;
- as a federation, each site a Ray actor, gossip averaging: every site pushes every round, with a barrier or without,
  or with a barrier and several sites in one actor, so that there are as many processes as cores ("shared").

Efficiency = floor / wall time of the rounds, from record to record; the first round, in which libraries make themselves
ready, and the last one, which validates and writes checkpoints, do not count. "Of bare processes" divides those by
the same wall time. "Of processor time" compares the processor time of the bare processes with that of driver and sites
together: other load does not change it much, but it does not see waiting. "Share of the cores" is what the bare
processes were given of theirs: far below 1, others were at work, and only the processor time says anything. Ray's
workers run with the niceness of the benchmark itself, not with Ray's own 15, so that whatever else runs here hinders
all of them alike. All are run in turn. The bare loops judge no incoming models; ``--unjudged`` turns that off in the
federations as well, so that what is left is orchestration.

    python -m benchmarks.floor --sites 4 --rounds 10 --steps 10 --repeats 5
    python -m benchmarks.floor --rounds 4 --width 4 --repeats 5     # longer steps
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from actors.listener import NullListener
from actors.run import ray_session, run_federation
from gcml_ray.config import Config
from gcml_ray.config.file import parse_config
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom
from gcml_ray.records import RoundRecord, SiteInfo, TrainOrder
from gcml_ray.training.trainer import SiteTrainer

SHAPE = (36, 32, 20)
WAIT_S = 3600.0
SHARED = "shared"
MODES = ("sync", "async", SHARED)


@dataclass(frozen=True)
class Size:
    """What is run; a step of a network of more ``width`` takes longer."""

    sites: int
    rounds: int
    steps: int
    cores: int
    width: int = 1

    @property
    def names(self) -> list[str]:
        """The sites."""
        return [f"site{number}" for number in range(1, self.sites + 1)]


@dataclass(frozen=True)
class Span:
    """Seconds by the clock, processor seconds of all that were at work, and judging / training at the sites."""

    wall_s: float
    cpu_s: float
    judging: float = 0.0


@dataclass(frozen=True)
class Times:
    """The floor in seconds, bare loops in processes at once, and the federation by mode."""

    floor_s: float
    processes: Span
    num_processes: int
    federation: dict[str, Span]

    @property
    def share(self) -> float:
        """What the bare processes were given of their cores."""
        return self.processes.cpu_s / (self.processes.wall_s * self.num_processes)

    def efficiency(self, mode: str) -> float:
        """Floor / wall."""
        return self.floor_s / self.federation[mode].wall_s

    def of_processes(self, mode: str) -> float:
        """Bare processes / wall."""
        return self.processes.wall_s / self.federation[mode].wall_s

    def of_cpu(self, mode: str) -> float:
        """Processor time of bare processes / of driver and sites."""
        return self.processes.cpu_s / self.federation[mode].cpu_s


def make_config(folder: Path, size: Size, *, run: str, mode: str = "sync", **sections: Any) -> Config:
    """A federation that only trains and pushes, but in the last of two rounds more."""
    datalist = folder / "datalist.json"
    if not datalist.exists():
        cases = prepare_phantom(folder / "volumes", sites=size.names, cases_per_site=6, shape=SHAPE, seed=0)
        write_datalist(datalist, cases, description="benchmark")
    return parse_config(
        {
            "name": "floor",
            "data": {
                "datalist": str(datalist),
                "channels": ["t1", "flair"],
                "labels": {"background": 0, "lesion": 1},
                "spacing_is_real": True,
                "patch_size": list(SHAPE),
                "batch_size": 2,
            },
            "network": {
                "name": "unet",
                "options": {
                    "channels": [size.width * channels for channels in (8, 16, 32)],
                    "strides": [2, 2],
                    "num_res_units": 1,
                },
            },
            "optimiser": {"learning_rate": 1e-3},
            "method": {"name": "gossip_avg", "topology": {"name": "push_k", "k": 1}},
            "federation": {
                "mode": mode,
                "rounds": size.rounds + 2,
                "local_steps": size.steps,
                "warmup_rounds": 0,
                "cooldown_rounds": 0,
                "evaluate_every": size.rounds + 2,
            },
            "resources": {"cpus_per_site": min(1.0, size.cores / size.sites), "address": "local"},
            "tracking": {"enabled": False},
            "output": {"folder": str(folder / run), "checkpoint_every": size.rounds + 2, "num_overlays": 0},
        }
        | sections,
        source="benchmarks/floor.py",
    )


def config_of(mode: str, folder: Path, size: Size, *, run: str, judges: bool = True) -> Config:
    """The federation of one of :data:`MODES`."""
    defence = {"defence": {"weights": judges, "validation": judges}}
    if mode != SHARED:
        return make_config(folder, size, run=run, mode=mode, **defence)
    resources = {"cpus_per_site": 1.0, "sites_per_actor": math.ceil(size.sites / size.cores), "address": "local"}
    return make_config(folder, size, run=run, resources=resources, **defence)


def bare_loop(config: Config, sites: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """All steps of these sites in one thread, without pushes, once each has done a round.

    Returns:
        When it began and ended, and the processor seconds in between.
    """
    trainers = []
    for site in sites:
        trainers.append(SiteTrainer(config, site, folder / "bare", use_gpu=False, on_progress=lambda *_: None))
        trainers[-1].start(resume_round=0)
        trainers[-1].train_round(TrainOrder(1, "exchange", evaluate=False, checkpoint=False), [])
    if _barrier is not None:
        _barrier.wait(timeout=WAIT_S)
    began, worked = time.monotonic(), time.process_time()
    for trainer in trainers:
        for number in range(2, config.federation.rounds):
            trainer.train_round(TrainOrder(number, "exchange", evaluate=False, checkpoint=False), [])
    return began, time.monotonic(), time.process_time() - worked


_barrier: Barrier | None = None  # of the bare processes, in each of them


def _enter(barrier: Barrier) -> None:
    """Prepares a bare process."""
    global _barrier  # noqa: PLW0603 - a barrier reaches a process only when it starts
    _barrier = barrier
    torch.set_num_threads(1)


class BareProcesses:
    """As many processes as cores, each with the bare loop of its share of the sites; started once."""

    def __init__(self, size: Size) -> None:
        context = multiprocessing.get_context("spawn")
        self.shares = [share for core in range(size.cores) if (share := size.names[core :: size.cores])]
        self.barrier = context.Barrier(len(self.shares))
        self.pool = ProcessPoolExecutor(len(self.shares), context, initializer=_enter, initargs=(self.barrier,))

    def run(self, config: Config, folder: Path) -> Span:
        """From the common start to the last one's end."""
        futures = [self.pool.submit(bare_loop, config, share, folder) for share in self.shares]
        began, ended, worked = zip(*(future.result(timeout=WAIT_S) for future in futures), strict=True)
        return Span(max(ended) - min(began), sum(worked))


class Clock(NullListener):
    """Takes the time of a run's rounds but the first and the last, and the processor time of driver and sites."""

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self.pids: dict[str, int] = {}
        self.began: float | None = None
        self.worked = 0.0
        self.stages: Counter[str] = Counter()
        self.span = Span(0.0, 0.0)

    def on_site_ready(self, info: SiteInfo) -> None:
        """Notes a site's process."""
        self.pids[info.site] = info.pid

    def on_round_end(self, record: RoundRecord) -> None:
        """The first one starts the clock, the last one that counts stops it."""
        if self.began is None:
            self.began, self.worked = time.monotonic(), self._cpu_seconds()
        elif record.plan.round_number <= self.num_rounds + 1:
            for report in record.trained:
                self.stages.update({stage: report.seconds.get(stage, 0.0) for stage in ("judge", "train")})
            judging = self.stages["judge"] / self.stages["train"]
            self.span = Span(time.monotonic() - self.began, self._cpu_seconds() - self.worked, judging)

    def _cpu_seconds(self) -> float:
        return sum(cpu_seconds(pid) for pid in {*self.pids.values(), os.getpid()})


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def federation(config: Config) -> Span:
    """The same steps as a federation, in a Ray of its own, as ``gcml run`` starts one."""
    clock = Clock(config.federation.rounds - 2)
    with ray_session(config):
        run_federation(config, listener=clock, stop=threading.Event())
    return clock.span


def measure(size: Size, *, repeats: int, modes: Sequence[str] = ("sync",), judges: bool = True) -> list[Times]:
    """Everything in turn, as often as asked for."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bare = make_config(folder, size, run="bare")
        processes = BareProcesses(size)
        with processes.pool:
            for repeat in range(repeats):
                began, ended, _ = bare_loop(bare, size.names, folder)
                together = processes.run(bare, folder)
                configs = {mode: config_of(mode, folder, size, run=f"{mode}{repeat}", judges=judges) for mode in modes}
                spans = {mode: federation(config) for mode, config in configs.items()}
                floor_s = (ended - began) / len(processes.shares)
                found.append(Times(floor_s, together, len(processes.shares), spans))
                print(line_of(f"run {repeat + 1}", found[-1:]), flush=True)
    return found


def line_of(name: str, found: Sequence[Times]) -> str:
    """Medians in words."""

    def median(value: Callable[[Times], float]) -> float:
        return statistics.median(value(one) for one in found)

    parts = [
        f"{name}: floor {median(lambda one: one.floor_s):.2f} s, "
        f"bare processes {median(lambda one: one.processes.wall_s):.2f} s "
        f"(share of the cores {median(lambda one: one.share):.2f})"
    ]
    for mode in found[0].federation:
        parts.append(
            f"{mode} {median(lambda one: one.federation[mode].wall_s):.2f} s: "  # noqa: B023 - called at once
            f"efficiency {median(lambda one: one.efficiency(mode)):.3f}, "  # noqa: B023
            f"of bare processes {median(lambda one: one.of_processes(mode)):.3f}, "  # noqa: B023
            f"of processor time {median(lambda one: one.of_cpu(mode)):.3f}, "  # noqa: B023
            f"judging / training {median(lambda one: one.federation[mode].judging):.3f}"  # noqa: B023
        )
    return "\n  ".join(parts)


def main() -> None:
    """Runs all in turn and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sites", 4), ("rounds", 10), ("steps", 10), ("repeats", 5), ("cores", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--width", type=int, default=1, help="times the channels of the network, for longer steps")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--unjudged", action="store_true", help="no site judges what comes in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(options.sites, options.rounds, options.steps, options.cores, options.width)
    found = measure(size, repeats=options.repeats, modes=options.modes, judges=not options.unjudged)
    print(line_of(f"median of {options.repeats}, {size}", found))


if __name__ == "__main__":
    main()
