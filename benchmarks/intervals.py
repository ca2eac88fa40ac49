"""How often an interval of a difference leaves out 0 where there is no difference: of 95 % intervals one in twenty.

Differences are normal, or drawn from the centred differences of real methods; sites have the numbers of test cases, and
the spreads, of our comparisons. "t" is what tables and verdicts show, "bootstrap" the percentile bootstrap, cases
resampled within their sites.

    python -m benchmarks.intervals --repeats 5000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gcml_ray.comparison.cells import LEVEL, differences_of_methods, mean_interval, read_cell

RESULTS = Path(__file__).parent / "results"
TASKS = ("retina", "lgg", "hippocampus")
PAIR = ("gcml", "local")
SMALL = ((2, 2, 2, 2), (3, 3, 3), (6, 6, 6, 6), (20, 20, 20))
NUM_RESAMPLES = 2000

BySite = list[NDArray[np.float64]]


def bootstrap_interval(by_site: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean over sites of the sites' means, cases resampled within sites."""
    means = [part[rng.integers(0, len(part), (NUM_RESAMPLES, len(part)))].mean(axis=1) for part in by_site]
    low, high = np.quantile(np.mean(means, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def missed(draw: Callable[[], BySite], rng: np.random.Generator, *, repeats: int) -> tuple[float, float]:
    """Share of intervals that leave out 0: of Student's t, and of the bootstrap."""
    counts = np.zeros(2)
    for _ in range(repeats):
        by_site = draw()
        counts += [low > 0 or high < 0 for low, high in (mean_interval(by_site), bootstrap_interval(by_site, rng))]
    return float(counts[0] / repeats), float(counts[1] / repeats)


def main() -> None:
    """Prints a line per number of cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5000)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    print(f"intervals that leave out 0, {repeats} each: t, bootstrap")
    for sizes in SMALL:
        t, bootstrap = missed(lambda: [rng.normal(size=size) for size in sizes], rng, repeats=repeats)  # noqa: B023
        print(f"  {sizes} cases, normal: {t:.1%}, {bootstrap:.1%}")
    for task in TASKS:
        cells = [read_cell(path) for path in sorted((RESULTS / task).glob("*.csv"))]
        centred = [part - part.mean() for part in differences_of_methods(cells, *PAIR).values()]
        sizes = tuple(len(part) for part in centred)
        ways: dict[str, Callable[[], BySite]] = {
            "normal": lambda: [rng.normal(0, part.std(), len(part)) for part in centred],  # noqa: B023
            "as the sites' own": lambda: [rng.choice(part, len(part)) for part in centred],  # noqa: B023
        }
        for name, draw in ways.items():
            t, bootstrap = missed(draw, rng, repeats=repeats)
            print(f"  {task}, {sizes} cases, {name}: {t:.1%}, {bootstrap:.1%}")


if __name__ == "__main__":
    main()
