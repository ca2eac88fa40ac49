"""The sections of a comparison's page: which method is best, how sure that is, for whom, and at what cost."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcml_ray.comparison.cells import COLUMNS, MIN_CASES, Cell, MethodRow, read_cell, site_verdicts, summarise
from gcml_ray.comparison.config import cell_name
from gcml_ray.comparison.equality import who_missed_rounds
from gcml_ray.comparison.output import make_cell
from gcml_ray.comparison.table import cells as table_cells
from gcml_ray.comparison.table import headings, label
from gcml_ray.config import POOLED
from gcml_ray.errors import DataError
from gcml_ray.gossip.teaching import gains_by_edge
from gcml_ray.records import Edge, EvaluationReport
from gcml_ray.report.page.comparison_charts import (
    cases_by_method,
    dice_against_bytes,
    dice_by_method,
    gains_by_site,
    mean_dice_by_round,
)
from gcml_ray.report.page.exchange import cross_site_section, gossip_section, regions_section
from gcml_ray.report.page.gossip_charts import gain_map
from gcml_ray.report.page.parts import Block, Figures, Folded, Page, Pictures, Section, Table, Words
from gcml_ray.report.page.records import RunRecords, faults_notice, read_run
from gcml_ray.report.page.run import (
    FAILURES,
    PATIENTS,
    overlays_section,
    text_without_secrets,
)
from gcml_ray.report.page.run_charts import stage_chart, stage_seconds
from gcml_ray.report.page.summary import METHODS, in_words
from gcml_ray.report.words import points
from gcml_ray.tracking.metrics import flat_params
from gcml_ray.wording import count, number, probability

MAX_RANKED = 8  # rows of the summary; the table has all
NOT_COMPARED = {"name", "federation.seed", "output.folder", "tracking.experiment"}  # differ in every cell


@dataclass(frozen=True)
class NamedRun:
    """A run of a comparison: its method's name in the table and its seed; whether ``gcml compare`` made it."""

    method: str
    seed: int
    run: RunRecords
    is_cell: bool


def read_runs(folder: Path) -> tuple[NamedRun, ...]:
    """The runs in a folder. A cell of ``gcml compare`` goes by its method, any other run by its folder's name."""
    named = []
    for path in sorted(folder.glob("*/config.yaml")):
        run = read_run(path.parent)
        name, seed = run.config.name, run.config.federation.seed
        is_cell = path.parent.name == cell_name(name, seed)
        named.append(NamedRun(name if is_cell else path.parent.name, seed, run, is_cell))
    return tuple(named)


def read_cells(folder: Path) -> tuple[Cell, ...]:
    """The finished cells that lie in a folder as CSV files."""
    cells = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8") as file:
            if file.readline().rstrip("\r\n") == ",".join(COLUMNS):
                cells.append(read_cell(path))
    return tuple(cells)


def cell_of(named: NamedRun) -> Cell:
    """A tested run as a cell of the table."""
    tested = EvaluationReport("", "test", "", 0, named.run.scores, 0.0)
    return make_cell(named.method, named.seed, named.run.config, [tested], named.run.rounds)


def comparison_page(
    folder: Path, runs: Sequence[NamedRun], cells: Sequence[Cell], *, with_images: bool, with_regions: bool
) -> Page:
    """Every section that the comparison has something for.

    Args:
        folder: what the page is about.
        runs: run folders, finished or not.
        cells: finished cells that were read from files; those of ``runs`` are added.
        with_images: whether pictures go into the page.
        with_regions: whether an example of the regions is computed.
    """
    unequal = [(each, words) for each in runs if (words := _who_missed_rounds(each))]
    left_out = [each for each, _ in unequal if each.is_cell]
    own = [cell_of(each) for each in runs if each.run.scores and each not in left_out]
    known = {(cell.method, cell.seed) for cell in own}
    tested = (*own, *(cell for cell in cells if (cell.method, cell.seed) not in known))
    rows = summarise(tested, bounds=_bounds(runs, tested))
    alone, focus = _alone_and_focus(runs, tested)
    unit = runs[0].run.config.data.distance_unit if runs else "mm or voxels"
    sections = [_summary(rows, tested, runs, alone=alone, focus=focus)]
    if rows:
        sections += [_methods(rows, unit=unit), *_sites(tested, alone=alone, focus=focus), _cases(tested, rows)]
    if runs:
        sections += [_rounds(runs, rows), *_closer(runs, focus, with_images=with_images, with_regions=with_regions)]
        sections += [_time(runs), _failures(runs), _config(runs)]
    has_pictures = any(isinstance(block, Pictures) for section in sections for block in section.blocks)
    notices = (
        *_faults(runs),
        *_inequalities(unequal),
        *((PATIENTS,) if has_pictures else ()),
        *_differences_of_cases(tested),
    )
    subtitle = (
        f"Comparison of {count(len({cell.method for cell in tested}), 'method')} over the same sites. Folder: {folder}"
    )
    return Page(f"Comparison: {_name(folder, runs)}", subtitle, tuple(sections), notices)


