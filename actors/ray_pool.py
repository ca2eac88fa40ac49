"""Sites as Ray actors: one process each, or several in one."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import actors as actor_table
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import check_capacity, places
from actors.host import HostedSite, Seating, SiteHost
from actors.object_store import ANSWER_TIMEOUT_S, ObjectStoreTransport
from actors.ray_errors import classify
from actors.site import Site, TrainerFactory, trainer_in_own_process
from actors.site_pool import Outcome
from gcml_ray.config import SERVER, Config
from gcml_ray.errors import ClusterError
from gcml_ray.records import WAITS_FOR_ROOM, Peer, SiteStatus

GROUP_POLL_S = 1.0  # how often it is asked whether to stop while a placement group waits for room
# A site's threads: training in the default group, so that pushes land while it trains.
CONCURRENCY_GROUPS = {"push": 1, "inbox": 2, "control": 1}
GROUP_OF = {"push": "push", "register": "control", "status": "control"}

# No retries: a repeated round would train twice. Restarts come back empty and are started by the driver.
_OPTIONS: dict[str, Any] = {
    "concurrency_groups": CONCURRENCY_GROUPS,
    "max_restarts": -1,
    "max_task_retries": 0,
    "allow_out_of_order_execution": True,
}
SiteActor: Any = ray.remote(**_OPTIONS)(Site)  # Any: Ray's hints do not know an actor's options
# In order: when a process dies, what the driver asked for first is what it was doing. No call of the driver has an
# argument that is still to come, which would hold up those behind it.
HostActor: Any = ray.remote(**_OPTIONS | {"allow_out_of_order_execution": False})(SiteHost)


class RayPool:
    """Sites as actors on the connected cluster; see :class:`actors.site_pool.SitePool`.

    Args:
        config: the federation's configuration.
        folder: the run folder, an absolute path that means the same on every node (or each site's own disk).
        run_id: identifies the run on every push.
        stop: ends the wait for a placement group; who has set it also ends the run.
        make_trainer: see :class:`actors.site.Site`.
        make_transport: builds what carries the pushes, with the arguments of :class:`ObjectStoreTransport`.
    """

    def __init__(
        self,
        config: Config,
        folder: str,
        *,
        run_id: str,
        stop: threading.Event | None = None,
        make_trainer: TrainerFactory | None = None,
        make_transport: Callable[..., ObjectStoreTransport] = ObjectStoreTransport,
    ) -> None:
        self._config = config
        self._folder = folder
        self._run_id = run_id
        self._stop = stop or threading.Event()
        self._make_trainer = make_trainer
        self._make_transport = make_transport
        self.is_parallel = config.resources.sites_per_actor == 1  # else calls wait for those of other sites
        self._seating = Seating(config)
        self._hosts: dict[int, Any] = {}
        self._culprits: dict[int | None, str] = {}
        self._handles: dict[str, Any] = {}
        self._names: tuple[str, ...] = ()
        self._open: dict[Any, tuple[str, str, int]] = {}
        self._status_calls: dict[str | int | None, Any] = {}
        self._statuses: dict[str | int | None, list[SiteStatus]] = {}
        self._group: Any = None

    def launch(self, sites: Sequence[str]) -> None:
        """Creates one actor for each site, or for several, all at once.

        A server works while the sites wait: it asks for no CPU of its own.

        Raises:
            ClusterError: the cluster cannot hold them.
        """
        resources = self._config.resources
        asking = [site for site in sites if site != SERVER]
        check_capacity(resources, asking, places(resources))
        self._names = tuple(sites)
        num_actors = self._seating.seat_all(asking)
        if resources.placement == "pg":
            self._reserve(num_actors)
        for site in asking:
            self._take_in(site)
        if SERVER in sites:
            self._handles[SERVER] = self._create(SERVER, cpus=0, gpus=0)

    def _take_in(self, site: str, *, extends: bool = False) -> None:
        """Creates the actor of a seated site, or a handle in the actor that it shares."""
        resources, row = self._config.resources, self._seating.row_of(site)
        assert row is not None
        placement = {} if extends and resources.placement == "pg" else self._placement(site, row)
        if resources.sites_per_actor == 1:
            cpus, gpus = resources.cpus_per_site, resources.gpus_per_site
            self._handles[site] = self._create(site, cpus=cpus, gpus=gpus, **placement)
            return
        if row not in self._hosts:
            self._hosts[row] = self._create_host(row, **placement)
        self._handles[site] = HostedSite(self._hosts[row], site)

    def _create_host(self, row: int, **placement: Any) -> Any:
        """The actor of several sites."""
        resources = self._config.resources
        cpus, gpus = resources.cpus_per_site, resources.gpus_per_site
        name = f"sites/{row}/{self._run_id}-{uuid.uuid4().hex[:4]}"  # a row that was empty may be filled again
        options = {"name": name, "num_cpus": cpus, "num_gpus": gpus, **placement}
        return HostActor.options(**options).remote(
            self._config,
            self._folder,
            run_id=self._run_id,
            use_gpu=gpus > 0,
            make_trainer=self._make_trainer,
            is_own_process=True,
        )

    def _create(self, site: str, *, cpus: float, gpus: float, **placement: Any) -> Any:
        """The actor of a site."""
        return SiteActor.options(name=f"site/{site}/{self._run_id}", num_cpus=cpus, num_gpus=gpus, **placement).remote(
            self._config,
            site,
            self._folder,
            run_id=self._run_id,
            use_gpu=gpus > 0,
            make_trainer=self._make_trainer or trainer_in_own_process,
        )

    def _reserve(self, num_actors: int) -> None:
        """One placement group with a bundle an actor; all or nothing, unless it is told to stop before."""
        resources = self._config.resources
        bundle = {"CPU": resources.cpus_per_site}
        if resources.gpus_per_site > 0:
            bundle["GPU"] = resources.gpus_per_site
        self._group = placement_group([dict(bundle) for _ in range(num_actors)], strategy="PACK")
        timeout_s = self._config.federation.start_timeout_s
        deadline = time.monotonic() + timeout_s
        while not self._group.wait(GROUP_POLL_S):
            if self._stop.is_set():
                return
            if time.monotonic() < deadline:
                continue
            raise ClusterError(
                f"the cluster did not free {num_actors} x {bundle} within {timeout_s:g} s "
                "(federation.start_timeout_s): other jobs hold them; wait, or ask less of each site"
            )

    def _placement(self, site: str, index: int) -> dict[str, Any]:
        """Scheduling options of one site."""
        if self._config.resources.placement == "label":
            return {"label_selector": {self._config.resources.label_key: site}}
        if self._group is not None:
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            return {"scheduling_strategy": strategy}
        return {}

    def start(self, site: str, *, resume_round: int) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        self.submit(site, "start", self._transport(site), self._names, resume_round, round_number=0)

    def add(self, site: str) -> None:
        """See :class:`actors.site_pool.SitePool`.

        A placement group is never extended: with one, the site runs beside it.
        """
        self._names = tuple(sorted({*self._names, site}))
        self._seating.seat(site)
        self._take_in(site, extends=True)

    def mates(self, site: str) -> tuple[str, ...]:
        """See :class:`actors.site_pool.SitePool`."""
        return self._seating.mates(site)

    def introduce(self, sites: Sequence[str], peers: Mapping[str, Peer]) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        for site in sites:
            self.submit(site, "register", self._transport(site), dict(peers), round_number=0)

    def _transport(self, site: str) -> ObjectStoreTransport:
        """What carries a site's pushes to everyone who takes part now."""
        resources = self._config.resources
        has_own_node = resources.placement == "label" and site != SERVER
        return self._make_transport(self._handles, label_key=resources.label_key if has_own_node else None)

    def submit(self, site: str, method: str, *arguments: Any, round_number: int) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        call = self._call(site, method, *arguments)
        self._open[call] = (site, method, round_number)

    def _call(self, site: str, method: str, *arguments: Any) -> Any:
        """Calls a site's method in its concurrency group; naming it keeps one queue from blocking another."""
        bound = getattr(self._handles[site], method)
        group = GROUP_OF.get(method)
        return (bound.options(concurrency_group=group) if group else bound).remote(*arguments)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """See :class:`actors.site_pool.SitePool`."""
        if not self._open:
            time.sleep(timeout_s)
            return []
        calls = list(self._open)
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:  # whatever else is ready comes along
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        answered = set(ready)  # in the order of the calls: a site that had finished is not blamed for a later crash
        return [self._outcome(call) for call in calls if call in answered]

    def _outcome(self, call: Any) -> Outcome:
        """The result of a finished call, or its failure as a record."""
        site, method, number = self._open[call]
        try:
            return Outcome(site, method, result=ray.get(call, timeout=ANSWER_TIMEOUT_S))
        except ray.exceptions.RayError as error:
            failure = classify(error, site=site, stage=method, round_number=number)
            if isinstance(error, ray.exceptions.RayActorError):
                failure = replace(failure, culprit=self._culprit(site))
            return Outcome(site, method, failure=failure)
        finally:
            del self._open[call]

    def _culprit(self, site: str) -> str:
        """Site whose call was running when the shared process ended; empty if it is this one."""
        row = self._seating.row_of(site)
        mates = {site, *self._seating.mates(site)}
        if row is None or len(mates) == 1:
            return ""
        if row not in self._culprits:
            calls = [(name, method) for name, method, _ in self._open.values() if name in mates]
            working = [name for name, method in calls if method not in GROUP_OF]
            self._culprits[row] = (working or [name for name, _ in calls])[0]
        culprit = self._culprits[row]
        return "" if culprit == site else culprit

    def statuses(self) -> list[SiteStatus]:
        """The newest known status of each site; asks again without waiting for the answer."""
        for key, method in self._status_methods():
            call = self._status_calls.get(key)
            if call is not None:
                ready, _ = ray.wait([call], timeout=0, fetch_local=False)
                if not ready:
                    continue
                try:
                    known = ray.get(call, timeout=ANSWER_TIMEOUT_S)
                except ray.exceptions.RayError:
                    known = []  # the call that matters reports the failure
                self._statuses[key] = [known] if isinstance(known, SiteStatus) else known
            self._status_calls[key] = method.options(concurrency_group="control").remote()
        heard = [status for known in self._statuses.values() for status in known]
        starting = {site for site, method, _ in self._open.values() if method == "start"}
        silent = sorted(starting - {status.site for status in heard})
        return heard + [SiteStatus(site, 0, WAITS_FOR_ROOM, 0, 0) for site in silent if not self.has_process(site)]

    def _status_methods(self) -> list[tuple[str | int, Any]]:
        """What tells the statuses: of a site with an actor of its own, or of several at once."""
        alone = [(site, each.status) for site, each in self._handles.items() if not isinstance(each, HostedSite)]
        return [*alone, *((row, host.statuses) for row, host in self._hosts.items())]

    def has_process(self, site: str) -> bool:
        """See :class:`actors.site_pool.SitePool`. Ray names the process of an actor as soon as there is room for it."""
        about = actor_table(_actor_of(self._handles[site])._actor_id.hex())
        return (about.get("State"), about.get("Pid")) != ("PENDING_CREATION", 0)

    def restart(self, site: str, *, pid: int | None = None) -> None:
        """Ends a site's process; Ray starts a new one, which waits for ``start`` of this site and of its mates.

        Where it has ended by itself, Ray has often replaced it before the failed call is back: the new one stays.
        """
        for name in (site, *self.mates(site)):
            self._forget(name)
        actor = _actor_of(self._handles[site])
        if not _is_replaced(actor, pid):
            ray.kill(actor, no_restart=False)

    def remove(self, site: str) -> None:
        """See :class:`actors.site_pool.SitePool`."""
        self._forget(site)
        handle, row, mates = self._handles.pop(site), self._seating.row_of(site), self.mates(site)
        self._seating.leave(site)
        if mates:
            handle.actor.dismiss.options(concurrency_group="control").remote(site)
            return
        if row is not None:
            self._hosts.pop(row, None)
        ray.kill(_actor_of(handle))

    def _forget(self, site: str) -> None:
        """Drops a site's open calls, and what is known of its process."""
        self._open = {call: about for call, about in self._open.items() if about[0] != site}
        row = self._seating.row_of(site)
        for key in (site, row):
            self._status_calls.pop(key, None)
            self._statuses.pop(key, None)
        self._culprits.pop(row, None)

    def shutdown(self) -> None:
        """Ends every actor and gives the placement group back."""
        alone = [handle for handle in self._handles.values() if not isinstance(handle, HostedSite)]
        for actor in (*alone, *self._hosts.values()):
            ray.kill(actor)
        self._handles.clear()
        self._hosts.clear()
        self._open.clear()
        self._status_calls.clear()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _actor_of(handle: Any) -> Any:
    """The actor behind a site's handle: its own, or that of all who share it."""
    return handle.actor if isinstance(handle, HostedSite) else handle


def _is_replaced(actor: Any, known_pid: int | None) -> bool:
    """Whether Ray has a new process for an actor, or is making one; its public interface does not tell."""
    about = actor_table(actor._actor_id.hex())
    return known_pid is not None and (about.get("State"), about.get("Pid")) != ("ALIVE", known_pid)
