"""The sections of one run's page, in the order in which a reader asks: how good, for whom, why, at what cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gcml_ray.config import POOLED
from gcml_ray.prediction.averages import case_dice, mean, mean_change, mean_over
from gcml_ray.records import BEFORE_GOSSIP, PERSONALISED
from gcml_ray.report.page.exchange import cross_site_section, gossip_section, regions_section, teaching_section
from gcml_ray.report.page.parts import (
    Block,
    Folded,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Words,
    picture_uri,
)
from gcml_ray.report.page.records import RunRecords, faults_notice, site_dice
from gcml_ray.report.page.run_charts import (
    case_distribution,
    class_means,
    dice_by_round,
    time_by_round,
    time_by_stage,
)
from gcml_ray.report.page.summary import explained, summary_section
from gcml_ray.report.words import MODELS, points, validation_series
from gcml_ray.wording import count, number, without_secrets

PATIENTS = (
    "This page holds pictures of patients and names of cases. Share it only as you may share the images themselves. "
    "Made with --no-images it holds no picture."
)
FAILURES = {
    "raised": "ended with an error",
    "died": "its process ended",
    "unreachable": "could not be reached",
    "late": "did not answer in time",
}
MAX_PICTURES = 40  # overlays on a page; more would make it slow to open
MAX_ROWS = 200


def run_page(run: RunRecords, *, with_images: bool, with_regions: bool) -> Page:
    """Every section that the run has something for; those without say why."""
    sections = [
        summary_section(run),
        dice_section(run),
        cases_section(run),
        overlays_section(run, with_images=with_images),
        gossip_section(run),
        teaching_section(run),
        *cross_site_section([run]),
        regions_section(run, with_picture=with_images and with_regions),
        time_section(run),
        failures_section(run),
        config_section(run),
    ]
    has_pictures = any(isinstance(block, Pictures) for section in sections for block in section.blocks)
    return Page(
        title=run.config.name,
        subtitle=f"Report of one federated training run. Method: {run.config.method.name}. Folder: {run.folder.path}",
        sections=tuple(sections),
        notices=(*faults_notice(run), *((PATIENTS,) if has_pictures else ())),
    )


# --- quality -----------------------------------------------------------------------------------


def dice_section(run: RunRecords) -> Section:
    """Validation by round, and the final test by site."""
    lead = (
        "Dice says how well a model's outline overlaps the expert's: 0 is no overlap, 1 a perfect one. While training, "
        "each site scores its model on its own validation cases; a star marks its best round, whose model it keeps. "
        "The final test uses other cases, which decided nothing. 'Before gossip' is the site's own model at the end "
        "of the warm-up, before it had received anything."
    )
    chart = dice_by_round(run)
    blocks: list[Block] = []
    if chart is None:
        blocks.append(Words(("No round has a validation score yet.",)))
    else:
        blocks += [chart, Folded("The numbers behind the lines", tables=(_validation_table(run),))]
    blocks += [_test_table(run)] if run.scores else [Words(("The final test has not run yet.",))]
    return Section("dice", "Dice by round and site", lead, tuple(blocks))


def _validation_table(run: RunRecords) -> Table:
    series = {site: validation_series(run.rounds, site) for site in run.sites}
    numbers = sorted({place for values in series.values() for place in values})
    rows = [(str(place), *(number(series[site].get(place, math.nan)) for site in run.sites)) for place in numbers]
    return Table("Validation Dice", ("round", *run.sites), tuple(rows))


def _test_table(run: RunRecords) -> Table:
    """A row a site, and the mean of sites."""
    means = {model: site_dice(run.scores, model) for model in run.models}
    before, after = means.get(BEFORE_GOSSIP, {}), means.get(PERSONALISED, {})
    unit = run.config.data.distance_unit
    rows = [
        (
            site,
            str(len({score.case for score in run.scores if score.site == site})),
            *(number(means[model].get(site, math.nan)) for model in run.models),
            points(after.get(site, math.nan) - before.get(site, math.nan)),
            number(mean(s.hd95 for s in run.scores if (s.site, s.model) == (site, PERSONALISED)), digits=1),
            number(mean(s.surface_dice for s in run.scores if (s.site, s.model) == (site, PERSONALISED))),
        )
        for site in run.scored_sites
    ]
    if len(rows) > 1:
        overall = [number(mean_over(run.scored_sites, means[model])) for model in run.models]
        rows.append(("mean of sites", "", *overall, points(mean_change(before, after)), "", ""))
    names = [f"Dice, {MODELS[model]}" for model in run.models]
    headings = ("site", "test cases", *names, "change (points)", f"HD95 ({unit})", "surface Dice")
    if BEFORE_GOSSIP not in run.models:  # a column of dashes says nothing
        place = headings.index("change (points)")
        headings = (*headings[:place], *headings[place + 1 :])
        rows = [(*row[:place], *row[place + 1 :]) for row in rows]
    caption = (
        "Final test on each site's own test cases. A Dice point is 0.01. HD95: how far the outlines are apart, all but "
        f"the worst 5 % (in {unit}; smaller is better). Surface Dice: share of the outline within "
        f"{run.config.evaluation.surface_tolerance:g} {unit} of the expert's."
    )
    return Table(caption, headings, tuple(rows))


def cases_section(run: RunRecords) -> Section:
    """Every test case, and classes apart."""
    lead = (
        "Each mark is one patient's case. A wide box or marks far to the left mean that the model is good for some "
        "patients and not for others, which a mean hides. The line in a box is the median, the dashed one the mean."
    )
    chart = case_distribution(run)
    if chart is None:
        return Section("cases", "Case by case", lead, (Words(("The final test has not run yet.",)),))
    blocks: list[Block] = [chart]
    classes = list(dict.fromkeys(score.class_name for score in run.scores))
    if len(classes) > 1 and PERSONALISED in run.models:
        rows = [
            (site, *(number(value) for value in class_means(run.scores, site, PERSONALISED).values()))
            for site in run.scored_sites
        ]
        blocks.append(Table("Test Dice of the personalised model by structure", ("site", *classes), tuple(rows)))
    return Section("cases", "Case by case", lead, tuple(blocks))


def overlays_section(run: RunRecords, *, with_images: bool) -> Section:
    """Best and worst test case of each site, from ``overlays/``."""
    lead = (
        "The site's best and worst test case, in the slice with the most of the structure and the channel in which it "
        "is clearest. Solid line: the expert's outline; dashed line: the model's."
    )
    if not with_images:
        return Section("overlays", "Best and worst cases", lead, (Words(("Left out on request (--no-images).",)),))
    files = sorted((run.folder.path / "overlays").glob("*/*.png"), key=lambda path: (path.parent.name, path.name))
    pictures, unreadable = [], []
    for path in files[:MAX_PICTURES]:
        kind, _, case = path.stem.partition("_")
        site = path.parent.name
        dice = _dice_of_picture(run, site, case)
        title = f"{site}, {kind} case: {case} (Dice {number(dice)})"
        try:
            pictures.append(Picture(title, f"Outlines on the image. {title}", picture_uri(path)))
        except OSError as error:
            unreadable.append(f"{path.name}: {error}")
    blocks: list[Block] = [Pictures(tuple(pictures))] if pictures else []
    if len(files) > MAX_PICTURES:
        blocks.append(Words((f"The first {MAX_PICTURES} of {len(files)}; the others lie in the folder overlays.",)))
    if unreadable:
        blocks.append(Words(("Pictures that cannot be read: " + "; ".join(unreadable),), is_warning=True))
    if not files:
        blocks.append(Words((
            "There is no picture in this run folder. They are drawn at the final test, on each site's own disk, unless "
            "output.num_overlays is 0.",
        )))  # fmt: skip
    return Section("overlays", "Best and worst cases", lead, tuple(blocks))


def _dice_of_picture(run: RunRecords, site: str, case: str) -> float:
    """The Dice of a picture's case; with pooled training its name begins with the site that the case comes from."""
    if site != POOLED:
        return case_dice(run.scores, site, PERSONALISED).get(case, math.nan)
    by_name = {f"{score.site}_{score.case}": (score.site, score.case) for score in run.scores}
    owner, name = by_name.get(case, ("", ""))
    return case_dice(run.scores, owner, PERSONALISED).get(name, math.nan)


