"""The sections on what sites gave each other: pushes, who taught whom, models at other sites, regions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from gcml_ray.config import POOLED, has_server
from gcml_ray.errors import GcmlError
from gcml_ray.gossip.teaching import gains_by_edge
from gcml_ray.prediction.averages import cross_site_dice, mean
from gcml_ray.report.page.gossip_charts import (
    MAX_FRAMES,
    cross_site_map,
    gain_map,
    gossip_graph,
    push_map,
    traffic_by_round,
)
from gcml_ray.report.page.parts import Block, Picture, Pictures, Section, Words, picture_uri
from gcml_ray.report.page.records import RunRecords
from gcml_ray.report.page.run_charts import region_shares
from gcml_ray.report.words import natural_order, points
from gcml_ray.wording import count

LEAST_GAIN = 0.0005  # of Dice: what rounds to a tenth of a point


def gossip_section(run: RunRecords) -> Section:
    """The graph over time, with traffic."""
    lead = (
        "A push is one site sending its model's weights to another; images and labels never leave a site. Arrows are "
        "as wide as what was sent; an orange arrow with a cross was refused. Move the slider to see one round."
    )
    title = "Who sent to whom"
    if not any(record.pushes for record in run.rounds):
        return Section("gossip", title, "", (Words((_why_no_push(run),)),))
    blocks: list[Block] = [gossip_graph(run), push_map(run), traffic_by_round(run.rounds)]
    if sum(bool(record.pushes) for record in run.rounds) > MAX_FRAMES:
        blocks.insert(1, Words((f"The slider holds the first {MAX_FRAMES} rounds with pushes.",)))
    behind = [rounds for record in run.rounds for report in record.trained for rounds in report.staleness]
    if behind:
        words = f"Models that sites learned from were {mean(behind):.1f} rounds old on average, at most {max(behind)}."
        blocks.insert(0, Words((words,)))
    if has_server(run.config.method):
        lead = lead.replace("to another", "to the server, or the server sending their mean back")
    return Section("gossip", title, lead, tuple(blocks))


def _why_no_push(run: RunRecords) -> str:
    method = run.config.method.name
    if method == POOLED:
        return "Nothing was sent: this method trains one model on the cases of all sites together, as an upper bound."
    if method == "local":
        return "Nothing was sent: with this method every site trains alone."
    return "Nothing has been sent yet: no round with an exchange is finished, or only one site takes part."


def teaching_section(run: RunRecords) -> Section:
    """Gain per pair."""
    title = "Who taught whom"
    lead = (
        "How the receiver's validation Dice changed over the rounds in which it trained with this sender's push. It is "
        "a hint, not a proof: the receiver's own training and the chance of few validation cases are in it too."
    )
    gains = gains_by_edge(run.rounds)
    if not gains:
        why = "There is no round in which a site trained with a push and was validated before and after."
        return Section("teaching", title, "", (Words((why,)),))
    ordered = sorted(gains, key=lambda edge: -mean(gains[edge]))
    best, last = ordered[0], ordered[-1]
    lines = [
        f"Largest mean change: {best.receiver} with pushes from {best.sender}, {points(mean(gains[best]))} points "
        f"({count(len(gains[best]), 'time')})."
    ]
    if last != best:
        lines.append(
            f"Smallest: {last.receiver} with pushes from {last.sender}, {points(mean(gains[last]))} points "
            f"({count(len(gains[last]), 'time')})."
        )
    return Section("teaching", title, lead, (Words(tuple(lines)), gain_map(gains)))


def cross_site_section(runs: Sequence[RunRecords], *, which: str = "") -> tuple[Section, ...]:
    """Every site's model at every site, mean over the runs (seeds of one method); none without such a test.

    ``which`` begins its text: of what the runs are.
    """
    dice = cross_site_dice([run.folder.cross_site() for run in runs])
    if not dice:
        return ()
    lead = (
        f"{which}Each site's personalised model on the test cases of every site: the models travelled, the images did "
        "not. Below each Dice stands how many points the model is above or below that of the site where it was "
        "tested. These are test cases: choosing another site's model by them would flatter it."
    )
    better = []
    for site in natural_order({site for _, site in dice}):
        own = dice.get((site, site), math.nan)
        value, owner = max((value, owner) for (owner, where), value in dice.items() if where == site)
        if value - own >= LEAST_GAIN:
            better.append(f"At {site} the model of {owner} is {100 * (value - own):.1f} points above {site}'s own.")
    words = Words(tuple(better) or ("At no site does another site's model do better than the site's own.",))
    return (Section("cross_site", "Every model at every site", lead, (words, cross_site_map(dice))),)


def regions_section(run: RunRecords, *, with_picture: bool) -> Section:
    """What mutual learning compares: shares by round, and an example."""
    title = "Where two models agree (DCML regions)"
    lead = (
        "In mutual learning a site compares its model with a peer's, voxel by voxel, wherever the expert or one of the "
        "two models sees a structure (the region called Omega). Where the peer is right, the site's model is pulled "
        "towards it (R+); where the peer is wrong, it is pushed away (R\u2212)."
    )
    chart = region_shares(run)
    if chart is None:
        why = "This run had no round of mutual learning, so there are no such regions."
        return Section("regions", title, "", (Words((why,)),))
    blocks: list[Block] = [chart]
    if with_picture:
        blocks.append(_regions_example(run))
    return Section("regions", title, lead, tuple(blocks))


def _regions_example(run: RunRecords) -> Block:
    """A picture; where models or images do not lie here, the reason."""
    from gcml_ray.report.regions import draw_regions  # noqa: PLC0415 - torch, and only where a picture is wanted

    try:
        example = draw_regions(run.folder.path, run.config, run.rounds)
    except GcmlError as error:
        return Words((f"There is no example picture: {error}",))
    return Pictures((Picture(example.title, example.words, picture_uri(io.BytesIO(example.png))),), is_wide=True)
