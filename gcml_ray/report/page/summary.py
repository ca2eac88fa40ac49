"""The first section of a run's page: what was done and what came of it, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gcml_ray.config import POOLED, Method, has_peers, has_server
from gcml_ray.gossip.trust import judged_counts
from gcml_ray.prediction.averages import case_dice, mean, mean_change
from gcml_ray.records import BEFORE_GOSSIP, PERSONALISED
from gcml_ray.report.page.parts import Block, Figures, Section, Words
from gcml_ray.report.page.records import RunRecords, site_dice
from gcml_ray.report.page.run_charts import describe_phases
from gcml_ray.report.words import megabytes, points
from gcml_ray.wording import count, duration, in_shell, number, some

METHODS = {
    "local": "every site trains alone",
    "pooled": "one model on the cases of all sites, brought together for comparison",
    "gossip_avg": "sites average their weights with those that peers send",
    "gml": "sites learn from peers' models where the expert marked the structure",
    "gcml": "sites learn from peers' models: pulled towards a peer where it is right, pushed away where it is wrong",
    "defkt": "sites learn from a peer's model, which then replaces their own",
    "dpsgd": "sites mix their weights with their neighbours' in every round",
    "proxyfl": "each site keeps a private model and hands on a second one; the two learn from each other",
    "fedavg": "a server averages the weights of all sites",
    "fedprox": "a server averages the weights of all sites, which are held near the average while they train",
    "fedbn": "a server averages the weights of all sites, except the normalisation layers",
    "ditto": "a server averages a shared model, and each site keeps a personal one near it",
}
STATUS = {
    "running": "The run is going on, or was cut off without notice",
    "stopped": "The run was stopped",
    "finished": "The run is finished",
    "failed": "The run failed, as every site was lost",
}


def summary_section(run: RunRecords) -> Section:
    """Figures first, then sentences."""
    blocks: list[Block] = [Figures(_figures(run)), Words((_what(run), _progress(run)))]
    is_finished = run.state is not None and run.state.status == "finished"
    if not is_finished:
        hint = f"This run is not finished. Continue it with: gcml run --resume {in_shell(run.folder.path)}"
        blocks.append(Words((hint,), is_warning=True))
    lines = (*_quality(run), *_exchange(run), *_privacy(run), *_trouble(run))
    blocks.append(Words(lines, is_list=True))
    return Section("summary", "Summary", "", tuple(blocks))


def _figures(run: RunRecords) -> tuple[tuple[str, str], ...]:
    dice = site_dice(run.scores, _main_model(run))
    sent = sum(push.size_bytes for record in run.rounds for push in record.pushes if push.accepted)
    shown = [
        (str(len(run.scored_sites or run.sites)), "sites" if len(run.scored_sites or run.sites) != 1 else "site"),
        (f"{run.rounds_done} of {run.config.federation.rounds}", "rounds done"),
    ]
    if dice:
        worst = min(dice, key=lambda site: dice[site])
        shown.append((number(mean(dice.values())), "mean test Dice of sites"))
        shown += [(number(dice[worst]), f"lowest site ({worst})")] if len(dice) > 1 else []
    shown.append((megabytes(sent) if sent else "none", "sent between sites"))
    shown.append((duration(sum(record.seconds for record in run.rounds)), "for all rounds"))
    return tuple(shown)


def _main_model(run: RunRecords) -> str:
    return PERSONALISED if PERSONALISED in run.models or not run.models else run.models[-1]


def explained(method: Method) -> str:
    """A method in a few words; of one that was added, the first line of its section's docstring."""
    own_words = (type(method).__doc__ or "a method of its own").strip()  # not those of the section above it
    return METHODS.get(method.name) or own_words.splitlines()[0]


def _what(run: RunRecords) -> str:
    name = run.config.method.name
    structures = in_words(run.config.data.foreground_names)
    if name == POOLED:
        sites = run.scored_sites
        return f"One model was trained to outline {structures} on the cases of all {len(sites) or ''} sites ({name})."
    if len(run.sites) < 2:
        who = f"One site ({run.sites[0]})" if run.sites else "Sites"
        return f"{who} trained a model to outline {structures} ({name}: {explained(run.config.method)})."
    each = f"{len(run.sites)} sites ({in_words(run.sites)})"
    return f"{each} each trained a model of their own to outline {structures} ({name}: {explained(run.config.method)})."