# --- cost, failures, configuration -------------------------------------------------------------


def time_section(run: RunRecords) -> Section:
    """Where the time went."""
    lead = (
        "Sites wait for each other at the end of each round: a site that waits long could do more, the one that never "
        "waits sets the pace."
    )
    if run.config.federation.mode == "async":
        lead = "Sites do not wait for each other here: what is left of a site's time is sending and starting."
    charts = [chart for chart in (time_by_stage(run), time_by_round(run)) if chart is not None]
    return Section("time", "Time by stage", lead, tuple(charts) or (Words(("No round is finished yet.",)),))


def failures_section(run: RunRecords) -> Section:
    """Dropped sites, calls that failed, sites that were late, pushes that were refused."""
    dropped = run.state.dropped if run.state else {}
    failures = [failure for record in run.rounds for failure in record.failures]
    refused = [push for record in run.rounds for push in record.pushes if not push.accepted]
    blocks: list[Block] = []
    if dropped:
        lines = tuple(
            f"{site} left the run and its later rounds were without it: {why}" for site, why in dropped.items()
        )
        blocks.append(Words(lines, is_warning=True))
    if failures:
        rows = tuple(
            (str(f.round_number), f.site, f.stage, FAILURES[f.kind], f"{f.error_type} {f.message}".strip())
            for f in failures
        )
        caption = f"{count(len(failures), 'call')} to a site that did not succeed; the run went on without its answer"
        blocks += _long_table(caption, ("round", "site", "while", "what happened", "message"), rows)
        traces = [f"{f.site}, round {f.round_number}\n{f.traceback}" for f in failures if f.traceback]
        blocks += [Folded("Tracebacks", "\n\n".join(traces[:20]))] if traces else []
    late = sorted(Counter(site for record in run.rounds for site in record.late).items())
    if late:
        blocks.append(
            Words(tuple(f"{site} was late in {count(n, 'round')}: nobody waited for it." for site, n in late))
        )
    left_out = sorted(Counter(site for record in run.rounds for site in record.left_out).items())
    if left_out:
        words = "{} was left out of {} while it was being restarted or still busy with an earlier one."
        blocks.append(Words(tuple(words.format(site, count(n, "round")) for site, n in left_out)))
    if refused:
        refusals = tuple((str(p.round_number), p.sender, p.receiver, p.reason) for p in refused)
        caption = f"{count(len(refused), 'push', 'pushes')} refused by the receiver"
        blocks += _long_table(caption, ("round", "sender", "receiver", "reason"), refusals)
    rejected = tuple(
        (str(report.round_number), each.sender, report.site, each.reason)
        for record in run.rounds
        for report in record.trained
        for each in report.judged
        if not each.accepted
    )
    if rejected:
        caption = f"{count(len(rejected), 'model')} that arrived, but did not pass the receiver's own check"
        blocks += _long_table(caption, ("round", "sender", "receiver", "reason"), rejected)
    if not blocks:
        blocks.append(Words(("No site failed, none was dropped, no model was refused.",)))
    return Section("failures", "Failures", "", tuple(blocks))


