"""What to do about a site that failed: a pure function of the failure and the site's history; errors that end a run."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gcml_ray.errors import ClusterError, SiteError
from gcml_ray.records import SiteFailure
from gcml_ray.wording import in_shell

MAX_FAILURES_IN_A_ROW = 3
MAX_RESTARTS = 3
GPU_LOST = re.compile(r"\b(CUDA|HIP|cuDNN|MIOpen) error")  # every later call to the GPU in this process fails too


class Decision(enum.Enum):
    """What the driver does next."""

    SKIP = "skip"
    """Leave the site out of this round and ask it again in the next."""
    RESTART = "restart"
    """New process, restored from the site's newest checkpoint; it rejoins in the next round."""
    DROP = "drop"
    """Go on without it."""


@dataclass(frozen=True)
class History:
    """A site's failures so far: in a row since its last good round, and restarts over the whole run."""

    failures_in_a_row: int = 0
    restarts: int = 0


def decide(failure: SiteFailure, history: History) -> Decision:
    """The rule: one site never stops the others. A site that cannot start at the run's start never gets here.

    Args:
        failure: what happened, after the start.
        history: the site's failures before this one.
    """
    if history.failures_in_a_row + 1 >= MAX_FAILURES_IN_A_ROW:
        return Decision.DROP
    if failure.kind == "raised" and not GPU_LOST.search(failure.message):
        return Decision.SKIP
    return Decision.DROP if history.restarts >= MAX_RESTARTS else Decision.RESTART


def start_error(failures: Sequence[SiteFailure]) -> SiteError:
    """One error for all sites that could not start, in their own words; sites that say the same share a line."""
    if len(failures) == 1:
        return SiteError(failures[0].site, 0, "start", failures[0].words)
    sites: dict[str, list[str]] = {}
    for failure in failures:
        sites.setdefault(failure.words.removeprefix(f"site {failure.site}: "), []).append(failure.site)
    lines = [f"site {', '.join(names)}: {words}" for words, names in sites.items()]
    return SiteError(", ".join(failure.site for failure in failures), 0, "start", "\n".join(["cannot start", *lines]))


def server_error(reason: str, folder: str) -> ClusterError:
    """The end of a run that has lost its server, and how it goes on; ``folder``: the run's."""
    return ClusterError(f"the server is lost ({reason}): go on with gcml run --resume {in_shell(folder)}")
