"""Fails where a federation has become slow: a short :mod:`benchmarks.floor` that can be trusted on a busy machine.

The same steps run as bare loops, one process a core, and as a federation with one site a core; both in turn, several
times, and the median of the ratios counts, so that one bad moment decides nothing. Which ratio, the machine decides:
where the bare loops got nearly all of their cores, that of the wall clock; where others were at work, that of the
processor time, which their work does not change (and which does not see waiting: the output says so).

Exit status 1 below the limit. Under two minutes.

    python -m benchmarks.smoke
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

from benchmarks.floor import Size, Times, line_of, measure

LIMIT = 0.8  # it has given 0.82 to 0.88, by machine
QUIET = 0.95  # share of the cores
SIZE = Size(sites=2, rounds=6, steps=10, cores=2)
MODE = "sync"


def verdict(found: Sequence[Times]) -> tuple[float, str]:
    """The median ratio that counts, and which one it is."""
    share = statistics.median(one.share for one in found)
    if share >= QUIET:
        return statistics.median(one.of_processes(MODE) for one in found), "bare processes / wall"
    words = f"processor time, as bare loops got {share:.0%} of their cores: waiting is not seen"
    return statistics.median(one.of_cpu(MODE) for one in found), words


def main() -> None:
    """Measures, prints, and fails below the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=LIMIT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(SIZE, repeats=options.repeats, modes=(MODE,))
    print(line_of(f"median of {options.repeats}", found))
    ratio, words = verdict(found)
    print(f"{ratio:.3f} of {words}; limit {options.limit}")
    if ratio < options.limit:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
