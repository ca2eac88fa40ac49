"""What the roster writes down: a site that takes part, a call that is open, a site that is being started."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from actors.failure_policy import Decision, History, decide
from actors.pace import CallKind
from gcml_ray.config import SERVER
from gcml_ray.records import Peer, SiteFailure, SiteInfo

FIRST_PAUSE_S = 0.5  # before the second attempt; each pause is twice the one before, up to the longest
LONGEST_PAUSE_S = 8.0
START_PAUSES_S = (1.0, 4.0)  # of a run, before a site whose process was lost at its start is asked again
LEAST_START_S = 5.0  # for the last attempt, however little time is left: its answer says why there is none


@dataclass
class Member:
    """What the driver knows of one site, or of the server."""

    info: SiteInfo
    history: History = field(default_factory=History)
    checkpoint_round: int = 0

    def failed(self, failure: SiteFailure) -> Decision:
        """Counts a failure, unless another site of its process has caused it; returns what to do about it."""
        if failure.culprit:
            return Decision.RESTART
        decision = decide(failure, self.history)
        row, restarts = self.history.failures_in_a_row + 1, self.history.restarts
        self.history = History(row, restarts + (decision is Decision.RESTART))
        return decision

    def is_in_process_of(self, info: SiteInfo) -> bool:
        """Whether a start was answered by the process known so far; never by the driver's, which makes sites anew."""
        return info.pid != os.getpid() and (info.node, info.pid) == (self.info.node, self.info.pid)


def peer_of(info: SiteInfo, incarnation: int) -> Peer:
    """What the others are told of a site, or of the server, which has no training cases."""
    return Peer(info.public_key, None if info.site == SERVER else info.num_train, incarnation)


@dataclass(frozen=True)
class OpenCall:
    """A call that was not answered yet."""

    number: int
    kind: CallKind
    began: float
    deadline: float
    timeout_s: float


@dataclass(frozen=True)
class Absence:
    """A site that is being started.

    ``number`` is the round in which that began. ``retry_at`` is None while it is asked to start, else the time at which
    it will be asked again. ``stays``: after the last round, when a site that does not come back is not dropped.
    """

    number: int
    deadline: float
    attempts: int = 1
    retry_at: float | None = None
    stays: bool = False

    def next_attempt(self, now: float) -> Absence | None:
        """Schedules the next attempt to start; None after the deadline.

        After a restart calls may go to the process that is ending, or find none yet: on a busy machine for a while, and
        where its node is lost until that is back.
        """
        if now >= self.deadline:
            return None
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self.attempts - 1, 10))
        return replace(self, attempts=self.attempts + 1, retry_at=min(now + pause_s, self.deadline))
