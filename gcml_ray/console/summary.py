"""The last words of a run: scores by site as a table, and where everything lies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from gcml_ray.config import Config
from gcml_ray.config.methods import SERVER
from gcml_ray.files.run_folder import MODEL_FILE, RunState
from gcml_ray.gossip.trust import judged_counts
from gcml_ray.prediction.averages import mean, mean_change, mean_over
from gcml_ray.records import BEFORE_GOSSIP, PERSONALISED, CaseScore, EvaluationReport, RoundRecord
from gcml_ray.stopwatch import peak_memory_bytes
from gcml_ray.tracking.client import how_to_open, tracking_uri
from gcml_ray.wording import count, in_shell, number


def scores_of(reports: Iterable[EvaluationReport], site: str, model: str) -> tuple[CaseScore, ...]:
    """The case scores of one site's model."""
    return tuple(score for report in reports if (report.site, report.model) == (site, model) for score in report.scores)


def site_dice(reports: Iterable[EvaluationReport], model: str) -> dict[str, float]:
    """Mean test Dice by site, over cases and foreground classes."""
    return {report.site: mean(score.dice for score in report.scores) for report in reports if report.model == model}


def run_table(reports: Sequence[EvaluationReport], *, unit: str) -> Table:
    """Every site's personalised model on its test cases, against its own model before gossip."""
    before = site_dice(reports, BEFORE_GOSSIP)
    after = site_dice(reports, PERSONALISED)
    table = Table(title="Personalised models on each site's own test cases", title_justify="left")
    table.add_column("site")
    headings = ("cases", "Dice before gossip", "Dice", "gain", f"HD95 ({unit})", "surface Dice")
    # without a warm-up there is no model before gossip
    shown = [at for at, heading in enumerate(headings) if before or heading not in ("Dice before gossip", "gain")]
    for at in shown:
        table.add_column(headings[at], justify="right")
    for site in sorted(after):
        scores = scores_of(reports, site, PERSONALISED)
        row = (
            str(len({score.case for score in scores})),
            number(before.get(site, math.nan)),
            number(after[site]),
            signed(after[site] - before.get(site, math.nan)),
            number(mean(score.hd95 for score in scores), digits=1),
            number(mean(score.surface_dice for score in scores)),
        )
        table.add_row(site, *(row[at] for at in shown))
    table.add_section()
    means = ("", *_means(before, after), "", "")
    table.add_row("mean of sites", *(means[at] for at in shown), style="bold")
    return table


