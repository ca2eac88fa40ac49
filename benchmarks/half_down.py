"""Half of the sites down for half of the run: four sites on a node each, two of which are lost for the middle half.

The nodes are raylets of one cluster on this machine, ended by SIGKILL after a quarter of the rounds and back after
three quarters; placement is by label, so a site without its node can only wait. Against the same federation
undisturbed. Prints a Markdown table; ``--write-docs`` puts it into ``docs/reliability.md``.

    python -m benchmarks.half_down --rounds 24 --steps 8 --mode sync --write-docs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import small_runs
from benchmarks.chaos_cluster import Cluster
from benchmarks.chaos_table import PAGE, write_into_page
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import mean

DOWN = ("east", "west")
LIMIT_S = 900.0


@dataclass(frozen=True)
class Result:
    """What came of a run: test Dice and trained rounds by site, and how long it took."""

    status: str
    dice: dict[str, float]
    rounds: dict[str, int]
    seconds: float


def main() -> None:
    """Both runs, side by side."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="half") as name:
        cluster = Cluster(labels=small_runs.SITES)
        try:
            datalist = small_runs.make_data(Path(name), seed=options.seed)
            whole = run(cluster, datalist, Path(name) / "whole", options, goes_down=False)
            half = run(cluster, datalist, Path(name) / "half", options, goes_down=True)
        finally:
            cluster.shutdown()
    text = table(whole, half)
    print(text)
    if options.write_docs:
        sizes = f"--rounds {options.rounds} --steps {options.steps} --mode {options.mode}"
        command = f"`python -m benchmarks.half_down {sizes}`, seed {options.seed}"
        write_into_page(PAGE, f"half down {options.mode}", f"{command}\n\n{text}")
    sys.exit(half.status != "finished" or len(half.dice) != len(small_runs.SITES))


def run(cluster: Cluster, datalist: Path, folder: Path, options: argparse.Namespace, *, goes_down: bool) -> Result:
    """One run; with ``goes_down`` two nodes are away for its middle half."""
    config = small_runs.make_config(
        datalist,
        folder,
        rounds=options.rounds,
        local_steps=options.steps,
        federation={"mode": options.mode, "seed": options.seed, "round_timeout_s": 60.0, "push_timeout_s": 15.0},
        resources={"placement": "label"},
    )
    began = time.monotonic()
    process = small_runs.start(config, environment=cluster.environment)
    try:
        if goes_down:
            _take_down(cluster, folder, process, options.rounds)
        small_runs.finish(process, limit_s=LIMIT_S)
    finally:
        small_runs.end(process)
    seconds = time.monotonic() - began
    if not (folder / "state.json").exists():
        sys.exit(f"the run failed: {small_runs.last_words(folder)}")
    reports = [report.site for record in RunFolder(folder).rounds() for report in record.trained]
    rounds = {site: reports.count(site) for site in small_runs.SITES}
    return Result(RunFolder(folder).read_state().status, small_runs.dice_by_site(folder), rounds, seconds)


def _take_down(cluster: Cluster, folder: Path, process: subprocess.Popen[str], rounds: int) -> None:
    """Two nodes are lost after a quarter of the records, and back after three quarters."""
    if not small_runs.wait_for_rounds(folder, process, rounds // 4, limit_s=LIMIT_S):
        return
    for site in DOWN:
        cluster.lose_node(site)
    print(f"{' and '.join(DOWN)} down after {small_runs.num_rounds(folder)} rounds", flush=True)
    small_runs.wait_for_rounds(folder, process, rounds * 3 // 4, limit_s=LIMIT_S)
    for site in DOWN:
        cluster.add_node(site)
    print(f"back after {small_runs.num_rounds(folder)} rounds", flush=True)


def table(whole: Result, half: Result) -> str:
    """Side by side."""
    lines = ["| site | rounds trained | Dice undisturbed | Dice with half of the sites down | difference |"]
    lines.append("|---|---|---|---|---|")
    for site in small_runs.SITES:
        before, after = whole.dice.get(site, float("nan")), half.dice.get(site, float("nan"))
        mark = " (down)" if site in DOWN else ""
        lines.append(f"| {site}{mark} | {half.rounds[site]} | {before:.3f} | {after:.3f} | {after - before:+.3f} |")
    before, after = mean(list(whole.dice.values())), mean(list(half.dice.values()))
    lines.append(f"| mean | | {before:.3f} | {after:.3f} | {after - before:+.3f} |")
    lines.append(f"\nIt ended as {half.status}, in {half.seconds:.0f} s instead of {whole.seconds:.0f} s.")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8, help="local steps of a round")
    parser.add_argument("--mode", choices=("sync", "async"), default="sync")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args()
    if options.write_docs and options.mode != "sync":
        parser.error("docs/reliability.md has a place for the table of --mode sync alone")
    return options


if __name__ == "__main__":
    main()
