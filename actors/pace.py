"""How long calls take: what is late, and what must have gone wrong, are judged by what was seen before."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from gcml_ray.config import FederationConfig

REMEMBERED = 5  # calls of a kind; the slowest of them counts as typical, so that jitter is not lateness
LEAST_TIMEOUT_S = 60.0  # however fast a call was before, it is not given up earlier
LEAST_ASYNC_PUSH_S = 10.0  # without a barrier: a sender that waits for one receiver longer sends nothing to the others
GRACE_S = 10.0  # however short a round is, nobody is late by less


@dataclass(frozen=True)
class CallKind:
    """Calls that take about as long: a stage, with validation or without, with a peer's model or without."""

    stage: str
    evaluates: bool = False
    has_incoming: bool = False


@dataclass
class Pace:
    """Remembers how long each site took for each kind of call.

    Args:
        timeout_factor: how many times its typical time a call may take before it is given up.
        late_factor: how many times its typical time the others wait for a call; None: until the timeout.
        least_push_s: a push is not given up earlier, however fast those before were.
    """

    timeout_factor: float
    late_factor: float | None
    least_push_s: float = LEAST_TIMEOUT_S
    _seen: dict[tuple[str, CallKind], deque[float]] = field(default_factory=dict)

    @staticmethod
    def of(federation: FederationConfig) -> Pace:
        """As the configuration says."""
        least_push_s = LEAST_ASYNC_PUSH_S if federation.mode == "async" else LEAST_TIMEOUT_S
        return Pace(federation.timeout_factor, federation.late_factor, least_push_s)

    def note(self, site: str, kind: CallKind, seconds: float) -> None:
        """A call was answered after so many seconds."""
        self._seen.setdefault((site, kind), deque(maxlen=REMEMBERED)).append(seconds)

    def forget(self, site: str) -> None:
        """A site has a new process, maybe on another machine."""
        self._seen = {key: times for key, times in self._seen.items() if key[0] != site}

    def typical_s(self, site: str, kind: CallKind) -> float | None:
        """The slowest of the last calls of this kind; None before the first."""
        times = self._seen.get((site, kind))
        return max(times) if times else None

    def timeout_s(self, site: str, kind: CallKind, *, limit_s: float) -> float:
        """After how long a call is given up: the configured limit, or earlier where experience says so."""
        typical = self.typical_s(site, kind)
        if typical is None:
            return limit_s
        least_s = self.least_push_s if kind.stage == "push" else LEAST_TIMEOUT_S
        return min(limit_s, max(least_s, self.timeout_factor * typical))

    def patience_s(self, calls: dict[str, CallKind]) -> float | None:
        """How long the others wait for these calls, by site; None: until their timeouts.

        Nobody is late before every one of these calls has been seen once.
        """
        typical = [self.typical_s(site, kind) for site, kind in calls.items()]
        known = [seconds for seconds in typical if seconds is not None]
        if self.late_factor is None or len(known) < len(typical) or not known:
            return None
        return max(self.late_factor * max(known), max(known) + GRACE_S)
