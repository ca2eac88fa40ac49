"""The sections of a search's page: what won, whether it holds, what mattered, and every trial."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

from gcml_ray.report.page.parts import Block, Figures, Folded, Page, Section, Table, Words
from gcml_ray.report.page.search_charts import (
    dice_by_traffic,
    learning_curves,
    objective_by_trial,
    parallel_coordinates,
    what_mattered,
)
from gcml_ray.report.words import OBJECTIVES
from gcml_ray.search.effects import Effect, compared_round, describe, effects
from gcml_ray.search.folder import read_final, read_search_record
from gcml_ray.search.records import (
    FinalRecord,
    SearchRecord,
    TrialRecord,
    describe_params,
    format_value,
    mean_dices,
    short_names,
)
from gcml_ray.wording import count, number


def search_page(folder: Path) -> Page:
    """Every section that the search has something for.

    Raises:
        CheckpointError: a file of the search cannot be read.
    """
    search, final = read_search_record(folder), read_final(folder)
    sections = [_summary(search, final)]
    if any(trial.points for trial in search.trials):
        found = effects(search)
        sections += [_what_mattered(search, found), _trials(search), _curves(search), _traffic(search)]
    if final is not None:
        sections.insert(1, _final(final))
    subtitle = (
        f"Report of a search over the settings of a federation, by validation {search.objective}. Folder: {folder}"
    )
    return Page(f"Search: {search.name}", subtitle, tuple(sections))


def _summary(search: SearchRecord, final: FinalRecord | None) -> Section:
    """What won, in words."""
    statuses = Counter(trial.status for trial in search.trials)
    best, own = search.best, search.default_trial
    rounds = sum(trial.last_round for trial in search.trials)
    figures = [(str(len(search.trials)), "trials"), (f"{rounds} of {len(search.trials) * search.rounds}", "rounds run")]
    if best is None:
        words = "No trial has finished: there is no best configuration yet."
        return Section("summary", "Summary", "", (Figures(tuple(figures)), Words((words,))))
    figures.append((number(best.value(search.objective)), f"best, validation {search.objective}"))
    if own is not None and own.status == "finished":
        figures.append((number(own.value(search.objective)), "the federation's own values"))
    if final is not None and final.default_scores:
        figures.append((f"{final.gain:+.3f}", "test Dice gained with new seeds"))
    ended = ", ".join(f"{amount} {status}" for status, amount in statuses.most_common())
    lines = [f"Of {count(len(search.trials), 'trial')}: {ended}."]
    lines.append(f"Best is trial {best.number}: {describe_params(best.params)}. Its configuration is best.yaml.")
    lines += _own_words(search, best)
    lines += [final.verdict] if final else []
    blocks: list[Block] = [Figures(tuple(figures)), Words(tuple(lines), is_list=True)]
    if final is None:
        words = (
            "The best value is the highest of many on the same validation cases and one seed, and so flattering. "
            "Check it with new seeds on the test cases: gcml tune --final FOLDER"
        )
        blocks.append(Words((words,), is_warning=True))
    return Section("summary", "Summary", "", tuple(blocks))


def _own_words(search: SearchRecord, best: TrialRecord) -> list[str]:
    own = search.default_trial
    if own is None or not own.points:
        return []
    if own.number == best.number:
        return ["These are the federation's own values: no other trial was better."]
    if own.status != "finished":
        return [f"The federation's own values (trial {own.number}) were {own.status} in round {own.last_round}."]
    behind = best.value(search.objective) - own.value(search.objective)
    return [f"That is {behind:+.3f} against the federation's own values (trial {own.number}), on validation cases."]


def _final(final: FinalRecord) -> Section:
    """The one test."""
    lead = (
        "Trained anew with seeds that no trial had, and tested once each. Mean over the sites of test Dice; the spread "
        "is the standard deviation over seeds."
    )
    seeds = [str(score.seed) for score in final.scores]
    rows = []
    for name, scores in (("winner", final.scores), ("the federation's own values", final.default_scores)):
        if scores:
            dice = mean_dices(scores)
            worst = fmean(score.worst_dice for score in scores)
            over = f"{fmean(dice):.3f} ± {stdev(dice):.3f}"
            rows.append((name, *(f"{value:.3f}" for value in dice), over, f"{worst:.3f}"))
    headings = ("values", *(f"seed {seed}" for seed in seeds), "mean ± spread", "worst site, mean")
    return Section("final", "The test", lead, (Table("", headings, tuple(rows)), Words((final.verdict,))))


def _what_mattered(search: SearchRecord, found: tuple[Effect, ...]) -> Section:
    if not found:
        return Section("mattered", "What mattered", "", (Words(("There are too few trials to say.",)),))
    lead = (
        f"Trials that finished or were cut, compared at round {compared_round(search)}, which all of them reached. "
        "Groups of trials differ in their other values too, and a searcher tries good values more often: hints, not "
        "proofs."
    )
    rows = [
        (effect.key, group.name, str(group.num_trials), f"{group.mean:.3f}", _or_dash(group.sd))
        for effect in found
        for group in effect.groups
    ]
    table = Table("", ("key", "value", "trials", "mean objective", "spread between trials"), tuple(rows), num_names=2)
    chart = what_mattered(found)
    blocks: list[Block] = [Words(tuple(describe(effect) for effect in found), is_list=True)]
    blocks += [chart] if chart else []
    return Section("mattered", "What mattered", lead, (*blocks, Folded("The groups of trials", tables=(table,))))


def _trials(search: SearchRecord) -> Section:
    lead = "A trial is a whole federation with its own values of the searched keys. All have the same seed and data."
    coordinates = parallel_coordinates(search)
    blocks: list[Block] = [objective_by_trial(search), *([coordinates] if coordinates else []), _table(search)]
    failed = [f"Trial {trial.number} failed: {trial.reason}" for trial in search.trials if trial.status == "failed"]
    blocks += [Words(tuple(failed), is_warning=True)] if failed else []
    return Section("trials", "Trials", lead, tuple(blocks))


def _table(search: SearchRecord) -> Table:
    """The best first; those without a score last."""
    ranked = sorted(
        search.trials,
        key=lambda trial: (trial.status != "finished", -trial.value(search.objective) if trial.points else math.inf),
    )
    keys = sorted({key for trial in search.trials for key in trial.params})
    rows = tuple(
        (
            str(trial.number),
            trial.status,
            f"{trial.last_round}/{search.rounds}",
            *_scores(trial),
            *(format_value(trial.params.get(key, "-")) for key in keys),
        )
        for trial in ranked
    )
    heads = ("trial", "status", "round", "mean Dice", "worst Dice", "MB sent", *short_names(keys).values())
    return Table("Every trial, the best first", heads, rows, num_names=2)


def _scores(trial: TrialRecord) -> tuple[str, str, str]:
    if not trial.points:
        return "-", "-", "-"
    point = trial.points[-1]
    return f"{point.mean_dice:.3f}", f"{point.worst_dice:.3f}", f"{point.megabytes:.1f}"


def _curves(search: SearchRecord) -> Section:
    cut = sum(trial.status == "cut" for trial in search.trials)
    lead = f"The {OBJECTIVES[search.objective]} of each trial by round, the best so far of each site."
    if cut:
        lead += f" The scheduler cut {count(cut, 'trial')} (crosses), which were behind others at the same round."
    return Section("curves", "Learning curves", lead, (learning_curves(search),))


def _traffic(search: SearchRecord) -> Section:
    lead = "Finished trials alone. Above and left is better; the line joins trials that no other one beats in both."
    chart = dice_by_traffic(search)
    blocks: tuple[Block, ...] = (chart,) if chart else (Words(("No trial has finished yet.",)),)
    return Section("traffic", "Dice by traffic", lead, blocks)


def _or_dash(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