def _name(folder: Path, runs: Sequence[NamedRun]) -> str:
    """What ``gcml compare`` called it, else the folder."""
    experiments = {each.run.config.tracking.experiment for each in runs if each.is_cell}
    return experiments.pop() if len(experiments) == 1 else folder.resolve().name


def _alone_and_focus(runs: Sequence[NamedRun], cells: Sequence[Cell]) -> tuple[str, str]:
    """The method in which each site trains alone, and the one to look at closely; empty where there is none."""
    kinds = {each.method: each.run.config.method.name for each in runs}
    names = list(dict.fromkeys([*(cell.method for cell in cells), *kinds]))
    alone = next((name for name in names if kinds.get(name, name) == "local"), "")
    focus = next((name for name in ("gcml", *names) if name in names and kinds.get(name, name) == "gcml"), "")
    return alone, focus or next((name for name in names if name != alone), "")


def _bounds(runs: Sequence[NamedRun], cells: Sequence[Cell]) -> set[str]:
    """The methods with one model on the cases of all sites; of those that have no run here the name tells."""
    kinds = {each.method: each.run.config.method.name for each in runs}
    names = {cell.method for cell in cells}
    return {name for name in names if kinds.get(name, name.partition("_")[0]) == POOLED}


def _who_missed_rounds(named: NamedRun) -> str:
    return who_missed_rounds(named.run.rounds, mode=named.run.config.federation.mode)


def _inequalities(unequal: Sequence[tuple[NamedRun, str]]) -> tuple[str, ...]:
    """A warning for each run that had fewer rounds than the others; the words say which site."""
    return tuple(
        f"{each.method}, seed {each.seed}: {words}, so it is no equal of the others"
        f"{': left out of the tables, as by gcml compare' if each.is_cell else ''}."
        for each, words in unequal
    )


def _faults(runs: Sequence[NamedRun]) -> tuple[str, ...]:
    """A warning for each run that was broken on purpose."""
    return tuple(f"{each.method}, seed {each.seed}: {notice}" for each in runs for notice in faults_notice(each.run))


def _differences_of_cases(cells: Sequence[Cell]) -> tuple[str, ...]:
    """A warning where runs were not tested on the same cases."""
    tested = {frozenset((score.site, score.case) for score in cell.scores) for cell in cells}
    if len(tested) < 2:
        return ()
    if not frozenset.intersection(*tested):
        raise DataError(
            "its runs have no test case in common, so there is nothing to compare: give the folder of one run, or one "
            "with runs on the same cases"
        )
    return ("These runs were not all tested on the same cases: their means do not compare like with like.",)


# --- sections ----------------------------------------------------------------------------------


def _summary(
    rows: Sequence[MethodRow], cells: Sequence[Cell], runs: Sequence[NamedRun], *, alone: str, focus: str
) -> Section:
    """The ranking and each site's verdict in words."""
    unfinished = [each for each in runs if not each.run.scores]
    blocks: list[Block] = []
    if unfinished:
        names = in_words([f"{each.method} (seed {each.seed})" for each in unfinished])
        blocks.append(Words((f"Not tested yet, and so not in the tables: {names}.",), is_warning=True))
    if not rows:
        blocks.append(Words(("No run of this comparison has been tested yet.",)))
        return Section("summary", "Summary", "", tuple(blocks))
    best = rows[0]
    num_cases = len({(score.site, score.case) for cell in cells for score in cell.scores})
    figures = [
        (label(best), "best mean test Dice"),
        (number(best.dice), "its mean over sites"),
        (str(len(best.site_dice)), "sites"),
        (str(num_cases), "test cases"),
        (str(max(row.num_seeds for row in rows)), "seeds (repetitions)"),
    ]
    lines = [_ranking(row, best) for row in rows[1 : 1 + MAX_RANKED]]
    if more := len(rows) - 1 - len(lines):
        lines.append(f"{count(more, 'more row')}, further behind or pooled training, in the table of methods.")
    verdicts = site_verdicts(cells, method=focus, alone=alone) if alone and focus else ()
    blocks += [
        Figures(tuple(figures)),
        Words((
            f"{label(best)} has the highest mean Dice of all methods that a federation can use: {number(best.dice)} "
            "(0 is no overlap with the expert's outline, 1 a perfect one; each site counts as much as any other).",
        )),
        Words(tuple(lines), is_list=True),
    ]  # fmt: skip
    if verdicts:
        blocks.append(Words((f"Is joining better than training alone? {focus} against {alone}, site by site:",)))
        blocks.append(Words(verdicts, is_list=True))
    if max(row.num_seeds for row in rows) < 2:
        words = "There is one repetition (seed) a method: another one may rank them otherwise."
        blocks.append(Words((words,), is_warning=True))
    return Section("summary", "Summary", "", tuple(blocks))


