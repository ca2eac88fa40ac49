"""What many sites cost: the driver, the gossip graphs, and how fast knowledge spreads.

``sites``: federations of 2 to 256 sites that do not train: each sleeps as long as its steps would take, and pushes a
model of a few values, so that all work that is left is orchestration. Above ``--actors`` sites, several share a
process (``resources.sites_per_actor``). ``graphs``: seconds to draw the pushes of one round among 100,000 sites.
``spread``: rounds until what one of 100,000 sites has learnt has reached the others, where whoever was reached
passes it on with its own pushes, and the traffic that this means on paper.

    python -m benchmarks.scale sites --sites 2 4 8 16 32 64 --actors 64
    python -m benchmarks.scale sites --sites 128 256 --actors 16
    python -m benchmarks.scale graphs
    python -m benchmarks.scale spread
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.driver import Driver
from actors.listener import NullListener
from actors.local_pool import LocalPool
from actors.run import sites_of
from actors.site_pool import SitePool
from benchmarks.push import BufferTrainer
from gcml_ray.config import (
    BernoulliTopology,
    Config,
    ExponentialTopology,
    MatchingTopology,
    PushKTopology,
    RingTopology,
    Topology,
)
from gcml_ray.config.file import parse_config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.gossip.graph import sample_edges
from gcml_ray.push.wire import Buffer, PushHeader
from gcml_ray.records import RoundRecord, SiteInfo, TrainOrder, TrainReport
from gcml_ray.tracking.run import NullTracker

MANY = 100_000
NUM_VALUES = 1000
MODEL_BYTES = 124_000_000  # 31 million parameters
TOPOLOGIES: dict[str, Topology] = {
    "bernoulli (m = N / 2)": BernoulliTopology(name="bernoulli", expected_senders=MANY / 2),
    "matching": MatchingTopology(name="matching"),
    "push_k (k = 1)": PushKTopology(name="push_k", k=1),
    "push_k (k = 3)": PushKTopology(name="push_k", k=3),
    "exponential": ExponentialTopology(name="exponential"),
    "ring": RingTopology(name="ring"),
}


# --- sites that do not train ---------------------------------------------------------------------


class SleepingTrainer(BufferTrainer):
    """A site whose training takes its time and no processor: ``seconds`` a round."""

    def __init__(self, config: Config, site: str, folder: Path, *, seconds: float, **options: Any) -> None:
        super().__init__(config, site, folder, num_values=NUM_VALUES, **options)
        self.seconds = seconds

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """Sleeps."""
        time.sleep(self.seconds)
        peers = tuple(header.sender for header, _ in pushes)
        return TrainReport(self.site, order.round_number, peers, 1, {}, {}, "", {}, None, False, {}, 0.0, 0)


@dataclass(frozen=True)
class Row:
    """One federation. Driver: processor seconds, their share of the rounds' wall time, megabytes.

    Megabytes are resident ones, with what the process shares with others.
    """

    sites: int
    processes: int
    rounds_per_s: float
    round_s: float
    driver_cpu_ms_per_round: float
    driver_cpu_us_per_site: float
    driver_cpu_percent: float
    driver_mb_at_first: float
    driver_mb_at_end: float


class Watch(NullListener):
    """Weighs and times the driver, from the end of the first round to the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, float]] = []
        self.pids: set[int] = set()

    def on_site_ready(self, info: SiteInfo) -> None:
        """Notes the site's process."""
        self.pids.add(info.pid)

    def on_round_end(self, record: RoundRecord) -> None:
        """A mark: clock, processor time, megabytes."""
        del record
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.marks.append((time.monotonic(), time.process_time(), pages * os.sysconf("SC_PAGE_SIZE") / 1e6))


