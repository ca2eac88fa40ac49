"""Sites that join or leave during a run: by the configuration's schedule, or on request from another terminal.

A request is a small file in ``<run folder>/requests``; the driver takes it in before its next round. So
``gcml site add|remove`` needs no connection to the driver, and a request that comes too late is ignored.
What cannot be followed, a request or a part of the schedule, is logged, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from actors.roster import Roster
from gcml_ray.config import SERVER, Config, PooledMethod, has_peers, has_server
from gcml_ray.data.datalist import read_datalist, site_names
from gcml_ray.errors import ConfigError, DataError
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.files.site_names import RESERVED_SITES, check_site_name
from gcml_ray.files.whole_files import replace_file
from gcml_ray.gossip.phases import rounds_left
from gcml_ray.records import LEFT

log = logging.getLogger(__name__)

Wish = Literal["add", "remove"]
TOO_LATE = "in a cool-down nothing is sent any more (federation.cooldown_rounds), it would train alone from the start"
WRONG_REQUEST = (OSError, ValueError, KeyError, TypeError, ConfigError)  # what reading one can raise


def request(folder: Path, wish: Wish, site: str) -> Path:
    """Leaves a request for the driver of a run; returns its file.

    Args:
        folder: the run folder.
        wish: what is asked for.
        site: a site of the run's datalist.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: the run has finished (a site that it lost may be added, to be tested), the site that is to leave
            has never taken part, or its name cannot be one.
    """
    run = RunFolder.open(folder)
    if run.state_file.exists():
        state = run.read_state()
        if state.status == "finished":
            _check_late_request(run, state, wish, site)
        known = {*state.alive, *state.site_rounds, *state.dropped}
        if wish == "remove" and site not in known:
            raise ConfigError(f"site {site} takes no part in the run in {folder}; its sites are {sorted(known)}")
    path = _requests(run) / f"{time.time_ns()}.json"
    replace_file(path, json.dumps({"wish": wish, "site": check_site_name(site)}))
    return path


def _check_late_request(run: RunFolder, state: RunState, wish: Wish, site: str) -> None:
    """All that a finished run can still do is to test a site that it has lost."""
    if wish == "remove" or site not in state.lost:
        raise ConfigError(f"the run in {run.path} has finished: nobody joins or leaves any more")
    if not state.site_rounds.get(site):
        raise ConfigError(f"the run in {run.path} has finished, and site {site} has no checkpoint that could be tested")


def _requests(folder: RunFolder) -> Path:
    return folder.path / "requests"


class Attendance:
    """Who comes and goes.

    Args:
        config: the federation's configuration; ``federation.schedule`` names sites that come later or leave earlier.
        folder: the run folder.
        roster: does it.

    Attributes:
        followed: the round up to which the schedule was followed.
    """

    def __init__(self, config: Config, folder: RunFolder, roster: Roster) -> None:
        self.config = config
        self.folder = folder
        self.roster = roster
        self.followed = 0
        self._carried_out: list[Path] = []  # requests that the state on disk does not show yet
        self._settled: set[str] = set()  # sites whose pending requests the start of a resume has followed

    def at_start(self, sites: Sequence[str], resume: RunState | None) -> list[str]:
        """Sites to start with. On a resume: those of the saved state, with three exceptions.

        Sites that the schedule lets join after the round resumed from are left out: they will join again there. So are
        sites that a pending request removes, as they may be unable to start. Where all rounds are over and a test is
        all that is left, lost sites that a request adds are there for it.
        """
        if resume is None:
            return [site for site in sites if self._joins(site) <= 1]
        wishes = self._newest_wishes()
        back: list[str] = []
        if are_rounds_over(self.config, resume):
            back = [site for site in resume.lost if wishes.get(site) == "add" and resume.site_rounds.get(site)]
        for site in back:
            del self.roster.dropped[site]
        leaving = [] if resume.status == "finished" else _asked_to_leave(wishes, resume.alive or resume.lost)
        for site in leaving:
            self.roster.dropped[site] = f"{LEFT} before the run went on, on request"
        self._settled = {*back, *leaving}
        done = resume.last_complete_round
        self.followed = done if resume.followed is None else resume.followed
        first = {site for site in resume.alive if self._joins(site) <= max(1, done)}
        return sorted(first | {site for site in resume.alive if resume.site_rounds.get(site) != 0} | set(back))

    def _joins(self, site: str) -> int:
        """The round before which a site joins by the schedule."""
        schedule = self.config.federation.schedule
        return schedule[site].joins if site in schedule else 1

    def apply(self, number: int) -> bool:
        """Everything that is due before a round: of the schedule, what has come due since the last time, once.

        Returns:
            Whether requests were carried out: then the state has to be written, and after it :meth:`clear_requests`
            called. A run that is killed in between carries them out again.
        """
        for due in range(self.followed + 1, number + 1):
            self._follow_schedule(due)
        self.followed = max(self.followed, number)
        for path in self._pending():
            self._follow(path, number)
        return bool(self._carried_out)

    def clear_requests(self) -> None:
        """Takes away the requests that were carried out."""
        for path in self._carried_out:
            with suppress(OSError):
                path.unlink()
        self._carried_out.clear()

    def _follow_schedule(self, number: int) -> None:
        """What the schedule has for one round; a site that came on request before its time is there already."""
        for site, entry in self.config.federation.schedule.items():
            try:
                if entry.joins == number and number > 1 and not self._is_here(site):
                    self.add(site, number)
                if entry.leaves == number:
                    self.remove(site, f"{LEFT} before round {number}, as scheduled")
            except (ConfigError, DataError) as error:
                log.warning("the schedule of site %s is not followed before round %d: %s", site, number, error)
                if entry.joins == number and not self._is_here(site):
                    self.roster.dropped[site] = f"did not join before round {number}: {error}"

    def _pending(self) -> list[Path]:
        """The files of requests that were not looked at yet, oldest first."""
        return sorted(_requests(self.folder).glob("*.json"))

    def _newest_wishes(self) -> dict[str, Wish]:
        """The newest pending request of each site, oldest first."""
        asked: dict[str, Wish] = {}
        for path in self._pending():
            with suppress(*WRONG_REQUEST):
                wish, site = _read_request(path)
                asked.pop(site, None)
                asked[site] = wish
        return asked

    def close(self) -> None:
        """All rounds are over: requests that the start has followed are done, all others put aside with a warning."""
        for path in self._pending():
            with suppress(*WRONG_REQUEST):
                if _read_request(path)[1] in self._settled:
                    path.unlink()
                    continue
            _put_aside(path, "all rounds are over")

    def _follow(self, path: Path, number: int) -> None:
        """Does what a request asks for, and says so; one that cannot be read, or followed, is put aside."""
        try:
            wish, site = _read_request(path)
            if wish == "add":
                self.add(site, number)
            else:
                self.remove(site, f"{LEFT} before round {number}, on request")
        except (*WRONG_REQUEST, DataError) as error:
            _put_aside(path, str(error))  # else it is warned of again before the next round
        else:
            self._carried_out.append(path)

    def _is_here(self, site: str) -> bool:
        """Whether a site takes part, or is on its way to."""
        return site in self.roster.members or site in self.roster.absent

    def add(self, site: str, number: int) -> None:
        """A site takes part as soon as it has loaded its data; one that was here before goes on from its checkpoint.

        Raises:
            ConfigError: it is not in the datalist, or is here already, or the run trains one model on all sites' cases,
                or the site has learnt nothing and nobody will send it anything.
            DataError: the datalist cannot be read.
        """
        if self._is_here(site):
            raise ConfigError(f"site {site} takes part already")
        if isinstance(self.config.method, PooledMethod):
            raise ConfigError(f"site {site} cannot join: this run trains one model on the cases of all sites (pooled)")
        known = site_names(read_datalist(self.config.data.datalist))
        if site not in known or site in RESERVED_SITES:
            raise ConfigError(f"site {site} is not in {self.config.data.datalist}; it has {list(known)}")
        checkpoint_round = self.roster.past_rounds.get(site, 0)
        if checkpoint_round == 0 and _is_exchange_over(self.config, number):
            raise ConfigError(f"site {site} cannot join before round {number}: {TOO_LATE}")
        log.info("site %s joins before round %d", site, number)
        self.roster.join(site, number=number, checkpoint_round=checkpoint_round)

    def remove(self, site: str, reason: str) -> None:
        """A site leaves, also one that is still on its way; its checkpoints stay. Nothing to do where it is not here.

        Raises:
            ConfigError: it is the last one.
        """
        if site == SERVER or not self._is_here(site):
            return
        if not self.roster.members.keys() - {site}:
            raise ConfigError(f"site {site} is the last one: stop the run instead")
        self.roster.drop(site, reason)


def _asked_to_leave(wishes: Mapping[str, Wish], alive: Sequence[str]) -> list[str]:
    """Sites that pending requests remove, never the last one.

    Before the next round, if there is one, the requests themselves are carried out, or refused with a warning.
    """
    leaving = [site for site, wish in wishes.items() if wish == "remove" and site in alive]
    return leaving[: len(alive) - 1]


def are_rounds_over(config: Config, state: RunState) -> bool:
    """Whether a run that is resumed has no round to train any more."""
    rounds = config.federation.rounds
    if state.status == "finished":  # also by its time limit
        return True
    if config.federation.mode == "sync":
        return state.last_complete_round >= rounds
    return bool(state.alive) and all(state.site_rounds.get(site, 0) >= rounds for site in state.alive)


def _put_aside(path: Path, why: str) -> None:
    """A request that is not followed is kept as ``.refused``."""
    log.warning("request %s is not followed: %s", path.name, why)
    with suppress(OSError):
        path.rename(path.with_suffix(".refused"))


def _read_request(path: Path) -> tuple[Wish, str]:
    """What a request asks for, and of which site."""
    asked = json.loads(path.read_text(encoding="utf-8"))
    wish, site = asked["wish"], check_site_name(asked["site"])
    if wish not in ("add", "remove"):
        raise ValueError(f"wish {wish!r} is neither add nor remove")
    return wish, site


def _is_exchange_over(config: Config, number: int) -> bool:
    """Whether models were sent, and none will be from a round on; without a barrier each site has rounds of its own."""
    federation = config.federation
    if federation.mode == "async" or not (has_peers(config.method) or has_server(config.method)):
        return False
    return rounds_left(federation, 0)["exchange"] > 0 and not rounds_left(federation, number - 1)["exchange"]


def check_schedule(config: Config, sites: Sequence[str]) -> None:
    """Refuses a schedule that this run cannot follow.

    Raises:
        ConfigError: it names unknown sites or a round after the last one, or leaves nobody at the start.
    """
    schedule = config.federation.schedule
    unknown = sorted(set(schedule) - set(sites))
    if unknown:
        raise ConfigError(f"federation.schedule names {unknown}, not sites of this run; it has {list(sites)}")
    late = {site: each.joins for site, each in schedule.items() if each.joins > config.federation.rounds}
    if late and config.federation.mode == "sync":  # else there may be more records than rounds
        site, joins = next(iter(late.items()))
        raise ConfigError(
            f"federation.schedule.{site}.joins is {joins}, after the last round ({config.federation.rounds}): it would "
            "take no part; leave it out with federation.sites, or let it join earlier"
        )
    for site, each in schedule.items():
        if _is_exchange_over(config, each.joins):
            raise ConfigError(f"federation.schedule.{site}.joins is {each.joins}: {TOO_LATE}; let it join earlier")
    if schedule and all(site in schedule and schedule[site].joins > 1 for site in sites):
        raise ConfigError("federation.schedule: at least one site must take part from round 1")
