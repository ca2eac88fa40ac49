"""Rounds without a barrier against rounds with one: test Dice at equal speeds, over several seeds, over Ray.

A seed draws the data, the initial weights and the batches; both modes have the same. Prints a Markdown table with the
paired differences; ``--write-docs`` puts it into ``docs/reliability.md``.

    python -m benchmarks.async_dice --seeds 3 --rounds 24 --steps 8 --write-docs
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from benchmarks import small_runs
from benchmarks.chaos_cluster import Cluster
from benchmarks.chaos_table import PAGE, write_into_page
from gcml_ray.prediction.averages import mean

MODES = ("sync", "async")
LIMIT_S = 900.0


def main() -> None:
    """All runs, one after the other."""
    options = _options()
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="pace") as name:
        cluster = Cluster()
        try:
            for seed in range(options.seeds):
                folder = Path(name) / f"seed{seed}"
                datalist = small_runs.make_data(folder, seed=seed)
                with_barrier, without = (
                    run(cluster, datalist, folder, options, mode=mode, seed=seed) for mode in MODES
                )
                found.append((with_barrier, without))
                print(f"seed {seed}: sync {with_barrier:.4f}, async {without:.4f}", flush=True)
        finally:
            cluster.shutdown()
    text = table(found)
    print(text)
    if options.write_docs:
        sizes = f"--seeds {options.seeds} --rounds {options.rounds} --steps {options.steps}"
        write_into_page(PAGE, "async dice", f"`python -m benchmarks.async_dice {sizes}`\n\n{text}")


def run(cluster: Cluster, datalist: Path, folder: Path, options: argparse.Namespace, *, mode: str, seed: int) -> float:
    """Mean test Dice over the sites of one run."""
    config = small_runs.make_config(
        datalist,
        folder / mode,
        rounds=options.rounds,
        local_steps=options.steps,
        federation={"mode": mode, "seed": seed},
    )
    process = small_runs.start(config, environment=cluster.environment)
    try:
        small_runs.finish(process, limit_s=LIMIT_S)
    finally:
        small_runs.end(process)
    dice = small_runs.dice_by_site(folder / mode)
    if set(dice) != set(small_runs.SITES):
        sys.exit(f"{mode}, seed {seed}: not every site was tested: {small_runs.last_words(folder / mode)}")
    return mean(list(dice.values()))


def table(found: Sequence[tuple[float, float]]) -> str:
    """One row a seed, then mean and standard deviation, and whether the difference is within noise."""
    lines = ["| seed | Dice sync | Dice async | difference |", "|---|---|---|---|"]
    lines += [f"| {seed} | {a:.4f} | {b:.4f} | {b - a:+.4f} |" for seed, (a, b) in enumerate(found)]
    changes = [b - a for a, b in found]
    columns = ([a for a, _ in found], [b for _, b in found], changes)
    spreads = [statistics.stdev(column) if len(column) > 1 else math.nan for column in columns]
    cells = [f"{mean(column):.4f} ± {spread:.4f}" for column, spread in zip(columns, spreads, strict=True)]
    lines += [f"| mean ± SD | {' | '.join(cells)} |", "", verdict(changes)]
    return "\n".join(lines)


def verdict(changes: Sequence[float]) -> str:
    """In words, with a 95 % interval of the mean difference by Student's t."""
    if len(changes) < 2:
        return "One seed: nothing can be said of the difference."
    half = float(stats.t.ppf(0.975, len(changes) - 1)) * statistics.stdev(changes) / math.sqrt(len(changes))
    low, high = 100 * (mean(list(changes)) - half), 100 * (mean(list(changes)) + half)
    interval = f"{100 * mean(list(changes)):+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    if low <= 0 <= high:
        return (
            f"Within noise: {interval}. So many seeds could not tell a difference smaller than {100 * half:.1f} points."
        )
    return f"Not within noise: {interval}."


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8, help="local steps of a round")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/reliability.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
