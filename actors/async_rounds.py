"""Rounds without a barrier: every site goes at its own pace, and pushes land in mailboxes while their receivers train.

Each site counts its own rounds. When one is done, the site trains on at once; beside that it pushes what it has
published, to the receivers that the gossip graph of its next round gives it (so with equal speeds the graphs are
those of synchronous rounds). What arrives is used in the receiver's next round. A sender whose last push is still on
its way skips one, and nobody pushes to a receiver that did not answer the last time until it has reported a round.

The driver writes a record as soon as a site reports a second time since the last one: no site is ever more than one
round ahead of what is on disk, which is what a resume relies on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from actors.listener import announce
from actors.pace import CallKind
from actors.site_pool import Outcome
from gcml_ray.gossip.phases import order_of, phase_of
from gcml_ray.push.wire import UNREACHABLE
from gcml_ray.records import Edge, PushReceipt, RoundPlan, RoundRecord, TrainReport

if TYPE_CHECKING:
    from actors.driver import Driver


@dataclass
class _Window:
    """What has come in since the last record."""

    began: float = field(default_factory=time.perf_counter)
    trained: dict[str, TrainReport] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    pushes: list[PushReceipt] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.trained or self.pushes)


class AsyncRounds:
    """The rounds of all sites, each at its own pace."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.config = driver.config
        self.roster = driver.roster
        self.is_over = False
        self._done = {name: member.checkpoint_round for name, member in self.roster.members.items()}
        self._pushed: dict[str, int] = {}  # after which of its rounds a site has pushed last
        self._silent: set[str] = set()  # receivers that have not answered a push, and reported no round since
        self._window = _Window()

    def run(self, done: int) -> int:
        """See :class:`actors.driver.Rounds`."""
        driver, roster = self.driver, self.roster
        driver.last_record = done
        self._announce()
        while roster.members and not self._all_done() and not (driver.stop.is_set() or driver.is_time_up()):
            driver.follow_requests(driver.last_record + 1)
            self._welcome()
            self._order_all()
            self._take_in(roster.poll())
        self._drain()
        if not self._window.is_empty or roster.failures:
            self._close_window()
        self.is_over = self._all_done() or driver.is_time_up()
        return driver.last_record

    def _all_done(self) -> bool:
        """Whether every site has done all its rounds, those that are joining included."""
        if self.roster.absent - self.roster.members.keys():
            return False
        return all(self._done.get(name, 0) >= self.config.federation.rounds for name in self.roster.members)

    def _welcome(self) -> None:
        """Sites that came back go on from their checkpoint."""
        for name in self.roster.take_returned():
            self._done[name] = self.roster.members[name].checkpoint_round
            self._silent.discard(name)

    def _drain(self) -> None:
        """Waits for the rounds in flight, and for the receipts of the last pushes."""
        roster = self.roster
        while any(roster.is_busy(name) or roster.has_open_push(name) for name in roster.members):
            self._take_in(self.roster.poll())

    # --- asking ------------------------------------------------------------------------------

    def _order_all(self) -> None:
        """Every site that is free pushes and trains on."""
        for name in self.roster.present:
            number = self._done.setdefault(name, 0) + 1
            if number <= self.config.federation.rounds:
                self._push(name, number)
                self._train(name, number)

    def _push(self, sender: str, number: int) -> None:
        """The pushes of one sender before its round ``number``, as the graph of that round over all sites says."""
        federation = self.config.federation
        done = self._done[sender]
        if phase_of(federation, number) != "exchange" or self.roster.has_open_push(sender):
            return
        if self._pushed.get(sender) == done:  # its round failed and is done again; the others have these weights
            return
        here = [name for name in sorted(self.roster.members) if name not in self.roster.absent]
        plan = self.driver.plan(number, here)
        receivers = [edge.receiver for edge in plan.edges if edge.sender == sender and self._can_use(edge.receiver)]
        if not receivers:
            return
        self._window.edges += [Edge(sender, receiver) for receiver in receivers]
        self._pushed[sender] = done
        self.roster.submit_sending(sender, "push", done, tuple(receivers), number=done)

    def _can_use(self, receiver: str) -> bool:
        """Whether a receiver answers, and the round that it will do after its present one has an exchange."""
        if receiver in self._silent:
            return False
        number = self._done.get(receiver, 0) + (2 if self.roster.is_busy(receiver) else 1)
        federation = self.config.federation
        return number <= federation.rounds and phase_of(federation, number) == "exchange"

    def _train(self, name: str, number: int) -> None:
        order = order_of(self.config, number)
        kind = CallKind("train", order.evaluate, order.phase == "exchange")
        limit_s = self.config.federation.round_timeout_s
        self.roster.submit(name, "train", order, number=number, kind=kind, limit_s=limit_s)

    # --- what comes in -----------------------------------------------------------------------

    def _take_in(self, outcomes: list[Outcome]) -> None:
        """Books what sites have answered."""
        for outcome in outcomes:
            if outcome.failure is not None:
                self.roster.handle(outcome.failure)
            elif outcome.method == "push":
                self._window.pushes += outcome.result.receipts
                self._silent |= {r.receiver for r in outcome.result.receipts if r.reason.startswith(UNREACHABLE)}
                self.driver.note_refusals(outcome.result.receipts)
            elif outcome.method == "train" and outcome.site in self.roster.members:
                announce(self.driver.listener, outcome.result)
                self._trained(outcome.result)

    def _trained(self, report: TrainReport) -> None:
        """A site has done a round."""
        if report.site in self._window.trained:
            self._close_window()
        self._window.trained[report.site] = report
        self._done[report.site] = report.round_number
        self._silent.discard(report.site)
        has_checkpoint = order_of(self.config, report.round_number).checkpoint
        self.roster.succeeded(report.site, report, has_checkpoint=has_checkpoint)
        if len(self._window.trained) == len(self.roster.members):
            self._close_window()

    def _close_window(self) -> None:
        """Everything since the last record becomes one."""
        window, self._window = self._window, _Window()
        number = self.driver.last_record + 1
        rounds = sorted(report.round_number for report in window.trained.values())
        middle = rounds[len(rounds) // 2] if rounds else min(number, self.config.federation.rounds)
        plan = RoundPlan(
            round_number=number,
            phase=phase_of(self.config.federation, middle),
            sites=tuple(sorted(window.trained)),
            edges=tuple(sorted(set(window.edges))),
        )
        self.driver.record(
            RoundRecord(
                plan=plan,
                trained=tuple(window.trained[name] for name in plan.sites),
                pushes=tuple(sorted(window.pushes, key=lambda push: (push.sender, push.receiver))),
                failures=self.roster.take_failures(),
                seconds=time.perf_counter() - window.began,
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )
        self._announce()

    def _announce(self) -> None:
        """Shows that the next record is being filled."""
        number = self.driver.last_record + 1
        phase = phase_of(self.config.federation, min(number, self.config.federation.rounds))
        self.driver.listener.on_round_begin(RoundPlan(number, phase, tuple(sorted(self.roster.members)), ()))
