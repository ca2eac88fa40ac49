"""What the driver knows of the sites: :class:`SitePool`, by name and by call, whatever they run in.

:class:`actors.local_pool.LocalPool` has them in this process, :class:`actors.ray_pool.RayPool` as Ray actors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gcml_ray.push.wire import UNREACHABLE, PushHeader
from gcml_ray.records import Peer, PushReceipt, PushReport, SiteFailure, SiteStatus
from gcml_ray.wording import NO_PROCESS

LONGEST_WORDS, LONGEST_TRACE = 2000, 20_000  # characters kept of an error


class SiteDiedError(Exception):
    """Stands for the end of a site's process where it has none of its own."""


class SiteHungError(Exception):
    """Stands for a site that never answers, where waiting for it would stop all others."""


def no_answer(timeout_s: float, *, has_process: bool) -> str:
    """What is said of a site that has not answered in time."""
    silence = f"no answer within {timeout_s:.3g} s"
    return silence if has_process else f"{silence}: it has {NO_PROCESS}"


def refused(header: PushHeader, receiver: str, reason: str, size_bytes: int) -> PushReceipt:
    """The receipt of a push that its receiver has not taken, or has not answered."""
    return PushReceipt(header.round_number, header.sender, receiver, False, reason, size_bytes)


def words_of(error: BaseException) -> str:
    """What an error says, cut where it is very long; its type where it says nothing, or cannot."""
    try:
        words = str(error)
    except Exception:  # of somebody's own error class
        words = ""
    if len(words) > LONGEST_WORDS:
        return f"{words[:LONGEST_WORDS]}... ({len(words):,} characters in all)"
    return words or type(error).__name__


def end_of(trace: str) -> str:
    """The end of a traceback, which says what it was; whole where it is not very long."""
    return trace[-LONGEST_TRACE:]


def collateral_failure(failure: SiteFailure, *, site: str, stage: str, round_number: int) -> SiteFailure:
    """Failure of a call lost because another site of the same process failed."""
    message = f"its process ends with what {failure.site} was doing"
    return SiteFailure(site, round_number, stage, "unreachable", message, culprit=failure.site)


@dataclass(frozen=True)
class Outcome:
    """How one call to a site ended: ``result`` is a record, or ``failure`` says why there is none."""

    site: str
    method: str
    result: Any = None
    failure: SiteFailure | None = None

    @property
    def is_usual(self) -> bool:
        """Whether its time says how long such calls take: no failure, nor a push that waited for a receiver in vain."""
        pushes = self.result.receipts if isinstance(self.result, PushReport) else ()
        return self.failure is None and not any(push.reason.startswith(UNREACHABLE) for push in pushes)


class SitePool(Protocol):
    """Sites by name, and calls to them. Calls to one site run in order; sites run independently.

    ``is_parallel``: whether all sites work at the same time; where they do not, their times add up.
    """

    is_parallel: bool

    def launch(self, sites: Sequence[str]) -> None:
        """Creates the sites. Raises ClusterError where they do not fit."""
        ...

    def start(self, site: str, *, resume_round: int) -> None:
        """Submits a site's ``start``, which loads its data and model."""
        ...

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        """Submits a call; its outcome comes from :meth:`wait`."""
        ...

    def introduce(self, sites: Sequence[str], peers: Mapping[str, Peer]) -> None:
        """Submits every site's ``register``: who takes part, how to reach them, and what to know of each."""
        ...

    def add(self, site: str) -> None:
        """Creates one more site; :meth:`start` is for the caller."""
        ...

    def mates(self, site: str) -> tuple[str, ...]:
        """The sites that share a site's process, and its end; none where it has one of its own."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes that are ready, at least one unless the timeout passes first."""
        ...

    def statuses(self) -> list[SiteStatus]:
        """What the sites are doing, as far as it can be told without waiting."""
        ...

    def has_process(self, site: str) -> bool:
        """Whether a site has a process that could answer, or is about to; False where there is no room for one."""
        ...

    def restart(self, site: str, *, pid: int | None = None) -> None:
        """Ends a site's process and makes a new one; open calls are dropped, also those of its mates.

        ``pid``: of the process that is to end, where it is known. One that has taken its place already stays.
        """
        ...

    def remove(self, site: str) -> None:
        """Ends a site for good; its mates go on."""
        ...

    def shutdown(self) -> None:
        """Ends all sites; safe to call twice."""
        ...
