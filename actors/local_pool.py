"""Sites in this process, one after the other: the oracle for tests, and the runner where Ray is missing.

:class:`SitePool` is the interface that the driver knows; ``actors/pool.py`` has the Ray one.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from actors.faulty_trainer import SiteDiedError, SiteHungError
from actors.host import Seating, SiteHost
from actors.site import Site, TrainerFactory
from gcml_ray.config import Config
from gcml_ray.push.wire import Payload, PushHeader
from gcml_ray.records import Peer, PushReceipt, SiteFailure, SiteStatus


def taken_along(failure: SiteFailure, *, site: str, stage: str, round_number: int) -> SiteFailure:
    """What the failure of one site means for a call of another that shares its process."""
    message = f"its process ends with what {failure.site} was doing"
    return SiteFailure(site, round_number, stage, "unreachable", message, culprit=failure.site)


@dataclass(frozen=True)
class Outcome:
    """How one call to a site ended: ``result`` is a record, or ``failure`` says why there is none."""

    site: str
    method: str
    result: Any = None
    failure: SiteFailure | None = None


class SitePool(Protocol):
    """Sites by name, and calls to them. Calls to one site run in order; sites run independently.

    ``is_parallel``: whether all sites work at the same time; where they do not, their times add up.
    """

    is_parallel: bool

    def launch(self, sites: Sequence[str]) -> None:
        """Creates the sites. Raises ClusterError where they do not fit."""
        ...

    def start(self, site: str, *, resume_round: int | None) -> None:
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

    def restart(self, site: str) -> None:
        """Ends a site's process and makes a new one; open calls are dropped, also those of its mates."""
        ...

    def remove(self, site: str) -> None:
        """Ends a site for good; its mates go on."""
        ...

    def shutdown(self) -> None:
        """Ends all sites; safe to call twice."""
        ...


class LocalTransport:
    """Hands a copy of the buffer to the receiver directly."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self._sites = sites

    def check_placement(self, site: str) -> None:
        """Every site may run in this process."""

    def send(
        self, header: PushHeader, buffer: Payload, receivers: Sequence[str], *, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        """One read-only copy for all receivers, as the object store makes one."""
        del timeout_s  # a direct call cannot be late
        copy = buffer.copy()
        copy.flags.writeable = False
        return tuple(self._deliver(header, copy, receiver) for receiver in receivers)

    def _deliver(self, header: PushHeader, buffer: Payload, receiver: str) -> PushReceipt:
        site = self._sites.get(receiver)
        if site is None:
            reason = "unreachable: the receiver has left"
            return PushReceipt(header.round_number, header.sender, receiver, False, reason, buffer.nbytes)
        return site.receive(header, buffer)


class LocalPool:
    """All sites in this process; :meth:`wait` runs the next call and gives its outcome.

    Args:
        config: the federation's configuration.
        folder: the run folder.
        run_id: identifies the run on every push.
        make_trainer: see :class:`actors.site.Site`.
    """

    is_parallel = False

    def __init__(self, config: Config, folder: str, *, run_id: str, make_trainer: TrainerFactory | None = None) -> None:
        self._config = config
        self._folder = folder
        self._run_id = run_id
        self._make_trainer = make_trainer
        self._seating = Seating(config)
        self._hosts: dict[int | None, SiteHost] = {}
        self._sites: dict[str, Site] = {}
        self._queue: deque[tuple[str, str, tuple[Any, ...], int]] = deque()
        self._transport = LocalTransport(self._sites)

    def launch(self, sites: Sequence[str]) -> None:
        """Creates the site objects."""
        self._names = tuple(sites)
        self._seating.seat_all(sites)
        for site in sites:
            self._create(site)

    def add(self, site: str) -> None:
        """See :class:`SitePool`."""
        self._names = tuple(sorted({*self._names, site}))
        self._seating.seat(site)
        self._create(site)

    def mates(self, site: str) -> tuple[str, ...]:
        """See :class:`SitePool`."""
        return self._seating.mates(site)

    def introduce(self, sites: Sequence[str], peers: Mapping[str, Peer]) -> None:
        """See :class:`SitePool`."""
        for site in sites:
            self.submit(site, "register", self._transport, dict(peers), round_number=0)

    def _create(self, site: str) -> None:
        """A new site, as in a new process: with what it shares with its mates, if they are there."""
        row = self._seating.row_of(site)
        if row not in self._hosts:
            self._hosts[row] = SiteHost(
                self._config,
                self._folder,
                run_id=self._run_id,
                use_gpu=self._config.resources.gpus_per_site > 0,
                make_trainer=self._make_trainer,
            )
        self._sites[site] = self._hosts[row].create(site)

    def _create_anew(self, site: str) -> None:
        """A site, and its mates, as in a new process."""
        self._hosts.pop(self._seating.row_of(site), None)
        for name in (site, *self.mates(site)):
            self._create(name)

    def start(self, site: str, *, resume_round: int | None) -> None:
        """See :class:`SitePool`."""
        self.submit(site, "start", self._transport, self._names, resume_round, round_number=0)

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        """See :class:`SitePool`."""
        self._queue.append((site, method, arguments, round_number))

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Runs the oldest call to its end, however long it takes; an empty list where nothing is open."""
        del timeout_s
        if not self._queue:
            return []
        site, method, arguments, round_number = self._queue.popleft()
        try:
            result = getattr(self._sites[site], method)(*arguments)
        except Exception as error:  # whatever a site raises is a record for the driver, as with Ray
            kind = _kind_of(error)
            failure = SiteFailure(
                site, round_number, method, kind, str(error), type(error).__name__, traceback.format_exc()
            )
            taken_along = []
            if kind != "raised":  # nothing answers there any more
                self._create_anew(site)
                taken_along = self._fail_mates(failure)
            return [Outcome(site, method, failure=failure), *taken_along]
        return [Outcome(site, method, result=result)]

    def _fail_mates(self, failure: SiteFailure) -> list[Outcome]:
        """The open calls of those who shared a process that has ended."""
        mates = self.mates(failure.site)
        lost = [call for call in self._queue if call[0] in mates]
        self._queue = deque(call for call in self._queue if call[0] not in mates)
        return [
            Outcome(site, method, failure=taken_along(failure, site=site, stage=method, round_number=number))
            for site, method, _, number in lost
        ]

    def statuses(self) -> list[SiteStatus]:
        """What each site last noted."""
        return [site.status() for site in self._sites.values()]

    def restart(self, site: str) -> None:
        """See :class:`SitePool`."""
        names = {site, *self.mates(site)}
        self._queue = deque(call for call in self._queue if call[0] not in names)
        self._create_anew(site)

    def remove(self, site: str) -> None:
        """See :class:`SitePool`."""
        self._queue = deque(call for call in self._queue if call[0] != site)
        self._sites.pop(site, None)
        host = self._hosts.get(self._seating.row_of(site))
        if host is not None:
            host.dismiss(site)
        self._seating.leave(site)

    def shutdown(self) -> None:
        """See :class:`SitePool`."""
        self._queue.clear()
        self._sites.clear()
        self._hosts.clear()


def _kind_of(error: Exception) -> Literal["raised", "died", "late"]:
    """What the driver would have seen of a site in a process of its own."""
    if isinstance(error, SiteDiedError):
        return "died"
    return "late" if isinstance(error, SiteHungError) else "raised"
