"""The driver: samples the gossip graph, asks the sites, keeps the records. It never holds weights.

Every answer of a site is a small record or a failure; what to do about a failure is decided in
``failure_policy.py``, and who is here, busy or absent is kept in ``roster.py``. The rounds themselves are in
``sync_rounds.py`` and ``async_rounds.py``, the test after them in ``final_test.py``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from actors.async_rounds import AsyncRounds
from actors.attendance import Attendance, are_rounds_over, check_schedule
from actors.final_test import FinalTest
from actors.listener import Listener
from actors.roster import Roster
from actors.site_pool import SitePool
from actors.sync_rounds import SyncRounds
from gcml_ray.config import SERVER, Config, UsefulnessTopology, has_server
from gcml_ray.errors import CheckpointError
from gcml_ray.files.run_folder import RunFolder, RunState
from gcml_ray.gossip.graph import plan_round
from gcml_ray.gossip.phases import rounds_left
from gcml_ray.gossip.teaching import usefulness_weights
from gcml_ray.gossip.trust import trust_of_edges
from gcml_ray.records import (
    EvaluationReport,
    PushReceipt,
    RoundPlan,
    RoundRecord,
    RunOutcome,
    RunStatus,
    SiteFailure,
    SiteInfo,
    TrainReport,
    lost_sites,
)
from gcml_ray.tracking.run import Tracker

log = logging.getLogger(__name__)

REMEMBERED_ROUNDS = 50  # what peer choice looks back on; keeps the driver's memory flat


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. ``status``: finished, stopped (asked to) or failed (no site is left, or none has trained).

    ``untested``: what the sites that took part to the end have not scored, see :class:`actors.final_test.FinalTest`.
    """

    status: RunOutcome
    last_round: int
    infos: tuple[SiteInfo, ...]
    evaluations: tuple[EvaluationReport, ...]
    dropped: dict[str, str]
    start_seconds: float
    seconds: float
    untested: tuple[str, ...] = ()