def _progress(run: RunRecords) -> str:
    total = run.config.federation.rounds
    if not run.rounds:
        return f"No round of {total} has ended yet."
    status = STATUS[run.state.status] if run.state else "Whether the run goes on is not known"
    if run.config.federation.mode == "async":
        return f"{status}: the slowest site has done {run.rounds_done} of {total} rounds."
    return f"{status}: {run.rounds_done} of {total} rounds are done ({describe_phases(run.rounds)})."


def _quality(run: RunRecords) -> list[str]:
    """Test Dice in words."""
    model = _main_model(run)
    dice = site_dice(run.scores, model)
    if not dice:
        return ["The final test has not run yet, so nothing can be said about unseen cases."]
    ordered = sorted(dice, key=lambda site: dice[site])
    num_cases = len({(score.site, score.case) for score in run.scores})
    lines = [
        f"On {count(num_cases, 'test case')}, kept aside until the end, the mean Dice of the sites is "
        f"{number(mean(dice.values()))} (1 is a perfect overlap with the expert's outline)."
    ]
    if len(ordered) > 1:
        lines.append(
            f"Best site: {ordered[-1]} with {number(dice[ordered[-1]])}. Lowest: {ordered[0]} with "
            f"{number(dice[ordered[0]])}."
        )
    before = site_dice(run.scores, BEFORE_GOSSIP)
    if before and model == PERSONALISED:
        both = [site for site in dice if site in before]
        better = [site for site in both if dice[site] > before[site]]
        change = mean_change(before, dice)
        lines.append(
            f"Since the end of the warm-up the mean changed by {points(change)} Dice points, and {len(better)} of "
            f"{count(len(both), 'site')} got better. Further training alone gives a part of that: to see what exchange "
            "gives, compare with the same sites trained alone."
        )
    failed = [value for site in dice for value in case_dice(run.scores, site, model).values() if value < 0.1]
    if failed:
        missed = f"In {count(len(failed), 'case')} of {num_cases} the model missed the structure (Dice below 0.1)"
        lines.append(f"{missed}: see the worst cases.")
    return lines


def _exchange(run: RunRecords) -> list[str]:
    """Traffic in words."""
    taken = [push for record in run.rounds for push in record.pushes if push.accepted]
    size = megabytes(sum(push.size_bytes for push in taken))
    if taken and has_server(run.config.method):
        return [f"Sites and server sent {len(taken)} models, {size} in all. Images and labels never left a site."]
    if taken:
        return [f"Sites sent {len(taken)} models to each other, {size} in all. Images and labels never left a site."]
    if run.config.method.name == POOLED:
        return ["The cases of all sites were brought together: this is a bound to compare with, not a federation."]
    return ["No model was sent."] if has_peers(run.config.method) else []


def _privacy(run: RunRecords) -> list[str]:
    """What was spent of the privacy budget, in words."""
    spent = {
        report.site: report.privacy_epsilon
        for record in run.rounds
        for report in record.trained
        if report.privacy_epsilon is not None
    }
    if not spent:
        return []
    most = max(spent, key=lambda site: spent[site])
    if math.isinf(spent[most]):
        return [f"Training was set to be private, but without noise: {most} has no privacy guarantee."]
    delta = f" at delta {run.config.privacy.delta:g}" if run.config.privacy.delta else ""
    words = f"Differential privacy: at most epsilon {number(spent[most])}{delta} was spent ({most})"
    return [f"{words}; a smaller epsilon protects patients better."]


def _trouble(run: RunRecords) -> list[str]:
    """Failures in words."""
    failures = sum(len(record.failures) for record in run.rounds)
    refused = sum(not push.accepted for record in run.rounds for push in record.pushes)
    num_judged, num_rejected = judged_counts(run.rounds)
    dropped = run.state.dropped if run.state else {}
    if not (failures or refused or num_rejected or dropped):
        checked = f" ({num_judged} passed their receiver's own check)" if num_judged else ""
        return [f"No site failed and no model was refused{checked}."]
    parts = []
    if failures:
        parts.append(f"{count(failures, 'call')} to sites failed")
    if refused:
        parts.append(f"{count(refused, 'push was', 'pushes were')} refused on arrival")
    if num_rejected:
        parts.append(f"{num_rejected} of {count(num_judged, 'model')} did not pass the receiver's own check")
    if dropped:
        parts.append(f"{in_words(sorted(dropped))} had to be dropped")
    return [f"{'; '.join(parts)}: see Failures."]


def in_words(names: Sequence[str], *, most: int = 12) -> str:
    """``A, B and C``; after ``most`` names a count."""
    if len(names) > most:
        return some(names, most)
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "nothing"