def _ranking(row: MethodRow, best: MethodRow) -> str:
    """One sentence: how far behind the best, and whether chance could explain it."""
    if math.isnan(row.difference):
        return f"{label(row)}: {number(row.dice)}, not to be compared with {label(best)}: they have no seed in common."
    behind = f"{label(row)}: {number(row.dice)}, {points(row.difference)} Dice points against {label(best)}"
    interval = "" if math.isnan(row.low) else f"95 % interval {points(row.low)} to {points(row.high)}; "
    sure = "chance hardly explains it" if row.p_value < 0.05 else "chance could explain it"
    p = probability(row.p_value)
    return f"{behind} ({interval}p {p if p.startswith('<') else f'= {p}'}: {sure})."


def _methods(rows: Sequence[MethodRow], *, unit: str) -> Section:
    lead = (
        "Each mark is one site's mean test Dice, the bar the mean over sites. In the table, 'against best' is in Dice "
        "points (hundredths), with the interval in which it lies with 95 % certainty over these cases; p is the "
        "probability of such a difference by chance (Wilcoxon's test, corrected by Holm). sd is the spread of the mean "
        "over repetitions. HD95 leaves out cases in which nothing was found; 'no HD95' counts them per repetition. "
        "Steps count the training of both models where two learn."
    )
    lines = tuple(tuple(table_cells(row, is_best=index == 0)) for index, row in enumerate(rows))
    blocks: list[Block] = [dice_by_method(rows), Table("", tuple(headings(rows, unit=unit)), lines)]
    if any(row.sent_bytes for row in rows):
        blocks.append(dice_against_bytes(rows))
    known = [(label(row), METHODS[row.method]) for row in rows if row.method in METHODS]
    if known:
        blocks.append(
            Folded("What the methods do", tables=(Table("", ("method", "in words"), tuple(known), num_names=2),))
        )
    return Section("methods", "Methods", lead, tuple(blocks))


def _sites(cells: Sequence[Cell], *, alone: str, focus: str) -> tuple[Section, ...]:
    chart = gains_by_site(cells, method=focus, alone=alone) if alone and focus else None
    if chart is None:
        return ()
    lead = (
        f"Mean difference of test Dice between {focus} and {alone}, in points. A line that crosses 0 means that these "
        f"cases cannot tell the two apart at this site. An open grey mark without a line: fewer than {MIN_CASES} test "
        "cases, too few to tell."
    )
    return (Section("sites", "Is joining better?", lead, (chart,)),)


def _cases(cells: Sequence[Cell], rows: Sequence[MethodRow]) -> Section:
    lead = (
        "Each mark is one patient's case, averaged over repetitions. The line in a box is the median, the dashed one "
        "the mean."
    )
    return Section("cases", "Case by case", lead, (cases_by_method(cells, rows),))


def _rounds(runs: Sequence[NamedRun], rows: Sequence[MethodRow]) -> Section:
    lead = "While a line still rises, the table ranks how fast methods learn, not how good they become."
    by_method: dict[str, list[RunRecords]] = {}
    for each in runs:
        by_method.setdefault(each.method, []).append(each.run)
    chart = mean_dice_by_round(by_method, rows)
    blocks: tuple[Block, ...] = (chart,) if chart else (Words(("No round has a validation score yet.",)),)
    return Section("rounds", "Dice by round", lead, blocks)


