"""Who takes part in a run and what each one is doing: calls, their timeouts, failures, restarts, departures.

The driver asks; the roster keeps the books. A site that is being restarted is *absent*: nobody waits for it, and
it takes part again as soon as it has loaded its last checkpoint. A site whose call is still open is *busy*.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.failure_policy import Decision, History, server_error, start_error
from actors.listener import Listener, announce
from actors.member import LEAST_START_S, START_PAUSES_S, Absence, Member, OpenCall, peer_of
from actors.pace import GRACE_S, CallKind, Pace
from actors.site_pool import Outcome, SitePool, collateral_failure, no_answer
from gcml_ray.config import SERVER, Config
from gcml_ray.records import AdoptReport, SiteFailure, SiteInfo, TrainReport

log = logging.getLogger(__name__)

POLL_S = 0.5
STATUS_CALLS_PER_S = 40  # at most, of all sites together: they are for the screen, and the driver pays for each
REGISTER = "register"
BESIDE = ("start", "push", REGISTER)  # calls during which a site may still be asked to train


class Roster:
    """The sites of a run.

    Args:
        config: the federation's configuration.
        pool: where the sites live.
        listener: shows what happens.

    Attributes:
        members: the sites that take part, absent and busy ones included.
        server: the server, for methods that have one.
        dropped: sites that were given up, with the reason.
        past_rounds: the checkpoint of each site that was dropped, at that time.
        failures: what went wrong since :meth:`take_failures` was called.
    """

    def __init__(self, config: Config, pool: SitePool, listener: Listener) -> None:
        self.config = config
        self.pool = pool
        self.listener = listener
        self.members: dict[str, Member] = {}
        self.server: Member | None = None
        self.dropped: dict[str, str] = {}
        self.past_rounds: dict[str, int] = {}
        self.failures: list[SiteFailure] = []
        self.pace = Pace.of(config.federation)
        self._absent: dict[str, Absence] = {}
        self._returned: list[str] = []
        self._incarnations: Counter[str] = Counter()
        self._calls: dict[tuple[str, str], OpenCall] = {}
        self._strays: list[Outcome] = []
        self._next_status = 0.0
        self._is_over = False

    # --- who is here -------------------------------------------------------------------------

    @property
    def present(self) -> list[str]:
        """The sites that can be asked to train now, by name."""
        busy = {site for site, stage in self._calls if stage not in BESIDE}
        return sorted(self.members.keys() - self._absent.keys() - busy)

    @property
    def absent(self) -> frozenset[str]:
        """The sites, or the server, that are being started."""
        return frozenset(self._absent)

    def is_busy(self, name: str) -> bool:
        """Whether a site still works on an earlier call."""
        return any(site == name and stage not in BESIDE for site, stage in self._calls)

    def has_open_push(self, name: str) -> bool:
        """Whether a site's last push is still on its way."""
        return (name, "push") in self._calls

    def member(self, name: str) -> Member:
        """A site, or the server."""
        if name == SERVER:
            assert self.server is not None
            return self.server
        return self.members[name]

    def is_known(self, name: str) -> bool:
        """Whether a site, or the server, has not been given up."""
        return name in self.members or (name == SERVER and self.server is not None)

    def take_failures(self) -> tuple[SiteFailure, ...]:
        """What went wrong since the last call."""
        failures, self.failures = tuple(self.failures), []
        return failures

    def take_returned(self) -> list[str]:
        """The sites that came back, or joined, since the last call."""
        returned, self._returned = self._returned, []
        return [name for name in returned if name in self.members]

    # --- start -------------------------------------------------------------------------------

    def start(self, names: Sequence[str], rounds: Mapping[str, int]) -> None:
        """Launches all at once; they load their data while the caller goes on.

        Args:
            names: sites, and the server where there is one.
            rounds: the checkpoint that each one goes on from, 0 for none.
        """
        self.pool.launch(names)
        self._ask_all_to_start(names, rounds)

    def _ask_all_to_start(self, names: Sequence[str], rounds: Mapping[str, int]) -> None:
        for name in names:
            self._ask_to_start(name, 0, at=rounds.get(name, 0), timeout_s=self.config.federation.start_timeout_s)

    def _ask_to_start(self, name: str, number: int, *, at: int, timeout_s: float) -> None:
        """``at``: the checkpoint to go on from; ``number``: the round in which it is asked."""
        self.pool.start(name, resume_round=at)
        self._open(name, "start", number, timeout_s)

    def wait_for_start(self, names: Sequence[str], rounds: Mapping[str, int], is_stopped: Callable[[], bool]) -> bool:
        """Waits until all are ready; False where stopped before. All sites of a lost process are asked again.

        Raises:
            SiteError: one of them cannot start; the message has each one's own words.
        """
        infos: dict[str, SiteInfo] = {}
        waiting = list(names)
        for pause_s in (*START_PAUSES_S, None):
            outcomes = self.gather(waiting, "start", is_stopped=is_stopped)
            if is_stopped() and len(outcomes) < len(waiting):
                return False
            infos |= {outcome.site: outcome.result for outcome in outcomes if outcome.failure is None}
            failures = [outcome.failure for outcome in outcomes if outcome.failure]
            if not failures:
                break
            if pause_s is None or any(failure.kind != "unreachable" for failure in failures):
                raise start_error([failure for failure in failures if not failure.culprit] or failures)
            time.sleep(pause_s)
            waiting = sorted({site for each in failures for site in (each.site, *self.pool.mates(each.site))})
            infos = {site: info for site, info in infos.items() if site not in waiting}
            log.warning("the process of %s was lost while it started: once more", ", ".join(waiting))
            self._ask_all_to_start(waiting, rounds)
        for name in sorted(infos):
            self._enrol(infos[name])
        if any(rounds.values()):
            self._returned += sorted(infos)  # one of them may have come back from an older checkpoint
        self.introduce()
        self.gather(names, REGISTER)
        return True

    def _enrol(self, info: SiteInfo) -> None:
        """Notes a site that is ready to train, or is again; its failures so far stay with it."""
        self._incarnations[info.site] += 1
        known = self.server if info.site == SERVER else self.members.get(info.site)
        member = Member(info, known.history if known else History(), checkpoint_round=info.restored_round)
        if info.site == SERVER:
            self.server = member
        else:
            self.members[info.site] = member

    def introduce(self) -> None:
        """Tells everyone who takes part, with which public key each one signs, and how many cases it trains on."""
        infos = [member.info for member in self.members.values()]
        infos += [self.server.info] if self.server else []
        names = [info.site for info in infos if info.site not in self._absent]
        peers = {info.site: peer_of(info, self._incarnations[info.site]) for info in infos}
        self.pool.introduce(names, peers)
        for name in names:
            self._open(name, REGISTER, 0, self.config.federation.push_timeout_s)

    # --- calls -------------------------------------------------------------------------------

    def submit(self, name: str, stage: str, *arguments: Any, number: int, kind: CallKind, limit_s: float) -> None:
        """One call to one site; its outcome comes from :meth:`poll` or :meth:`gather`."""
        self.pool.submit(name, stage, *arguments, round_number=number)
        self._open(name, stage, number, self.pace.timeout_s(name, kind, limit_s=limit_s), kind=kind)

    def submit_sending(self, name: str, stage: str, *arguments: Any, number: int) -> None:
        """A call in which a site waits for others that it sends to; told for how long, as the call's last argument.

        It is given up only if it does not say in time who has not answered: the failure of a receiver is not its own.
        """
        kind = CallKind(stage)
        limit_s = self.pace.timeout_s(name, kind, limit_s=self.config.federation.push_timeout_s)
        self.pool.submit(name, stage, *arguments, limit_s, round_number=number)
        self._open(name, stage, number, limit_s + GRACE_S, kind=kind)

    def _open(self, name: str, stage: str, number: int, timeout_s: float, *, kind: CallKind | None = None) -> None:
        """Notes a call and when it will have taken too long. Sites of one process wait for each other."""
        now = time.monotonic()
        turns = 1 if self.pool.is_parallel else len(self._calls) + 1
        self._calls[name, stage] = OpenCall(number, kind or CallKind(stage), now, now + timeout_s * turns, timeout_s)

    def poll(self, wait_s: float = POLL_S) -> list[Outcome]:
        """Outcomes of ended calls and failures of late ones; handles rejoins and introductions itself."""
        outcomes = [outcome for outcome in self.pool.wait(wait_s) if self._close(outcome)]
        now = time.monotonic()
        for name, absence in list(self._absent.items()):
            if absence.retry_at is not None and now >= absence.retry_at:
                self._begin(name, replace(absence, retry_at=None))
        for (name, stage), call in list(self._calls.items()):
            if now >= call.deadline and (name, stage) in self._calls:
                del self._calls[name, stage]
                message = no_answer(call.timeout_s, has_process=self.pool.has_process(name))
                failure = SiteFailure(name, call.number, stage, "late", message)
                outcomes += [Outcome(name, stage, failure=failure), *self._wait_behind(failure)]
        if now >= self._next_status:  # asking everyone whenever somebody answers would be work for nothing
            self._next_status = now + max(POLL_S, len(self.members) / STATUS_CALLS_PER_S)
            self.listener.on_status(self.pool.statuses())
        return [outcome for outcome in outcomes if not self._is_housekeeping(outcome)]

    def _wait_behind(self, late: SiteFailure) -> list[Outcome]:
        """Failures for open calls of sites in the late site's process, which will be killed."""
        if late.stage in ("start", REGISTER):
            return []
        mates = set(self.pool.mates(late.site))
        behind = {key: call for key, call in self._calls.items() if key[0] in mates and key[1] != REGISTER}
        self._calls = {key: call for key, call in self._calls.items() if key not in behind}
        return [
            Outcome(site, stage, failure=collateral_failure(late, site=site, stage=stage, round_number=call.number))
            for (site, stage), call in behind.items()
        ]

    def _close(self, outcome: Outcome) -> bool:
        """Notes that a call was answered; False for an answer that nobody waits for any more."""
        call = self._calls.pop((outcome.site, outcome.method), None)
        if call is None:
            return False
        if outcome.is_usual and self.pool.is_parallel:
            self.pace.note(outcome.site, call.kind, time.monotonic() - call.began)
        return True

    def _is_housekeeping(self, outcome: Outcome) -> bool:
        """Handles outcomes that the driver need not see: rejoins and introductions."""
        if outcome.method == "start" and outcome.site in self._absent:
            self._came_back(outcome)
            return True
        if outcome.method == REGISTER and outcome.failure and self.is_known(outcome.site):
            log.warning("%s was not told who takes part; may refuse pushes: %s", outcome.site, outcome.failure.message)
        return outcome.method == REGISTER

    def gather(
        self,
        names: Sequence[str],
        stage: str,
        *,
        patience_s: float | None = None,
        announces: bool = True,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> list[Outcome]:
        """One outcome of each of these sites, by name; who is late after ``patience_s``, or at a stop, is left out.

        Outcomes of other calls are kept for :meth:`take_strays`. ``announces``: show each result as it comes.
        """
        waiting = {name for name in names if (name, stage) in self._calls}
        outcomes: list[Outcome] = []
        until = None if patience_s is None else time.monotonic() + patience_s
        while waiting and (until is None or time.monotonic() < until) and not is_stopped():
            left_s = POLL_S if until is None else max(0.0, until - time.monotonic())
            for outcome in self.poll(min(POLL_S, left_s)):
                if outcome.site in waiting and outcome.method == stage:
                    waiting.discard(outcome.site)
                    outcomes.append(outcome)
                    if announces:
                        announce(self.listener, outcome.result)
                else:
                    self._strays.append(outcome)
            waiting = {name for name in waiting if (name, stage) in self._calls}
        return sorted(outcomes, key=lambda outcome: outcome.site)

    def take_strays(self) -> list[Outcome]:
        """Outcomes that :meth:`gather` did not wait for, or no longer, by site."""
        strays, self._strays = self._strays, []
        return sorted(strays, key=lambda outcome: outcome.site)

    # --- failures ----------------------------------------------------------------------------

    def succeeded(self, name: str, report: TrainReport | AdoptReport, *, has_checkpoint: bool) -> None:
        """A site, or the server, has done its round; earlier failures are forgiven."""
        member = self.member(name)
        member.history = replace(member.history, failures_in_a_row=0)
        if has_checkpoint:
            member.checkpoint_round = report.round_number

    def handle(self, failure: SiteFailure) -> None:
        """Records a failure and does what the policy says."""
        self.failures.append(failure)
        is_told_twice = failure.site in self._absent and not failure.culprit and failure.kind != "raised"
        if is_told_twice or not self.is_known(failure.site):
            return
        decision = Decision.RESTART if self._is_over else self.member(failure.site).failed(failure)
        what = f"site {failure.site} failed in round {failure.round_number}, {failure.stage} ({failure.kind})"
        log.warning("%s: %s -> %s", what, failure.words, decision.value)
        self.listener.on_failure(failure, decision)
        if decision is Decision.RESTART:
            self._restart(failure.site, failure.round_number)
        elif decision is Decision.DROP:
            mates = self.pool.mates(failure.site) if failure.kind != "raised" else ()
            self.drop(failure.site, f"{failure.stage}, {failure.kind}: {failure.message}")
            if here := [mate for mate in mates if mate in self.members]:  # their process has ended, or has to
                self._restart(here[0], failure.round_number)

    def _restart(self, name: str, number: int) -> None:
        """New process for a site and those that share it, restored from their newest checkpoints; nobody waits for it.

        The round is the newest that the site has told of: a file of a later one may be left from before a resume.
        """
        if name in self._absent:
            return  # with one that shares its process
        names = (name, *self.pool.mates(name))
        self.pool.restart(name, pid=self.member(name).info.pid)
        self._calls = {key: call for key, call in self._calls.items() if key[0] not in names}
        self._strays = [each for each in self._strays if each.failure is None or each.site not in names]
        deadline = time.monotonic() + self.config.federation.rejoin_timeout_s
        for each in names:
            self.pace.forget(each)
            self._begin(each, Absence(number, deadline, stays=self._is_over))

    def _begin(self, name: str, absence: Absence) -> None:
        """Asks an absent site to start."""
        least_s = LEAST_START_S if absence.attempts > 1 else 0.0
        self._absent[name] = absence
        at = self.member(name).checkpoint_round if self.is_known(name) else self.past_rounds.get(name, 0)
        timeout_s = max(least_s, absence.deadline - time.monotonic())
        self._ask_to_start(name, absence.number, at=at, timeout_s=timeout_s)

    def _came_back(self, outcome: Outcome) -> None:
        """An absent site has started, or has failed to."""
        absence = self._absent.pop(outcome.site)
        known = self.member(outcome.site) if self.is_known(outcome.site) else None
        if outcome.failure is None and known and known.is_in_process_of(outcome.result):  # it is still being killed
            failure = SiteFailure(outcome.site, absence.number, "start", "unreachable", "its old process has answered")
            outcome = replace(outcome, result=None, failure=failure)
        if outcome.failure is None:
            self._enrol(outcome.result)
            self._returned.append(outcome.site)
            announce(self.listener, outcome.result)
            self.introduce()
            return
        later = absence.next_attempt(time.monotonic()) if outcome.failure.kind == "unreachable" else None
        if later is not None:
            self._absent[outcome.site] = later
            return
        failure = replace(outcome.failure, round_number=absence.number)
        self.failures.append(failure)
        self.listener.on_failure(failure, Decision.SKIP if absence.stays else Decision.DROP)
        if not absence.stays:
            self.drop(outcome.site, f"did not come back: {failure.message}")

    def wait_for_absent(self, wait_s: float, *, is_enough: Callable[[], bool]) -> None:
        """Waits for absent sites for a while, or until it is enough; what else arrives is kept."""
        until = time.monotonic() + wait_s
        while self._absent and not is_enough():
            self._strays.extend(self.poll(min(POLL_S, max(0.0, until - time.monotonic()))))
            if time.monotonic() >= until:
                break

    def wait_for_strays(self) -> None:
        """Waits a moment for whatever comes, and keeps it."""
        self._strays.extend(self.poll())

    def end_rounds(self) -> None:
        """From now on nobody waits for the server, every failure is a reason to restart, and none to give a site up."""
        self._is_over, self._returned = True, []
        self.forget(SERVER)

    def forget(self, name: str) -> None:
        """Nobody waits any more for a site, or for the server."""
        self._absent.pop(name, None)
        self._calls = {key: call for key, call in self._calls.items() if key[0] != name}

    # --- leaving and joining -----------------------------------------------------------------

    def drop(self, name: str, reason: str) -> None:
        """Goes on without a site; raises ClusterError without its server."""
        if name == SERVER:
            raise server_error(reason, self.config.output.folder)
        log.warning("site %s is dropped: %s", name, reason)
        self.pool.remove(name)
        if member := self.members.pop(name, None):
            self.past_rounds[name] = member.checkpoint_round
        self.forget(name)
        self.dropped[name] = reason

    def join(self, name: str, *, number: int, checkpoint_round: int) -> None:
        """A site takes part from now on, as soon as it has loaded its data."""
        self.dropped.pop(name, None)
        self.pool.add(name)
        timeout_s = self.config.federation.start_timeout_s
        self._absent[name] = Absence(number, time.monotonic() + timeout_s)
        self._ask_to_start(name, number, at=checkpoint_round, timeout_s=timeout_s)