def _long_table(caption: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[Block]:
    """A table of words, cut where a page would not end."""
    blocks: list[Block] = [Table(caption, headings, tuple(rows[:MAX_ROWS]), num_names=len(headings))]
    if len(rows) > MAX_ROWS:
        blocks.append(Words((f"The first {MAX_ROWS} of {len(rows)}; all are in rounds.jsonl.",)))
    return blocks


def config_section(run: RunRecords) -> Section:
    """The settings that matter in words, and the whole file."""
    config = run.config
    federation = config.federation
    rows = (
        ("method", config.method.name, explained(config.method)),
        (
            "rounds",
            str(federation.rounds),
            f"{federation.num_warmup} of warm-up, {federation.num_cooldown} of cool-down",
        ),
        ("steps a round", str(federation.local_steps), "optimiser steps of each site in each round"),
        ("network", config.network.name, "of every site" if not config.site_networks else "of most sites"),
        ("structures", ", ".join(config.data.foreground_names), "what is outlined"),
        ("images", ", ".join(config.data.channels), "channels of each case"),
        (
            "learning rate",
            f"{config.optimiser.learning_rate:g}",
            f"{config.optimiser.name}, {config.optimiser.schedule}",
        ),
        ("seed", str(federation.seed), "of everything that is random"),
        ("identity", config.identity, "equal for runs whose settings decide the same result"),
    )
    blocks = (
        Table("", ("setting", "value", "meaning"), rows, num_names=3),
        Folded("The whole configuration (config.yaml)", text_without_secrets(run.folder.config_file)),
    )
    return Section("config", "Configuration", "", blocks)


def text_without_secrets(path: Path) -> str:
    """A text file to show, see :func:`gcml_ray.wording.without_secrets`."""
    return without_secrets(path.read_text(encoding="utf-8", errors="replace"))
