"""Sites in this process, one after the other: the oracle for tests, and the runner where Ray is missing."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from actors.host import Seating, SiteHost
from actors.site import NotStartedError, Site, TrainerFactory
from actors.site_pool import Outcome, SiteDiedError, SiteHungError, collateral_failure, end_of, refused, words_of
from gcml_ray.config import Config
from gcml_ray.push.wire import UNREACHABLE, Payload, PushHeader
from gcml_ray.records import Peer, PushReceipt, SiteFailure, SiteStatus


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
            return refused(header, receiver, f"{UNREACHABLE} the receiver has left", buffer.nbytes)
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
        """See :class:`actors.site_pool.SitePool`."""
        self._names = tuple(sorted({*self._names, site}))
        self._seating.seat(site)
        self._create(site)

    def mates(self, site: str) -> tuple[str, ...]:
        """See :class:`actors.site_pool.SitePool`."""
        return self._seating.mates(site)

    def introduce(self, sites: Sequence[str], peers: Mapping[str, Peer]) -> None:
        """See :class:`actors.site_pool.SitePool`."""
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
        self._release(site)
        self._sites[site] = self._hosts[row].create(site)

    def _create_anew(self, site: str) -> None:
        """A site, and its mates, as in a new process."""
        self._hosts.pop(self._seating.row_of(site), None)
        for name in (site, *self.mates(site)):
            self._create(name)

    def start(self, site: str, *, resume_round: int) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        self.submit(site, "start", self._transport, self._names, resume_round, round_number=0)

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        self._queue.append((site, method, arguments, round_number))

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Runs the oldest call to its end, however long it takes; an empty list where nothing is open."""
        del timeout_s
        if not self._queue:
            return []
        site, method, arguments, round_number = self._queue.popleft()
        try:
            result = getattr(self._sites[site], method)(*arguments)
        except (Exception, SystemExit) as error:  # whatever a site raises is a record for the driver, as with Ray
            kind, name = _kind_of(error), type(error).__name__
            trace = end_of(traceback.format_exc())
            failure = SiteFailure(site, round_number, method, kind, words_of(error), name, trace)
            lost = []
            if kind != "raised":  # nothing answers there any more
                self._create_anew(site)
                lost = self._fail_mates(failure)
            return [Outcome(site, method, failure=failure), *lost]
        return [Outcome(site, method, result=result)]

    def _fail_mates(self, failure: SiteFailure) -> list[Outcome]:
        """The open calls of those who shared a process that has ended."""
        mates = self.mates(failure.site)
        lost = [call for call in self._queue if call[0] in mates]
        self._queue = deque(call for call in self._queue if call[0] not in mates)
        return [
            Outcome(site, method, failure=collateral_failure(failure, site=site, stage=method, round_number=number))
            for site, method, _, number in lost
        ]

    def statuses(self) -> list[SiteStatus]:
        """What each site last noted."""
        return [site.status() for site in self._sites.values()]

    def has_process(self, site: str) -> bool:
        """Every site of the pool runs in this process."""
        return site in self._sites

    def restart(self, site: str, *, pid: int | None = None) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        del pid  # all sites are in this process
        names = {site, *self.mates(site)}
        self._queue = deque(call for call in self._queue if call[0] not in names)
        self._create_anew(site)

    def remove(self, site: str) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        self._queue = deque(call for call in self._queue if call[0] != site)
        self._release(site)
        host = self._hosts.get(self._seating.row_of(site))
        if host is not None:
            host.dismiss(site)
        self._seating.leave(site)

    def shutdown(self) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        self._queue.clear()
        for site in tuple(self._sites):
            self._release(site)
        self._hosts.clear()

    def _release(self, site: str) -> None:
        """Frees what a site holds; nothing where it is not there."""
        if (old := self._sites.pop(site, None)) is not None:
            old.release()


def _kind_of(error: Exception | SystemExit) -> Literal["raised", "died", "late"]:
    """What the driver would have seen of a site in a process of its own."""
    if isinstance(error, SiteDiedError | NotStartedError | SystemExit):
        return "died"
    return "late" if isinstance(error, SiteHungError) else "raised"
