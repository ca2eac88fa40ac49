"""What came of the soak's episodes: rows of a CSV file, a Markdown table, and its place in a page of the docs."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gcml_ray.prediction.averages import mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/reliability.md"
FELL = "Dice of the spared sites fell by"  # so begins the problem of a run with no other one


@dataclass(frozen=True)
class Episode:
    """What was done to a run, and what became of it.

    ``faults``: those that were carried out, ``kind site@round``. ``problem`` is empty where all went as it should.
    ``lost_rounds`` were on disk and had to be done again. ``dice_change``: mean over the sites that were spared,
    against the undisturbed run (NaN where none was). ``rounds_missed``: rounds of single sites that were not trained.
    """

    number: int
    faults: str
    problem: str
    lost_rounds: int
    rounds_missed: int
    dice_change: float
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether it ended or was resumed with nothing lost and nothing left, whatever its Dice."""
        return not self.problem or self.problem.startswith(FELL)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of its faults."""
        return tuple(re.sub(r"( \w+)?@r\d+$", "", fault) for fault in self.faults.split(" + ") if fault)


def csv_file(mode: str, seed: int) -> Path:
    """Where the episodes of a soak are kept."""
    return RESULTS / f"chaos_{mode}_{seed}.csv"


def append(path: Path, episode: Episode) -> None:
    """One more row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Episode)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        row = asdict(episode)
        writer.writerow(row | {"dice_change": f"{episode.dice_change:.4f}", "seconds": f"{episode.seconds:.1f}"})


def read(path: Path) -> list[Episode]:
    """The episodes so far."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Episode(
                int(row["number"]),
                row["faults"],
                row["problem"],
                int(row["lost_rounds"]),
                int(row["rounds_missed"]),
                float(row["dice_change"]),
                float(row["seconds"]),
            )
            for row in csv.DictReader(file)
        ]


def table(episodes: Sequence[Episode]) -> str:
    """By kind of fault: how many, in how many runs that ended well, what they cost. Then what went wrong, by run."""
    lines = [
        "| fault | injected | run whole | and Dice within a point | finished rounds lost | seconds of a run |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sorted({kind for one in episodes for kind in one.kinds}):
        having = [one for one in episodes if kind in one.kinds]
        whole, good = sum(one.is_whole for one in having), sum(not one.problem for one in having)
        lost, seconds = max(one.lost_rounds for one in having), mean([one.seconds for one in having])
        lines.append(f"| {kind} | {len(having)} | {whole} | {good} | {lost} | {seconds:.0f} |")
    changes = [one.dice_change for one in episodes if one.dice_change == one.dice_change]
    whole, good = sum(one.is_whole for one in episodes), sum(not one.problem for one in episodes)
    lost = max((one.lost_rounds for one in episodes), default=0)
    lines.append(
        f"\n{whole} of {len(episodes)} runs were whole at the end, {good} of them with the spared sites' Dice within a "
        f"point; finished rounds lost to a killed driver: at most {lost}."
    )
    if changes:
        low, high = 100 * min(changes), 100 * max(changes)
        lines.append(
            f"Dice of the spared sites against the undisturbed run: {100 * mean(changes):+.2f} points on average, "
            f"from {low:+.2f} to {high:+.2f}."
        )
    lines += [f"- run {one.number} ({one.faults}): {one.problem}" for one in episodes if one.problem]
    return "\n".join(lines)


def write_into_page(page: Path, marker: str, text: str) -> None:
    """Replaces what stands between ``<!-- marker -->`` and ``<!-- /marker -->``.

    Raises:
        ValueError: the page has no such place.
    """
    content = page.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- /{re.escape(marker)} -->)", re.DOTALL)
    if not place.search(content):
        raise ValueError(f"{page} has no <!-- {marker} --> ... <!-- /{marker} -->")
    page.write_text(place.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", content), encoding="utf-8")
