"""``cases.csv`` of ``gcml inspect``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from gcml_ray.files.whole_files import replace_file
from gcml_ray.inspection.facts import CaseFacts, Inspection


def write_cases(path: Path, inspection: Inspection) -> None:
    """One line per case, with everything that was measured."""
    channels, values = inspection.channel_names, inspection.label_values
    header = ["site", "case", "split", "shape", "spacing_mm", "orientation"]
    header += [f"{name}_{part}" for name in channels for part in ("p1", "p25", "p50", "p75", "p99", "zero_share")]
    header += [f"label_{value}_{part}" for value in values for part in ("size", "pieces")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*header, "problems", "notes"])
    for case in inspection.cases:
        writer.writerow([*_cells(case, channels, values), "; ".join(case.problems), "; ".join(case.notes)])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue())


def _cells(case: CaseFacts, channels: Sequence[str], values: Sequence[int]) -> list[str]:
    cells = [
        case.site,
        case.name,
        case.split or "",
        _times(case.shape),
        _times(case.spacing_mm),
        case.orientation or "",
    ]
    by_name = {each.name: each for each in case.channels}
    for name in channels:
        facts = by_name.get(name)
        cells += [""] * 6 if facts is None else [f"{value:g}" for value in (*facts.percentiles, facts.zero_share)]
    by_value = {each.value: each for each in case.labels}
    for value in values:
        label = by_value.get(value)
        cells += ["0", "0"] if label is None else [f"{label.size:g}", str(label.num_pieces)]
    return cells


def _times(sides: Sequence[float] | None) -> str:
    return "" if sides is None else "x".join(f"{side:g}" for side in sides)