class Rounds(Protocol):
    """All rounds of a run, with or without a barrier."""

    def run(self, done: int) -> int:
        """The rounds after ``done``, until the last one, a stop, the time limit or the loss of every site.

        Returns:
            The number of the last record.
        """
        ...

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do: all rounds are done, or their time is up."""
        ...


class Driver:
    """Runs one federation over a pool of sites.

    Args:
        config: the federation's configuration.
        pool: where the sites live.
        folder: the run folder.
        tracker: gets the records of every round.
        listener: shows what happens.
        stop: set from outside to end the run after the round in flight.
    """

    def __init__(
        self,
        config: Config,
        pool: SitePool,
        folder: RunFolder,
        *,
        tracker: Tracker,
        listener: Listener,
        stop: threading.Event,
    ) -> None:
        self.config = config
        self.folder = folder
        self.tracker = tracker
        self.listener = listener
        self.stop = stop
        self.roster = Roster(config, pool, listener)
        self.attendance = Attendance(config, folder, self.roster)
        self.recent: deque[RoundRecord] = deque(maxlen=REMEMBERED_ROUNDS)
        self.last_record = 0
        self.has_trained = False  # any site, in any round of the run
        self._resumable = 0
        self._written: RunState | None = None
        self._seconds_before = 0.0  # of rounds before a resume
        self._rounds_began = 0.0

    # --- the run -----------------------------------------------------------------------------

    def run(
        self, sites: Sequence[str], *, resume: RunState | None, test: bool = True, finish: bool = False
    ) -> RunSummary:
        """All rounds from the first, or from where ``resume`` says, and the test at the end.

        Args:
            sites: names of the sites.
            resume: the state of an earlier run in the same folder.
            test: whether test cases are scored at the end; a search must not look at them.
            finish: train no round that is left: the run to resume ends with the models as they are.

        Raises:
            SiteError: a site cannot start; bad input is for the user to mend.
            CheckpointError: every site of the run to resume has left.
        """
        began = time.perf_counter()
        done = resume.last_complete_round if resume else 0
        if resume:
            self._check_records()  # before sites load their data
        if not self._start(sites, resume):
            seconds = time.perf_counter() - began
            return RunSummary("stopped", done, (), (), self.roster.dropped, seconds, seconds)
        self.tracker.log_sites([member.info for member in self.roster.members.values()])
        start_seconds = time.perf_counter() - began
        if resume:
            self._remember(done)
        self._rounds_began = time.monotonic()
        self.last_record = self._resumable = done
        self.write_state("running")
        is_over = resume is not None and (finish or are_rounds_over(self.config, resume))
        try:
            if not is_over:
                rounds = self._make_rounds()
                done = rounds.run(done)
                is_over = rounds.is_over
            status: RunOutcome = "failed" if not self.roster.members else "finished" if is_over else "stopped"
            if status == "finished" and done > 0 and not self.has_trained:
                log.warning("no site has trained in any round: their models are the initial ones, and are not tested")
                status = "failed"
            final = FinalTest(self)
            if status == "finished":
                self.attendance.close()
            if test and status == "finished":
                final.run(done)
                status = "finished" if self.roster.members else "failed"
        except KeyboardInterrupt:
            self._write_stopped()
            raise
        self.write_state(status)
        infos = tuple(member.info for member in self.roster.members.values())
        seconds = time.perf_counter() - began
        evaluations, dropped = tuple(final.reports), self.roster.dropped
        return RunSummary(status, done, infos, evaluations, dropped, start_seconds, seconds, final.untested)

    def _check_records(self) -> None:
        """Reads what a resume builds on; CheckpointError where that is damaged."""
        self.folder.rounds()
        self.folder.cases()

    def _remember(self, done: int) -> None:
        """Goes back to the records of a round; where they end before it, that is said."""
        self.folder.truncate_after(done)
        rounds = self.folder.rounds()
        self.recent.extend(rounds[-REMEMBERED_ROUNDS:])
        self.has_trained = done > 0 and (not rounds or any(record.trained for record in rounds))
        self._seconds_before = sum(record.seconds for record in rounds)
        if (last := rounds[-1].plan.round_number if rounds else 0) < done:
            log.warning(
                "%s ends at round %d, the run was at round %d: what the rounds between were stays unknown, in tables, "
                "plots and the choice of peers",
                self.folder.rounds_file,
                last,
                done,
            )

    def _make_rounds(self) -> Rounds:
        """Rounds with a barrier or without."""
        return SyncRounds(self) if self.config.federation.mode == "sync" else AsyncRounds(self)

    def is_time_up(self) -> bool:
        """Whether no further round may begin; a run that has ended so before goes on with its test alone."""
        limit_s = self.config.federation.time_limit_s
        gone_s = self._seconds_before + time.monotonic() - self._rounds_began
        return limit_s is not None and gone_s >= limit_s

    def _start(self, sites: Sequence[str], resume: RunState | None) -> bool:
        """Launches all sites at once and waits until the last one is ready; False where it is told to stop before."""
        check_schedule(self.config, sites)
        self.roster.dropped = dict(resume.dropped) if resume else {}
        self.roster.past_rounds = dict(resume.site_rounds) if resume else {}
        living = [site for site in self.attendance.at_start(sites, resume) if site not in self.roster.dropped]
        living = living or self._given_up()
        self.listener.on_start(self.config, living)
        last = resume.last_complete_round if resume else 0
        needs_server = has_server(self.config.method) and rounds_left(self.config.federation, last)["exchange"] > 0
        names = [*living, SERVER] if needs_server else living
        rounds = {name: resume.site_rounds.get(name, last) if resume else 0 for name in names}
        self.roster.start(names, rounds)
        self.tracker.start(self.config)  # while the sites load
        return self.roster.wait_for_start(names, rounds, self.stop.is_set)

    def _given_up(self) -> list[str]:
        """If no site is left: the dropped ones, to be tried again, but not those that left on purpose.

        Raises:
            CheckpointError: all of them left on purpose.
        """
        reasons = "; ".join(f"{site}: {reason}" for site, reason in self.roster.dropped.items())
        again = sorted(lost_sites(self.roster.dropped))
        if not again:
            raise CheckpointError(f"{self.folder.path} cannot be resumed, all its sites have left ({reasons})")
        log.warning("all sites were given up and are tried again (%s)", reasons)
        for site in again:
            del self.roster.dropped[site]
        return again

    # --- what both kinds of rounds need ------------------------------------------------------

    def follow_requests(self, number: int) -> None:
        """Sites join and leave before a round; who has left on request is not back after a resume either."""
        if self.attendance.apply(number):
            self.write_state("running")
            self.attendance.clear_requests()

    def plan(self, number: int, sites: Sequence[str]) -> RoundPlan:
        """The graph of a round over these sites; peers' past decides as far as the topology lets it."""
        topology = getattr(self.config.method, "topology", None)
        usefulness = None
        if isinstance(topology, UsefulnessTopology):
            usefulness = usefulness_weights(self.recent, topology, sites)
        return plan_round(
            self.config.method,
            self.config.federation,
            round_number=number,
            num_train={name: self.roster.members[name].info.num_train for name in sites},
            usefulness=usefulness,
            trust=trust_of_edges(self.recent),
        )

    def note_refusals(self, receipts: Sequence[PushReceipt]) -> None:
        """Refused pushes are for the log."""
        for receipt in receipts:
            if not receipt.accepted:
                log.warning(
                    "round %d: %s refused the push of %s: %s",
                    receipt.round_number,
                    receipt.receiver,
                    receipt.sender,
                    receipt.reason,
                )

    def record(self, record: RoundRecord) -> None:
        """A round is over: to disk, to the tracker, to whoever watches."""
        self.folder.check_present()
        self.folder.append_round(record)
        self.recent.append(record)
        self.has_trained = self.has_trained or bool(record.trained)
        self.last_record = record.plan.round_number
        self.write_state("running")
        self.tracker.log_round(record)
        self.listener.on_round_end(record)

    def complete_record(self, trained: Sequence[TrainReport], failures: Sequence[SiteFailure]) -> None:
        """What sites have reported since the last record, and what has failed, goes into it, as none follows."""
        if not (trained or failures) or not self.recent:
            return
        last = self.recent.pop()
        record = replace(last, trained=(*last.trained, *trained), failures=(*last.failures, *failures))
        self.recent.append(record)
        self.has_trained = self.has_trained or bool(trained)
        self.folder.replace_last_round(record)
        self.write_state("running")
        self.tracker.log_round(record)

    def write_state(self, status: RunStatus) -> None:
        """Where a resume goes on: with a barrier at the newest checkpoint of any site, else after the last record."""
        rounds = {name: member.checkpoint_round for name, member in self.roster.members.items()}
        newest = self.last_record
        if self.config.federation.mode == "sync":
            self._resumable = newest = max(self._resumable, *rounds.values(), 0)
        self._write(status, newest, rounds)

    def _write_stopped(self) -> None:
        """A stop between two records: what sites have done since the last one is done again; who is here, is as now."""
        assert self._written is not None
        known = self.roster.past_rounds | self._written.site_rounds
        rounds = {name: known.get(name, 0) for name in self.roster.members}
        self._write("stopped", self._written.last_complete_round, rounds)

    def _write(self, status: RunStatus, newest: int, rounds: dict[str, int]) -> None:
        """The state, with the newest checkpoint of each member, if it is another than on disk."""
        joining = sorted(self.roster.absent - rounds.keys() - {SERVER})
        alive = (*self.roster.members, *joining)
        site_rounds = dict.fromkeys(joining, 0) | self.roster.past_rounds | rounds
        followed = self.attendance.followed if self.attendance.followed < newest else None
        dropped = dict(self.roster.dropped)
        state = RunState(newest, status, alive, site_rounds, dropped, followed)
        if state != self._written:  # all sites wait while the disk does
            self.folder.write_state(state)
            self._written = state
