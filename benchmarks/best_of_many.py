"""How often a comparison of equally good methods shows differences: its best is chosen on the cases that decide.

Draws tables of methods whose Dice differs from case to case by chance alone, and passes them through the comparison's
own statistics: in how many tables some p (Holm) is below 0.05, and what share of the intervals excludes 0.

    python -m benchmarks.best_of_many --methods 20 --cases 19 --tables 80
"""

from __future__ import annotations

import argparse

import numpy as np

from gcml_ray.comparison.cells import Cell, summarise
from gcml_ray.records import CaseScore

SITES = "ABCD"
MEAN, SPREAD_OF_CASES, NOISE = 0.77, 0.04, 0.01  # about those of configs/compare_retina.yaml


def draw_table(num_methods: int, num_cases: int, rng: np.random.Generator) -> list[Cell]:
    """One seed of each method; a case is as hard for all of them."""
    cases = rng.normal(MEAN, SPREAD_OF_CASES, num_cases)
    sites = [SITES[index * len(SITES) // num_cases] for index in range(num_cases)]
    cells = []
    for method in range(num_methods):
        dice = cases + rng.normal(0, NOISE, num_cases)
        scores = tuple(
            CaseScore(site, f"case{index}", "test", "personalised", "lesion", float(value), 1.0, 1.0)
            for index, (site, value) in enumerate(zip(sites, dice, strict=True))
        )
        cells.append(Cell(f"method{method}", 0, "none", 0, 1.0, 1, scores))
    return cells


def main() -> None:
    """Draws the tables and prints both shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("methods", 20), ("cases", 19), ("tables", 80), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    num_with_p = num_rows = num_excluding = 0
    for _ in range(options.tables):
        _, *others = summarise(draw_table(options.methods, options.cases, rng))
        num_with_p += any(row.p_value < 0.05 for row in others)
        num_rows += len(others)
        num_excluding += sum(row.high < 0 for row in others)
    print(f"{options.methods} equally good methods, {options.cases} cases, {options.tables} tables:")
    print(f"  some p (Holm) below 0.05 in {num_with_p / options.tables:.0%} of the tables")
    print(f"  {num_excluding / num_rows:.0%} of the intervals exclude 0")


if __name__ == "__main__":
    main()