def make_config(folder: Path, *, num_sites: int, rounds: int, per_actor: int, pool: str) -> Config:
    """A federation of sleeping sites; the datalist names files that nobody reads."""
    folder.mkdir(parents=True)
    names = [f"site{number:05d}" for number in range(num_sites)]
    cases = [{"site": name, "image": f"{name}.nii", "label": f"{name}_label.nii"} for name in names]
    (folder / "datalist.json").write_text(json.dumps({"cases": cases}))
    num_actors = -(-num_sites // per_actor)
    return parse_config(
        {
            "name": "scale",
            "data": {
                "datalist": str(folder / "datalist.json"),
                "channels": ["c"],
                "labels": {"background": 0, "one": 1},
                "spacing_is_real": False,
                "patch_size": [8, 8, 8],
            },
            "network": {"name": "unet"},
            "optimiser": {"learning_rate": 1e-3},
            "method": {"name": "gossip_avg", "topology": {"name": "matching"}},
            "federation": {"rounds": rounds, "local_steps": 1, "warmup_rounds": 0, "cooldown_rounds": 0},
            "resources": {
                "pool": pool,
                "address": "local",
                "cpus_per_site": max(0.001, int(1000 * (os.cpu_count() or 1) / num_actors) / 1000),
                "sites_per_actor": per_actor,
            },
            "tracking": {"enabled": False},
            "output": {"folder": str(folder / "run"), "num_overlays": 0},
        },
        source="benchmarks/scale.py",
    )


def measure_sites(config: Config, make_pool: Callable[..., SitePool], *, seconds: float, processes: int) -> Row:
    """One federation, its first round left out; a site's training takes ``seconds``."""
    folder = RunFolder.create(Path(config.output.folder), config)
    watch, names = Watch(), sites_of(config)
    make_trainer = partial(SleepingTrainer, seconds=seconds)
    pool = make_pool(config, config.output.folder, run_id="scale", make_trainer=make_trainer)
    driver = Driver(config, pool, folder, tracker=NullTracker(), listener=watch, stop=threading.Event())
    try:
        driver.run(names, resume=None, test=False)
    finally:
        pool.shutdown()
    num_rounds = len(watch.marks) - 1
    wall, cpu = (watch.marks[-1][part] - watch.marks[0][part] for part in (0, 1))
    return Row(
        sites=len(names),
        processes=processes,
        rounds_per_s=num_rounds / wall,
        round_s=wall / num_rounds,
        driver_cpu_ms_per_round=1e3 * cpu / num_rounds,
        driver_cpu_us_per_site=1e6 * cpu / num_rounds / len(names),
        driver_cpu_percent=100 * cpu / wall,
        driver_mb_at_first=watch.marks[0][2],
        driver_mb_at_end=watch.marks[-1][2],
    )


def run_sites(options: argparse.Namespace) -> list[Row]:
    """A federation a size, each on a cluster of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for num_sites in options.sites:
            per_actor = -(-num_sites // options.actors)
            config = make_config(
                Path(scratch) / str(num_sites),
                num_sites=num_sites,
                rounds=options.rounds + 1,
                per_actor=per_actor,
                pool=options.pool,
            )
            processes = -(-num_sites // per_actor)
            processes = 1 if options.pool == "local" else processes
            rows.append(_run_on(config, seconds=options.seconds / per_actor, processes=processes))
            print(rows[-1], flush=True)
    return rows


def _run_on(config: Config, *, seconds: float, processes: int) -> Row:
    if config.resources.pool == "local":
        return measure_sites(config, LocalPool, seconds=seconds, processes=processes)
    from actors.cluster import connected  # noqa: PLC0415 - not for --pool local
    from actors.ray_pool import RayPool  # noqa: PLC0415 - as above

    with connected(config.resources):
        return measure_sites(config, RayPool, seconds=seconds, processes=processes)


# --- graphs and spread -------------------------------------------------------------------------


def draw(topology: Topology, num_train: dict[str, int], number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Senders and receivers of one round, as numbers."""
    rng = np.random.default_rng(number)
    k = topology.k if isinstance(topology, PushKTopology) else 1
    edges = sample_edges(topology, num_train, max_incoming=k, rng=rng, exchange_round=number)
    pairs = np.array([(int(edge.sender), int(edge.receiver)) for edge in edges], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def sites_by_name(num_sites: int) -> dict[str, int]:
    """Sites named by their numbers, one case each."""
    return {f"{number:06d}": 1 for number in range(num_sites)}


def graph_seconds(topology: Topology, num_sites: int, *, repeats: int) -> float:
    """Processor seconds to draw one round, the fastest of several."""
    num_train, seconds = sites_by_name(num_sites), []
    for number in range(repeats):
        began = time.process_time()
        draw(topology, num_train, number)
        seconds.append(time.process_time() - began)
    return min(seconds)


def spread(topology: Topology, num_sites: int, *, rounds: int) -> list[int]:
    """How many sites know what the first one knew at the start, after each round until all do."""
    num_train = sites_by_name(num_sites)
    knows = np.zeros(num_sites, dtype=bool)
    knows[0] = True
    counts = [1]
    while counts[-1] < num_sites and len(counts) <= rounds:
        senders, receivers = draw(topology, num_train, len(counts) - 1)
        knows[receivers[knows[senders]]] = True  # all push before anyone trains
        counts.append(int(knows.sum()))
    return counts


def rounds_until(counts: Sequence[int], share: float, num_sites: int) -> str:
    """The first round in which so many know it."""
    return next((str(number) for number, count in enumerate(counts) if count >= share * num_sites), "-")


def print_graphs(options: argparse.Namespace) -> None:
    """A Markdown table."""
    print(f"| topology | one round of {options.many:,} sites, s |\n|---|---:|")
    for name, topology in TOPOLOGIES.items():
        print(f"| {name} | {graph_seconds(topology, options.many, repeats=3):.2f} |", flush=True)


def print_spread(options: argparse.Namespace) -> None:
    """A Markdown table, with the traffic that this means on paper."""
    print("| topology | half know | 99 % | all | pushes a round | a site sends a round, MB | all sites, TB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, topology in TOPOLOGIES.items():
        counts = spread(topology, options.many, rounds=options.most)
        pushes = len(draw(topology, sites_by_name(options.many), 0)[0])
        traffic = pushes * options.model_bytes
        reached = [rounds_until(counts, share, options.many) for share in (0.5, 0.99, 1.0)]
        print(
            f"| {name} | {' | '.join(reached)} | {pushes:,} | {traffic / options.many / 1e6:.0f} "
            f"| {traffic / 1e12:.1f} |",
            flush=True,
        )


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("sites", "graphs", "spread"))
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--actors", type=int, default=64, help="processes at most")
    parser.add_argument("--rounds", type=int, default=30, help="rounds that count")
    parser.add_argument("--most", type=int, default=60, help="of spread: rounds at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="what a process trains in a round")
    parser.add_argument("--pool", choices=("ray", "local"), default="ray")
    parser.add_argument("--many", type=int, default=MANY)
    parser.add_argument("--model-bytes", type=int, default=MODEL_BYTES)
    parser.add_argument("--csv", type=Path, help="where the table of sites goes")
    options = parser.parse_args()
    if options.part == "graphs":
        print_graphs(options)
    elif options.part == "spread":
        print_spread(options)
    else:
        rows = run_sites(options)
        if options.csv:
            with options.csv.open("w", newline="") as file:
                table = csv.DictWriter(file, list(Row.__dataclass_fields__))
                table.writeheader()
                table.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
