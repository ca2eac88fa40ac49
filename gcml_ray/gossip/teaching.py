"""Who taught whom: how a receiver's validation Dice changed over the rounds in which it trained with a sender's push.

A change is never the sender's doing alone: the receiver's own steps are in it, and the noise of a small validation
set. So it is a hint for drawing partners and for a plot, not a measure of a model's worth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from gcml_ray.config import UsefulnessTopology
from gcml_ray.records import Edge, RoundRecord


def gains_by_edge(rounds: Sequence[RoundRecord]) -> dict[Edge, tuple[float, ...]]:
    """The changes of validation Dice that went with each edge's pushes, oldest first, edges in order.

    For each validated round: the receiver's validation Dice minus that of its previous validated round, noted for
    each push that it trained with since then (with ``federation.evaluate_every: 1``: in this round). Before a site's
    first score there is nothing to compare with, and its pushes are not noted. With a server the sender is the server.

    Args:
        rounds: finished rounds, oldest first.
    """
    gains: dict[Edge, list[float]] = {}
    before: dict[str, float] = {}
    since: dict[str, list[str]] = {}  # senders of the pushes that no score has told of yet
    for record in rounds:
        for report in record.trained:
            since.setdefault(report.site, []).extend(report.peers)
            dice = report.validation_dice
            if dice is None or not math.isfinite(dice):
                continue
            if report.site in before:
                for sender in since[report.site]:
                    gains.setdefault(Edge(sender, report.site), []).append(dice - before[report.site])
            before[report.site] = dice
            since[report.site] = []
    return {edge: tuple(values) for edge, values in sorted(gains.items())}


def mean_gains(rounds: Sequence[RoundRecord]) -> dict[Edge, float]:
    """The mean of :func:`gains_by_edge` for each edge."""
    return {edge: fmean(values) for edge, values in gains_by_edge(rounds).items()}


def usefulness_weights(
    rounds: Sequence[RoundRecord], topology: UsefulnessTopology, sites: Collection[str]
) -> dict[Edge, float]:
    """Relative chances of edges for ``gossip.plan_round``, from the past alone: a resumed run draws the same.

    A sender with n others to send to picks receiver r with probability
    ``(1 - exploration) softmax_r(gain_r / temperature) + exploration / n``, gain_r being the mean gain at r with its
    pushes; a receiver that it has not taught yet counts with the mean over those that it has. Our own rule
    (docs/method.md, Topologies). What is returned is that probability over the one of a receiver not taught yet, so
    that an edge that is not named has weight 1.

    Args:
        rounds: finished rounds, oldest first (the driver's last fifty).
        topology: temperature (in Dice) and exploration.
        sites: among whom the graph will be drawn.
    """
    by_sender: dict[str, dict[str, float]] = {}
    for edge, gain in mean_gains(rounds).items():
        if edge.sender in sites and edge.receiver in sites:
            by_sender.setdefault(edge.sender, {})[edge.receiver] = gain
    return {
        Edge(sender, receiver): weight
        for sender, gains in by_sender.items()
        for receiver, weight in _relative_chances(gains, len(sites) - 1, topology).items()
    }


def _relative_chances(gains: Mapping[str, float], num_others: int, topology: UsefulnessTopology) -> dict[str, float]:
    """One sender's weights by receiver; a receiver that is not in ``gains`` has weight 1."""
    offset = fmean(gains.values())
    highest = max(max(gains.values()) - offset, 0.0) / topology.temperature  # so that nothing overflows
    powers = {receiver: math.exp((gain - offset) / topology.temperature - highest) for receiver, gain in gains.items()}
    unknown = math.exp(-highest)
    total = sum(powers.values()) + (num_others - len(gains)) * unknown

    def chance(power: float) -> float:
        return (1 - topology.exploration) * power / total + topology.exploration / num_others

    return {receiver: chance(power) / chance(unknown) for receiver, power in powers.items()}
