"""Whether a long run grows: memory of driver and sites and the object store, round by round.

A tiny federation goes through many rounds with all that a round has (pushes, mutual steps, validation, checkpoints).
Resident memory of the driver and of every site's process (Linux), what the object store holds and the models in it are
sampled as rounds end; growth is the slope of a straight line through the second half of the run. With ``--pool local``
everything is in one process, and no Ray is started.

    python -m benchmarks.memory --rounds 500
    python -m benchmarks.memory --rounds 500 --pool local
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actors.listener import NullListener
from actors.run import ray_session, run_federation
from benchmarks.floor import Size, make_config
from gcml_ray.config import Config
from gcml_ray.records import RoundRecord, SiteInfo

PAGE_BYTES = resource.getpagesize()
LIMIT = 1.0  # MB a round
METHOD = {"name": "gcml", "topology": {"name": "matching"}}


@dataclass(frozen=True)
class Sample:
    """Megabytes after a round: the driver, the largest site, all sites, the object store; and models in the store."""

    round_number: int
    driver: float
    largest_site: float
    sites: float
    store: float
    num_models: float


@dataclass
class Scale(NullListener):
    """Weighs all processes of a run whenever a round ends, every few rounds."""

    every: int
    has_store: bool
    pids: dict[str, int] = field(default_factory=dict)
    push_bytes: int = 0
    samples: list[Sample] = field(default_factory=list)

    def on_site_ready(self, info: SiteInfo) -> None:
        """Notes a site's process; a restarted one has a new one."""
        self.pids[info.site] = info.pid
        self.push_bytes = info.push_bytes

    def on_round_end(self, record: RoundRecord) -> None:
        """Weighs."""
        number = record.plan.round_number
        if number % self.every == 0:
            sites = [resident_bytes(pid) for pid in sorted(set(self.pids.values()))]
            store = store_bytes() if self.has_store else 0
            self.samples.append(
                Sample(
                    number,
                    resident_bytes() / 1e6,
                    max(sites) / 1e6,
                    sum(sites) / 1e6,
                    store / 1e6,
                    store / self.push_bytes,
                )
            )


def resident_bytes(pid: int | None = None) -> int:
    """A process's own resident memory: without the object store's shared pages, which would count in each of them."""
    fields = Path(f"/proc/{pid or 'self'}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES


def store_bytes() -> int:
    """What the object store of this node holds now."""
    import ray  # noqa: PLC0415 - not for --pool local

    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no hints here
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return int(total.get("object_store_memory", 0) - free.get("object_store_memory", 0))


def growth(samples: Sequence[Sample], name: str) -> float:
    """Megabytes a round, by least squares over the second half of the samples."""
    half = samples[len(samples) // 2 :]
    rounds = [sample.round_number for sample in half]
    return float(np.polyfit(rounds, [getattr(sample, name) for sample in half], 1)[0])


def run(config: Config, *, every: int) -> Scale:
    """One run, weighed."""
    scale = Scale(every, has_store=config.resources.pool == "ray")
    run_federation(config, listener=scale, stop=threading.Event())
    return scale


def tiny_config(folder: Path, *, num_sites: int, rounds: int, pool: str) -> Config:
    """A federation whose rounds take a fraction of a second."""
    cores = os.cpu_count() or 1
    size = Size(num_sites, rounds, 1, cores)
    federation = {"rounds": rounds, "local_steps": 1, "warmup_rounds": 0, "cooldown_rounds": 0, "evaluate_every": 10}
    resources = {"pool": pool, "cpus_per_site": min(1.0, cores / num_sites), "address": "local"}
    output = {"folder": str(folder / "run"), "checkpoint_every": 1, "num_overlays": 0}
    return make_config(
        folder, size, run="run", method=METHOD, federation=federation, resources=resources, output=output
    )


def write(samples: Sequence[Sample], path: Path) -> None:
    """The samples as a table."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        names = list(Sample.__dataclass_fields__)
        rows.writerow(names)
        rows.writerows([f"{getattr(sample, name):.6g}" for name in names] for sample in samples)


def main() -> None:
    """Prints growth and peaks; exit status 1 where memory grows or the store holds too many models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--every", type=int, default=5, help="rounds from sample to sample")
    parser.add_argument("--pool", choices=("ray", "local"), default="ray")
    parser.add_argument("--csv", type=Path, help="where the samples go")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        config = tiny_config(Path(scratch), num_sites=options.sites, rounds=options.rounds, pool=options.pool)
        if options.pool == "ray":
            with ray_session(config):
                scale = run(config, every=options.every)
        else:
            scale = run(config, every=options.every)
    if options.csv:
        write(scale.samples, options.csv)
    bad = []
    print(f"{options.rounds} rounds, {options.sites} sites, pool {options.pool}, {time.perf_counter() - began:.0f} s")
    for name in ("driver", "largest_site", "sites", "store"):
        slope, values = growth(scale.samples, name), [getattr(sample, name) for sample in scale.samples]
        bad += [name] if slope >= LIMIT else []
        print(
            f"{name:>13}: {values[0]:8.1f} MB at first, {max(values):8.1f} at most, {slope:+.4f} MB a round at the end"
        )
    most = max(sample.num_models for sample in scale.samples)
    print(f"models in the object store: {most:.1f} at most, allowed {options.sites + 2}")
    if most > options.sites + 2:
        bad.append("models in the object store")
    if bad:
        raise SystemExit(f"too much: {', '.join(bad)}")


if __name__ == "__main__":
    main()