def _means(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[str, str, str]:
    """Cells of the last row: means, and of the change at the sites that have both."""
    change = mean_change(before, after)
    return number(mean_over(after, before)), number(mean(after.values())), signed(change)


def comparison_table(alone: Sequence[EvaluationReport], together: Sequence[EvaluationReport], *, unit: str) -> Table:
    """Two runs with equal optimiser steps side by side: every site alone, and together."""
    own, joint = site_dice(alone, PERSONALISED), site_dice(together, PERSONALISED)
    table = Table(title="Test Dice: the same sites and steps, alone and together", title_justify="left")
    table.add_column("site")
    for heading in ("cases", "alone", "together", "gain", f"HD95 alone ({unit})", f"HD95 together ({unit})"):
        table.add_column(heading, justify="right")
    for site in sorted(joint):
        one, other = scores_of(alone, site, PERSONALISED), scores_of(together, site, PERSONALISED)
        table.add_row(
            site,
            str(len({score.case for score in other})),
            number(own.get(site, math.nan)),
            number(joint[site]),
            signed(joint[site] - own.get(site, math.nan)),
            number(mean(score.hd95 for score in one), digits=1),
            number(mean(score.hd95 for score in other), digits=1),
        )
    table.add_section()
    table.add_row("mean of sites", "", *_means(own, joint), "", "", style="bold")
    return table


def comparison_verdict(alone: Sequence[EvaluationReport], together: Sequence[EvaluationReport]) -> str:
    """One sentence: for how many sites joining was better, and by how much on average."""
    own, joint = site_dice(alone, PERSONALISED), site_dice(together, PERSONALISED)
    both = [site for site in joint if site in own]
    better = [site for site in both if joint[site] > own[site]]
    return (
        f"Joining was better than training alone at {len(better)} of {len(both)} sites, "
        f"{100 * mean_change(own, joint):+.1f} Dice points on average (one seed; how sure that is takes several)."
    )


def share_of_fedavg(rounds: Sequence[RoundRecord]) -> float | None:
    """Bytes of accepted pushes over what FedAvg would upload with as many exchange rounds, in the same encoding.

    FedAvg sends twice that: a site's model up, and the mean down; in warm-up and cool-down it sends nothing either. A
    site counts with its largest push, one that never pushed with their mean. None for methods with a server, and where
    nothing was pushed.
    """
    taken = [receipt for record in rounds for receipt in record.pushes if receipt.accepted]
    if not taken or any(SERVER in (receipt.sender, receipt.receiver) for receipt in taken):
        return None
    sizes: dict[str, int] = {}
    for receipt in taken:
        sizes[receipt.sender] = max(receipt.size_bytes, sizes.get(receipt.sender, 0))
    usual = mean(sizes.values())
    uploads = sum(
        sizes.get(site, usual) for record in rounds if record.plan.phase == "exchange" for site in record.plan.sites
    )
    return sum(receipt.size_bytes for receipt in taken) / uploads if uploads else None


def run_facts(
    rounds: Sequence[RoundRecord],
    *,
    start_seconds: float,
    evaluations: Sequence[EvaluationReport] = (),
    chaos: str = "",
) -> str:
    """What a run took: time and how much of the sites' time was training, traffic, memory.

    Args:
        rounds: its records.
        start_seconds: how long it took to start.
        evaluations: reports of its test, which may take more memory than its rounds.
        chaos: the faults that it was run with.
    """
    seconds = sum(record.seconds for record in rounds)
    site_seconds = _site_seconds(rounds)
    by_stage: Counter[str] = Counter()
    for record in rounds:
        for report in record.trained:
            by_stage.update(report.seconds)
    shares = ", ".join(f"{100 * value / site_seconds:.0f} % {stage}" for stage, value in by_stage.most_common())
    taken = [receipt for record in rounds for receipt in record.pushes if receipt.accepted]
    refused = sum(not receipt.accepted for record in rounds for receipt in record.pushes)
    # not RoundRecord.skipped: what comes late is among those trained of a later round, and so not missed
    missed = sum(len(record.plan.sites) + len(record.left_out) - len(record.trained) for record in rounds)
    peaks = [report.peak_memory_bytes for record in rounds for report in record.trained]
    site_peak = max([*peaks, *(report.peak_memory_bytes for report in evaluations)], default=0)
    driver_peak = peak_memory_bytes()
    megabytes = sum(receipt.size_bytes for receipt in taken) / 1e6
    share = share_of_fedavg(rounds)
    num_judged, num_rejected = judged_counts(rounds)
    judged = [f"judged       {count(num_judged, 'incoming model')} by the receivers; {num_rejected} not let in"]
    faults = [f"FAULTS       were injected on purpose, what this run gives is no result: {chaos}"]
    lines = (
        *(faults if chaos else ()),
        f"time         {start_seconds:.0f} s to start, {seconds:.0f} s for {count(len(rounds), 'round')}",
        *([f"             of the sites' time {shares}"] if shares else []),
        f"traffic      {count(len(taken), 'push', 'pushes')}, {megabytes:.1f} MB; {refused} refused; "
        f"{count(missed, 'site round')} missed",
        *(
            (f"             {share:.0%} of FedAvg's uploads in the same rounds, {share / 2:.0%} of both its ways",)
            if share
            else ()
        ),
        *(judged if num_judged else ()),
        f"peak memory  driver {driver_peak / 1e6:.0f} MB, largest site {site_peak / 1e6:.0f} MB",
    )
    return "\n".join(lines)


def _site_seconds(rounds: Sequence[RoundRecord]) -> float:
    """The time of all sites together, each from the start to the last record that has it.

    Without a barrier a slow site is missing in the records that others fill meanwhile: it trains all the same.
    """
    ends: dict[str, float] = {}
    clock = 0.0
    for record in rounds:
        clock += record.seconds
        ends.update(dict.fromkeys(record.plan.sites, clock))
    return sum(ends.values())


def where_things_are(config: Config) -> str:
    """What lies where, as commands and paths to copy; only what there is."""
    folder = Path(config.output.folder)
    places = {
        "plots": (folder / "plots", "*.png"),
        "overlays": (folder / "overlays", "*/*.png"),
        "models": (folder / "checkpoints", f"*/{MODEL_FILE}"),
        "every case": (folder / "cases.csv", ""),
    }
    found = [(name, path) for name, (path, files) in places.items() if _is_there(path, files)]
    lines = [f"{name:<12} {path}" for name, path in (("run folder", folder), *found)]
    lines.append(f"one page     gcml report {in_shell(folder)}")
    if config.tracking.enabled:
        lines.append(f"MLflow       {how_to_open(tracking_uri(config, folder))}")
    return "\n".join(lines)


def lost_words(state: RunState, folder: Path) -> str:
    """Which sites a run has lost, and how to test those that have a checkpoint; empty where none was lost."""
    lines = [f"LOST         {site} is in no result: {state.dropped[site]}" for site in state.lost]
    testable = [in_shell(site) for site in state.lost if state.site_rounds.get(site)]
    if testable:
        site = testable[0] if len(testable) == 1 else f"SITE (of {', '.join(testable)})"
        how = f"gcml site add {in_shell(folder)} {site}, then gcml run --resume {in_shell(folder)}"
        lines.append(f"             to test what it had learnt, once it works again: {how}")
    return "\n".join(lines)


def _is_there(path: Path, files: str) -> bool:
    """Whether a file exists, or a folder with at least one of such files."""
    return any(path.glob(files)) if files else path.is_file()


def signed(value: float) -> str:
    """A difference for a table."""
    return "-" if math.isnan(value) else f"{value:+.3f}"
