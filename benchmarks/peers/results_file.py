"""Every run as a line of a CSV file, and back."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.results import Result

COLUMNS = (
    "scenario",
    "contender",
    "repeat",
    "round_s",
    "total_s",
    "peak_pss_mb",
    "loopback_mb",
    "weight_difference",
    "problem",
)


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Every run, one line each; a run that is no result has a problem and no numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for one in results:
            numbers = ["", "", "", ""]
            if not one.problem:
                sizes = (1e-6 * one.peak_memory_bytes, 1e-6 * one.loopback_bytes)
                numbers = [f"{one.round_s:.4f}", f"{one.total_s:.3f}", *(f"{size:.1f}" for size in sizes)]
            difference = "" if one.difference is None else f"{one.difference:.2e}"
            writer.writerow([one.scenario, one.contender, one.repeat, *numbers, difference, one.problem])


def read_csv(path: Path) -> tuple[Result, ...]:
    """The runs in a file that are results; none where there is no file."""
    if not path.exists():
        return ()
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["problem"]]
    return tuple(
        Result(
            scenario=row["scenario"],
            contender=row["contender"],
            repeat=int(row["repeat"]),
            round_s=float(row["round_s"]),
            total_s=float(row["total_s"]),
            peak_memory_bytes=round(1e6 * float(row["peak_pss_mb"])),
            loopback_bytes=round(1e6 * float(row["loopback_mb"])),
            difference=float(row["weight_difference"]) if row["weight_difference"] else None,
            problem="",
        )
        for row in rows
    )
