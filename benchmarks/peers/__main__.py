"""Times gcml-ray beside Flower, NVFlare and p2pfl: same model, data and steps, one process tree after the other.

    python -m benchmarks.peers --make-env ~/peers-env      # once: an environment a framework, pinned
    python -m benchmarks.peers --env ~/peers-env --repeats 2

Prints a Markdown table a scenario with ratios to gcml-ray and writes every run to benchmarks/results/peers.csv. A
framework that fails or does not do the same work is named with its reason and never shown as a result.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import make_environments, python_of
from benchmarks.peers.measure import adopt_orphans, run
from benchmarks.peers.results import FLOOR, OURS, Result, final_weights, judge, read_trainings, table
from benchmarks.peers.results_file import read_csv, write_csv
from benchmarks.peers.scenario import CASES_PER_SITE, SCENARIOS, SHAPE, SITES, Case, Scenario
from gcml_ray.data.datalist import write_datalist
from gcml_ray.data.phantom import prepare_phantom

ROOT = Path(__file__).resolve().parents[2]
CSV = ROOT / "benchmarks" / "results" / "peers.csv"


@dataclass(frozen=True)
class Contender:
    """A framework's way to run. ``environment``: empty for this interpreter. ``is_fedavg``: it must equal the loop."""

    title: str
    module: str
    environment: str
    is_fedavg: bool


CONTENDERS = {
    FLOOR: Contender("bare loop, one process, no framework", "run_loop", "", True),
    OURS: Contender("gcml-ray, FedAvg", "run_gcml", "", True),
    "gcml-ray-shared": Contender("gcml-ray, FedAvg, one process per core", "run_gcml", "", True),
    "flower": Contender("Flower 1.41, FedAvg, simulation", "run_flower", "flower", True),
    "nvflare": Contender("NVFlare 2.9, FedAvg, simulator", "run_nvflare", "nvflare", True),
    "nvflare-swarm": Contender("NVFlare 2.9, swarm, simulator", "run_nvflare", "nvflare", True),
    "p2pfl": Contender("p2pfl 0.4.4, FedAvg by gossip, simulation", "run_p2pfl", "p2pfl", True),
    "plain-ray": Contender("plain loop over Ray actors, gossip averaging", "run_plain_ray", "", False),
    "gcml-ray-gossip": Contender("gcml-ray, gossip averaging: one peer per round", "run_gcml", "", False),
    "gcml-ray-gcml": Contender("gcml-ray, GCML: trains the peer's model too", "run_gcml", "", False),
}


def environment_of(scratch: Path) -> dict[str, str]:
    """What every contender's processes see: one thread each, nothing sent home, files in the scratch folder."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    homes = {"FLWR_HOME": str(scratch / "flwr"), "PYTHONPATH": str(ROOT)}
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}  # each starts its own
    return {**inherited, **quiet, **threads, **homes}


def run_one(
    name: str,
    scenario: Scenario,
    repeat: int,
    *,
    scratch: Path,
    options: argparse.Namespace,
    reference: Mapping[str, Sequence[float]],
) -> tuple[Result, dict[str, tuple[float, ...]]]:
    """One run of one contender, and its sites' final weights (empty where it failed)."""
    contender = CONTENDERS[name]
    folder = scratch / f"{scenario.name}-{name}-{repeat}"
    Case(name, scenario, str(scratch / "datalist.json"), options.cores).write(folder)
    python = str(python_of(options.env.resolve(), contender.environment)) if contender.environment else sys.executable
    command = [python, "-m", f"benchmarks.peers.{contender.module}", str(folder)]
    measured = run(command, environment=environment_of(scratch), folder=folder, limit_s=options.limit)
    trainings = read_trainings(folder / "events")
    result = judge(
        trainings,
        measured,
        contender=name,
        scenario=scenario,
        repeat=repeat,
        reference=reference if contender.is_fedavg and name != FLOOR else None,
    )
    return result, {} if result.problem else final_weights(trainings)


def results(scratch: Path, options: argparse.Namespace, done: Sequence[Result]) -> Iterator[Result]:
    """All runs but those done, contenders in another order in each repetition.

    The loop runs first whatever was done: the others are held against it.
    """
    known = {(one.scenario, one.contender, one.repeat) for one in done}
    names = [name for name in CONTENDERS if name in options.only and name != FLOOR]
    for scenario in options.scenarios:
        reference: Mapping[str, Sequence[float]] = {}
        for repeat in range(1, options.repeats + 1):
            random.Random(repeat).shuffle(names)
            for name in [FLOOR, *(name for name in names if (scenario.name, name, repeat) not in known)]:
                began = time.monotonic()
                result, weights = run_one(name, scenario, repeat, scratch=scratch, options=options, reference=reference)
                reference = reference or weights
                state = result.problem or f"{result.round_s:.2f} s per round"
                took = time.monotonic() - began
                print(f"{scenario.name} {name} {repeat}: {state} ({took:.0f} s)", file=sys.stderr, flush=True)
                yield result


def main() -> None:
    """Makes the environments, or measures and prints the tables."""
    options = _options()
    if options.make_env:
        make_environments(options.make_env)
        return
    adopt_orphans()
    done = [one for one in read_csv(options.csv) if one.contender != FLOOR] if options.resume else []
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        scratch = Path(options.keep or folder).resolve()  # runs have folders of their own
        scratch.mkdir(parents=True, exist_ok=True)
        cases = prepare_phantom(scratch / "volumes", sites=SITES, cases_per_site=CASES_PER_SITE, shape=SHAPE, seed=0)
        write_datalist(scratch / "datalist.json", cases, description="benchmark")
        for result in results(scratch, options, tuple(done)):
            done.append(result)
            write_csv(options.csv, done)
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    print("\n\n".join(table(done, scenario, titles) for scenario in options.scenarios))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-env", type=Path, help="make the frameworks' environments in this folder, and stop")
    parser.add_argument("--env", type=Path, default=Path("peers-env"), help="where they are")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="beside the bare loop")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="instead of the scenario's own (at least 2)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a run is given up")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted call has left in --csv")
    parser.add_argument("--keep", help="a new folder for the runs' files and logs, which stay there")
    options = parser.parse_args()
    chosen = [SCENARIOS[name] for name in options.scenario]
    if options.rounds is not None:
        if options.rounds < 2:
            parser.error(f"--rounds {options.rounds}: at least 2, a round's time is taken from one end to the next")
        chosen = [dataclasses.replace(scenario, rounds=options.rounds) for scenario in chosen]
    options.scenarios = chosen
    return options


if __name__ == "__main__":
    main()
