"""Whether a run's sites have had the rounds that those of other runs had: else it is no equal in a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gcml_ray.config import SERVER
from gcml_ray.records import RoundRecord

MOST_MISSED = 0.1  # of its rounds; a site that misses more has had clearly fewer steps than those of other methods


def who_missed_rounds(rounds: Sequence[RoundRecord], *, mode: str) -> str:
    """The sites, and the server, that failed in more than a tenth of the rounds, with the reasons; empty for none.

    Nobody has missed a round who was late in it. Without a barrier a round that failed is done again.
    """
    if mode == "async":
        return ""
    missed = Counter(
        site
        for record in rounds
        for site in {*record.plan.sites, *record.left_out}
        if record.missed(site) and record.left_out.get(site) != "busy"
    )
    missed[SERVER] = sum(any(failure.site == SERVER for failure in record.failures) for record in rounds)
    most = {site: number for site, number in sorted(missed.items()) if number > MOST_MISSED * len(rounds)}
    if not most:
        return ""
    failures = [failure for record in rounds for failure in record.failures if failure.site in most]
    why = "; ".join(dict.fromkeys(failure.words for failure in failures[:3])) or "see its log.txt"
    of = ", ".join(f"{name} missed {number} of {len(rounds)} rounds" for name, number in most.items())
    return f"{of} ({why})"