def _closer(runs: Sequence[NamedRun], focus: str, *, with_images: bool, with_regions: bool) -> list[Section]:
    """One run of the focus method from near: its graph, who taught whom over all seeds, pictures, regions."""
    own = [each for each in runs if each.method == focus]
    if not own:
        return []
    first = next((each for each in own if each.run.scores), own[0])
    which = f"Shown for {first.method}, seed {first.seed}. "
    sections = [
        gossip_section(first.run),
        _teaching(own),
        *cross_site_section([each.run for each in own], which=f"Mean over the seeds of {first.method}. "),
        overlays_section(first.run, with_images=with_images),
        regions_section(first.run, with_picture=with_images and with_regions),
    ]
    return [
        section
        if section.name in ("teaching", "cross_site")  # of all seeds
        else Section(section.name, section.title, which + section.lead, section.blocks)
        for section in sections
    ]


def _teaching(own: Sequence[NamedRun]) -> Section:
    """Gain per pair over all seeds of a method."""
    title = "Who taught whom"
    gains: dict[Edge, tuple[float, ...]] = {}
    for each in own:
        for edge, values in gains_by_edge(each.run.rounds).items():
            gains[edge] = gains.get(edge, ()) + values
    if not gains:
        why = "There is no round in which a site trained with a push and was validated before and after."
        return Section("teaching", title, "", (Words((why,)),))
    lead = (
        f"How the receiver's validation Dice changed over the rounds in which it trained with this sender's push, over "
        f"{count(len(own), 'run')} of {own[0].method}. A hint, not a proof: the receiver's own training is in it too."
    )
    return Section("teaching", title, lead, (gain_map(gains),))


def _time(runs: Sequence[NamedRun]) -> Section:
    """Site time by stage of each method, mean over seeds."""
    lead = "What the sites of a method spent their time on, all sites together, mean over repetitions."
    by_method: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    num_runs = Counter(each.method for each in runs if each.run.rounds)
    for each in runs:
        for stages in stage_seconds(each.run.rounds).values():
            for stage, seconds in stages.items():
                by_method[each.method][stage] += seconds / num_runs[each.method]
    chart = stage_chart(by_method, title="Time of each method")
    return Section("time", "Time by stage", lead, (chart,) if chart else (Words(("No round is finished yet.",)),))


def _failures(runs: Sequence[NamedRun]) -> Section:
    rows = [
        (
            each.method,
            str(each.seed),
            str(f.round_number),
            f.site,
            FAILURES[f.kind],
            f"{f.error_type} {f.message}".strip(),
        )
        for each in runs
        for record in each.run.rounds
        for f in record.failures
    ]
    dropped = [
        f"{each.method}, seed {each.seed}: {site} was dropped: {reason}"
        for each in runs
        for site, reason in (each.run.state.dropped if each.run.state else {}).items()
    ]
    refused = sum(not push.accepted for each in runs for record in each.run.rounds for push in record.pushes)
    blocks: list[Block] = [Words(tuple(dropped), is_warning=True)] if dropped else []
    if rows:
        heads = ("method", "seed", "round", "site", "what happened", "message")
        blocks.append(Table(f"{count(len(rows), 'failed call')}, the first 200", heads, tuple(rows[:200]), num_names=6))
    if refused:
        blocks.append(Words((f"{count(refused, 'push was', 'pushes were')} refused; see each run's transfers.csv.",)))
    none = Words(("No site failed, none was dropped, no push was refused.",))
    return Section("failures", "Failures", "", tuple(blocks) or (none,))


def _config(runs: Sequence[NamedRun]) -> Section:
    """Only what differs, then each whole file."""
    lead = "The settings in which the methods differ; all others are the same for all of them."
    first: dict[str, RunRecords] = {}
    for each in runs:
        first.setdefault(each.method, each.run)
    settings = {name: flat_params(run.config.model_dump(mode="json", by_alias=True)) for name, run in first.items()}
    keys = sorted({key for values in settings.values() for key in values} - NOT_COMPARED)
    rows = tuple(
        (key, *(_shown(values, key) for values in settings.values()))
        for key in keys
        if len({_shown(values, key) for values in settings.values()}) > 1
    )
    blocks: list[Block] = [Table("", ("setting", *settings), rows, num_names=1 + len(settings))] if rows else []
    for name, run in first.items():
        blocks.append(Folded(f"{name}: config.yaml", text_without_secrets(run.folder.config_file)))
    return Section("config", "Configuration", lead, tuple(blocks))


def _shown(settings: Mapping[str, object], key: str) -> str:
    return str(settings[key]) if key in settings else "-"
