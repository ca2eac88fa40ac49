"""Several sites in one process, for simulations of hundreds: ``resources.sites_per_actor``.

Each is a :class:`actors.site.Site` as ever, with a mailbox and keys of its own, and is called as if it were alone. They
share only what holds no site's own state (:class:`gcml_ray.training.workbench.Workbench`), and take turns: the calls
of a concurrency group stand in one queue, whichever site they are for, and small calls do not wait for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.site import NotStartedError, Site, TrainerFactory, default_trainer
from gcml_ray.config import SERVER, Config
from gcml_ray.records import SiteStatus

if TYPE_CHECKING:  # torch comes in where sites train
    from gcml_ray.training.workbench import Workbench


class SiteHost:
    """The sites of one process; ``start`` makes each one anew.

    Args:
        config: the federation's configuration.
        folder: the run folder on this process's disk.
        run_id: identifies the run on every push.
        use_gpu: whether a GPU was granted.
        make_trainer: see :class:`actors.site.Site`.
        is_own_process: nothing but these sites is in this process.
    """

    def __init__(
        self,
        config: Config,
        folder: str,
        *,
        run_id: str,
        use_gpu: bool,
        make_trainer: TrainerFactory | None = None,
        is_own_process: bool = False,
    ) -> None:
        self._config = config
        self._folder = folder
        self._run_id = run_id
        self._use_gpu = use_gpu
        self._make_trainer = make_trainer
        self._is_own_process = is_own_process
        self._bench: Workbench | None = None
        self._sites: dict[str, Site] = {}

    def create(self, name: str) -> Site:
        """A site that was not started yet, in the place of the one of that name, if there is one."""
        at_the_bench = None if name == SERVER else self._trainer_at_the_bench
        self._sites[name] = Site(
            self._config,
            name,
            self._folder,
            run_id=self._run_id,
            use_gpu=self._use_gpu and name != SERVER,
            make_trainer=self._make_trainer or at_the_bench,
        )
        return self._sites[name]

    def _trainer_at_the_bench(self, *arguments: Any, **options: Any) -> Any:
        """The real trainer of a site, sharing this process's workbench."""
        from gcml_ray.lean_imports import import_monai  # noqa: PLC0415 - torch and MONAI only where training happens

        if self._is_own_process:
            import_monai()  # before the bench, which would load all of it
        from gcml_ray.training.workbench import Workbench  # noqa: PLC0415

        self._bench = self._bench or Workbench(self._config.resources.park)
        return default_trainer(*arguments, bench=self._bench, **options)

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """A method of one site.

        Raises:
            NotStartedError: this process is new and does not know the site.
        """
        if method == "start":
            self.create(name)
        site = self._sites.get(name)
        if site is None:
            raise NotStartedError.of(name)
        return getattr(site, method)(*arguments)

    def statuses(self) -> list[SiteStatus]:
        """What each site is doing."""
        return [site.status() for site in list(self._sites.values())]

    def dismiss(self, name: str) -> None:
        """Forgets a site that has left; what it is doing ends at its next step."""
        site = self._sites.pop(name, None)
        if site is not None:
            site.stop()


@dataclass(frozen=True)
class HostedSite:
    """The handle of a site among several: it is used like the handle of an actor of its own."""

    actor: Any
    name: str

    def __getattr__(self, method: str) -> HostedMethod:
        if method.startswith("__"):  # pickle asks for what is not there
            raise AttributeError(method)
        return HostedMethod(self.actor.call, self.name, method)


@dataclass(frozen=True)
class HostedMethod:
    """A method of such a site, to be called with ``remote`` as an actor's is."""

    call: Any
    name: str
    method: str

    def options(self, **options: Any) -> HostedMethod:
        """The same in a concurrency group."""
        return HostedMethod(self.call.options(**options), self.name, self.method)

    def remote(self, *arguments: Any) -> Any:
        """Submits the call."""
        return self.call.remote(self.name, self.method, *arguments)


class Seating:
    """Which sites share a process: numbers of processes by site, all about equally full. A server sits alone.

    Args:
        config: says how many share one at most.
    """

    def __init__(self, config: Config) -> None:
        self._resources = config.resources
        self._rows: list[set[str]] = []

    def seat_all(self, sites: Sequence[str]) -> int:
        """Seats sites that start together; returns the number of processes."""
        seated = [site for site in sites if site != SERVER]
        self._rows = [set() for _ in range(self._resources.num_actors(len(seated)))]
        for index, site in enumerate(seated):
            self._rows[index % len(self._rows)].add(site)
        return len(self._rows)

    def seat(self, site: str) -> int:
        """Seats one more, in the emptiest process or in a new one; returns the process's number."""
        emptiest = min(range(len(self._rows)), key=lambda index: len(self._rows[index]), default=None)
        if emptiest is None or len(self._rows[emptiest]) >= self._resources.sites_per_actor:
            emptiest = len(self._rows)
            self._rows.append(set())
        self._rows[emptiest].add(site)
        return emptiest

    def leave(self, site: str) -> None:
        """A site has left."""
        for row in self._rows:
            row.discard(site)

    def row_of(self, site: str) -> int | None:
        """The number of a site's process; None for a server."""
        return next((index for index, row in enumerate(self._rows) if site in row), None)

    def mates(self, site: str) -> tuple[str, ...]:
        """The others of its process, by name."""
        row = self.row_of(site)
        return () if row is None else tuple(sorted(self._rows[row] - {site}))
