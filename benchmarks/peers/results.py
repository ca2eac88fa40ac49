"""From the lines that sites left to the table: how long a round took, and whether everybody did the same work."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.measure import Measured
from benchmarks.peers.scenario import SITES, Scenario

OURS = "gcml-ray"
FLOOR = "loop"
TOLERANCE = 1e-3  # of the largest weight: sums in another order, carried through all steps


@dataclass(frozen=True)
class Training:
    """One site's finished training of one round. ``ended``: seconds of the machine's monotonic clock."""

    site: str
    round_number: int
    ended: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """One run. ``problem`` is not empty where it is no result; then the numbers mean nothing.

    ``round_s``: mean from the end of a round's training to the end of the next one's. ``difference``: of the weights to
    the bare loop's, as a share of the largest; None where a method is not FedAvg, or the loop did not run.
    """

    scenario: str
    contender: str
    repeat: int
    round_s: float
    total_s: float
    peak_memory_bytes: int
    loopback_bytes: int
    difference: float | None
    problem: str


def read_trainings(folder: Path) -> tuple[Training, ...]:
    """What the sites of a run left in its folder."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(
        Training(values["site"], values["round"], values["ended"], tuple(values["weights"]))
        for values in map(json.loads, lines)
    )


def missing_work(trainings: Sequence[Training], scenario: Scenario) -> str:
    """In words, what is not as it must be: every site trains once in every round. Empty where all is well."""
    done = sorted((one.site, one.round_number) for one in trainings)
    wanted = sorted((site, number) for site in SITES for number in range(1, scenario.rounds + 1))
    if done == wanted:
        return ""
    return f"sites trained {len(done)} rounds together, not {len(wanted)}, or some twice"


def seconds_a_round(trainings: Sequence[Training]) -> float:
    """Mean seconds from the end of one round's last training to the end of the next one's.

    The first round, with whatever a framework loads late, is left out, but the exchange after it counts.
    """
    ends: dict[int, float] = {}
    for one in trainings:
        ends[one.round_number] = max(one.ended, ends.get(one.round_number, one.ended))
    first, last = min(ends), max(ends)
    return (ends[last] - ends[first]) / (last - first)


def final_weights(trainings: Sequence[Training]) -> dict[str, tuple[float, ...]]:
    """By site, the probed weights after the last round's training."""
    last = max(one.round_number for one in trainings)
    return {one.site: one.weights for one in trainings if one.round_number == last}


def weight_difference(found: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]) -> float:
    """Largest difference of any probed weight, as a share of the largest weight of the reference."""
    largest = max(abs(value) for weights in reference.values() for value in weights)
    pairs = [pair for site in reference for pair in zip(found[site], reference[site], strict=True)]
    differences = [abs(one - other) for one, other in pairs]
    return math.nan if any(map(math.isnan, differences)) else max(differences) / max(largest, 1e-30)


def judge(
    trainings: Sequence[Training],
    measured: Measured,
    *,
    contender: str,
    scenario: Scenario,
    repeat: int,
    reference: Mapping[str, Sequence[float]] | None,
) -> Result:
    """Puts a run's numbers together, or says why it is none.

    Args:
        trainings: what its sites left.
        measured: of its processes.
        contender: whose run.
        scenario: the work.
        repeat: which repetition.
        reference: final weights of the bare loop, empty where it failed; None where the run need not equal it.
    """
    problem = measured.problem or missing_work(trainings, scenario)
    difference = None
    if not problem and reference == {}:
        problem = "the bare loop failed: nothing shows that the same work was done"
    if not problem and reference is not None:
        difference = weight_difference(final_weights(trainings), reference)
        if not difference <= TOLERANCE:
            problem = f"its weights differ from FedAvg's by {100 * difference:.2g} %: other work was done"
    return Result(
        scenario=scenario.name,
        contender=contender,
        repeat=repeat,
        round_s=0.0 if problem else seconds_a_round(trainings),
        total_s=measured.seconds,
        peak_memory_bytes=measured.peak_memory_bytes,
        loopback_bytes=measured.loopback_bytes,
        difference=difference,
        problem=problem,
    )


def table(results: Sequence[Result], scenario: Scenario, titles: Mapping[str, str]) -> str:
    """Medians over the repetitions, with ratios to gcml-ray's FedAvg; what failed stands below with its reason.

    Args:
        results: of any scenarios.
        scenario: the one to show.
        titles: of the contenders, in the order of rows.
    """
    chosen = [one for one in results if one.scenario == scenario.name]
    good = {name: [one for one in chosen if one.contender == name and not one.problem] for name in titles}
    ours = good.get(OURS, [])
    header = [
        "",
        "| | s per round | x gcml-ray | total s | x gcml-ray | peak PSS, MB | x gcml-ray | over loopback, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = [_row(title, good[name], ours) for name, title in titles.items() if good[name]]
    lines = [f"{scenario.title}; {scenario.rounds} rounds:", *(header + rows if rows else [])]
    failed = [one for one in chosen if one.problem]
    lines += [""] if failed else []
    lines += [f"No result: {titles[one.contender]}, run {one.repeat}: {one.problem}" for one in failed]
    return "\n".join(lines)


def _row(title: str, results: Sequence[Result], ours: Sequence[Result]) -> str:
    cells = [title]
    for field, scale, digits in (("round_s", 1.0, 2), ("total_s", 1.0, 1), ("peak_memory_bytes", 1e-6, 0)):
        value = _median(results, field)
        cells += [f"{scale * value:,.{digits}f}", f"{value / _median(ours, field):.2f}" if ours else "-"]
    cells.append(f"{1e-6 * _median(results, 'loopback_bytes'):,.0f}")
    return "| " + " | ".join(cells) + " |"


def _median(results: Sequence[Result], field: str) -> float:
    return float(statistics.median(getattr(one, field) for one in results))
