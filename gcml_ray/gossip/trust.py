"""What the receivers' judgements make of the next graphs: a peer whose pushes are refused may push less often.

A pure function of the rounds' records, so a resumed run trusts as one that never stopped. Only what a receiver
has measured counts: a push that was refused unopened may bear a name that is not its sender's.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcml_ray.records import Edge, RoundRecord

REFUSED = 0.5  # the chance of this sender at this receiver is halved
REFUSED_ELSEWHERE = 0.9  # and a little lower at all others
ACCEPTED = 1.25  # three good pushes make up for a bad one
ACCEPTED_ELSEWHERE = 1.05
FLOOR = 1 / 32  # never nothing: a mistaken refusal can only heal where pushes still come


def trust_of_edges(rounds: Sequence[RoundRecord]) -> dict[Edge, float]:
    """How likely an edge is to take place once it is drawn, ``FLOOR`` to 1; edges that are not named have 1.

    Args:
        rounds: finished rounds, oldest first (the driver's last fifty).
    """
    weights: dict[Edge, float] = {}
    refused: set[str] = set()  # senders; only their weights can be below 1
    sites = sorted({site for record in rounds for site in record.plan.sites})
    for record in rounds:
        for report in record.trained:
            for judgement in report.judged:
                if not judgement.accepted:
                    refused.add(judgement.sender)
                elif judgement.sender not in refused:
                    continue
                here, elsewhere = (ACCEPTED, ACCEPTED_ELSEWHERE) if judgement.accepted else (REFUSED, REFUSED_ELSEWHERE)
                for receiver in sites:
                    if receiver != judgement.sender:
                        edge = Edge(judgement.sender, receiver)
                        factor = here if receiver == report.site else elsewhere
                        weights[edge] = min(1.0, max(FLOOR, weights.get(edge, 1.0) * factor))
    return {edge: weight for edge, weight in weights.items() if weight < 1}


def judged_counts(rounds: Sequence[RoundRecord]) -> tuple[int, int]:
    """How many incoming models receivers have judged, and how many of them they did not let in."""
    judged = [each for record in rounds for report in record.trained for each in report.judged]
    return len(judged), sum(not each.accepted for each in judged)
