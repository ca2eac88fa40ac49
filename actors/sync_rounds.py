"""Rounds with a barrier: with peers push, then train; with a server train, push, mean, push, adopt.

Nobody waits for a site that is being restarted, nor longer than patience allows for one that is late: what it
reports later counts for the round in which it comes. With a server all sites train first; what each has learnt goes
to the server, whose mean goes back to every living site. A site that failed is left out of the mean and still takes
part in what follows; one that joins, or comes back from an older checkpoint, gets the last mean before it trains.
Where the server fails, the sites go on with their own weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from actors.listener import announce
from actors.pace import CallKind
from actors.site_pool import Outcome
from gcml_ray.config import SERVER
from gcml_ray.gossip.phases import order_of, rounds_left
from gcml_ray.records import AdoptReport, Edge, PushReceipt, RoundPlan, RoundRecord, SiteInfo, TrainOrder, TrainReport

if TYPE_CHECKING:
    from actors.driver import Driver

RETURN_PATIENCE = 0.9  # of a round: how long a round's start is put off, once, for a site that is coming back
LEAST_PATIENCE_S = 1.0  # where rounds are shorter than that


@dataclass
class _Work:
    """What comes of a round's calls, and the seconds they took by stage."""

    trained: list[TrainReport] = field(default_factory=list)
    pushes: list[PushReceipt] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class SyncRounds:
    """All rounds of a run, one after the other."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.config = driver.config
        self.roster = driver.roster
        self.is_over = False
        self._orders: dict[str, TrainOrder] = {}
        self._means: dict[str, tuple[SiteInfo, int]] = {}  # see _mean_of
        self._waited_for: frozenset[str] = frozenset()
        self._round_seconds = 0.0

    def run(self, done: int) -> int:
        """See :class:`actors.driver.Rounds`."""
        rounds = self.config.federation.rounds
        rest = _Work()  # what comes after the last record
        for number in range(done + 1, rounds + 1):
            if self.driver.is_time_up():
                self._wait_for_late(rest)
                self.is_over = True
                break
            if not self._is_ready(number, rest):
                break
            work, rest = rest, _Work()
            self._round(number, work)
            done = number
        self.is_over = self.is_over or done == rounds
        self._take_strays(rest)
        self.driver.complete_record(rest.trained, self.roster.take_failures())
        return done

    def _is_ready(self, number: int, work: _Work) -> bool:
        """Applies joins, departures and late failures; False if no round can begin."""
        driver, roster = self.driver, self.roster
        if driver.stop.is_set():
            return False
        driver.follow_requests(number)
        if not rounds_left(self.config.federation, number - 1)["exchange"]:
            roster.forget(SERVER)  # what is still to come needs none
        new = roster.absent - self._waited_for
        patience_s = max(LEAST_PATIENCE_S, RETURN_PATIENCE * self._round_seconds) if new else 0.0
        roster.wait_for_absent(patience_s, is_enough=driver.stop.is_set)
        self._take_strays(work)  # a late failure may drop a site, which must not be planned
        self._waited_for = roster.absent
        has_to_wait_for_server = SERVER in roster.absent
        while roster.members and (not roster.present or has_to_wait_for_server) and not driver.stop.is_set():
            roster.wait_for_strays()
            self._take_strays(work)
            has_to_wait_for_server = SERVER in roster.absent
        return bool(roster.present) and not driver.stop.is_set()

    def _round(self, number: int, work: _Work) -> None:
        """Plan, exchange and train, record."""
        driver = self.driver
        began = time.perf_counter()
        plan = driver.plan(number, self.roster.present)
        missing = sorted(self.roster.members.keys() - set(plan.sites))
        left_out = {name: "restarting" if name in self.roster.absent else "busy" for name in missing}
        driver.listener.on_round_begin(plan)
        has_server = any(SERVER in (edge.sender, edge.receiver) for edge in plan.edges)
        plan = (self._server_round if has_server else self._peer_round)(plan, order_of(self.config, number), work)
        if number == self.config.federation.rounds:
            self._wait_for_late(work)
        self._round_seconds = time.perf_counter() - began
        driver.record(
            RoundRecord(
                plan=plan,
                trained=tuple(work.trained),
                pushes=tuple(work.pushes),
                failures=self.roster.take_failures(),
                seconds=self._round_seconds,
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
                stage_seconds=work.seconds,
                late=tuple(sorted(work.late)),
                left_out=left_out,
            )
        )

    def _wait_for_late(self, work: _Work) -> None:
        """After the last round: waits for late sites, as a busy site cannot be tested."""
        roster = self.roster
        while any(roster.is_busy(name) for name in roster.members):
            roster.wait_for_strays()
        self._take_strays(work)

    # --- the two kinds of round --------------------------------------------------------------

    def _peer_round(self, plan: RoundPlan, order: TrainOrder, work: _Work) -> RoundPlan:
        """Sites push to each other, if at all, then train. Returns the plan as it was carried out."""
        began = time.perf_counter()
        work.pushes += self._push(plan.edges, plan.round_number)
        plan = self._redraw(plan, work)
        pushed = time.perf_counter()
        receivers = {push.receiver for push in work.pushes if push.accepted}
        work.trained += self._train(plan.sites, order, work, receivers=receivers)
        work.seconds = {"push": pushed - began, "train": time.perf_counter() - pushed}
        return plan

    def _redraw(self, plan: RoundPlan, work: _Work) -> RoundPlan:
        """Where a site was lost while it pushed, the others find new partners in the same round.

        A graph over those that are left is drawn; of it, only the pushes of senders that have not sent yet, to
        receivers that have room.
        """
        left = [name for name in plan.sites if name in self.roster.present]
        lost = set(plan.sites) - set(left)
        broken = [edge for edge in plan.edges if lost & {edge.sender, edge.receiver}]
        if not broken:
            return plan
        sent = {push.sender for push in work.pushes if push.accepted}
        taken = [push.receiver for push in work.pushes if push.accepted]
        room = {name: self.config.method.max_incoming - taken.count(name) for name in left}
        edges = []
        for edge in self.driver.plan(plan.round_number, left).edges:
            if edge.sender not in sent and room[edge.receiver] > 0:
                room[edge.receiver] -= 1
                edges.append(edge)
        work.pushes += self._push(edges, plan.round_number)
        kept = [edge for edge in plan.edges if edge not in broken and edge not in edges]
        return replace(plan, edges=tuple(sorted([*kept, *edges])))

    def _server_round(self, plan: RoundPlan, order: TrainOrder, work: _Work) -> RoundPlan:
        """Sites validate and write their checkpoint as the order says, but after the exchange."""
        late_edges = self._bring_up_to_date(work)
        began = time.perf_counter()
        early = replace(order, evaluate=False, checkpoint=False)
        trained = self._train(plan.sites, early, work, receivers=set())
        ended = time.perf_counter()
        number = order.round_number
        if trained:
            work.pushes += self._push([Edge(report.site, SERVER) for report in trained], number)
            if self._ask([SERVER], "train", order, work):
                work.pushes += self._push([Edge(SERVER, site) for site in self.roster.present], number)
        exchanged = time.perf_counter()
        adopted = {report.site: report for report in self._ask(self.roster.present, "adopt", order, work)}
        work.trained += [_ended(report, adopted.get(report.site)) for report in trained]
        for report in work.trained:
            self.driver.listener.on_site_trained(report)
        work.seconds = {"train": ended - began, "push": exchanged - ended, "adopt": time.perf_counter() - exchanged}
        return replace(plan, edges=tuple(sorted([*plan.edges, *late_edges])))

    def _bring_up_to_date(self, work: _Work) -> list[Edge]:
        """Who has joined, or has come back from an older checkpoint, begins with the server's last mean, as all do.

        Returns:
            The pushes that this takes.
        """
        last, here = self._mean_of(SERVER), set(self.roster.present)
        behind = [name for name in self.roster.take_returned() if name in here and self._mean_of(name) < last]
        edges = [Edge(SERVER, name) for name in behind]
        if edges:
            work.pushes += self._push(edges, last)
            self._ask(behind, "adopt", replace(order_of(self.config, last), evaluate=False, checkpoint=False), work)
        return edges

    # --- calls -------------------------------------------------------------------------------

    def _push(self, edges: Sequence[Edge], number: int) -> list[PushReceipt]:
        """Every sender pushes to its receivers; a sender that fails is left with its weights unsent."""
        roster = self.roster
        receivers: dict[str, list[str]] = {}
        for edge in edges:
            receivers.setdefault(edge.sender, []).append(edge.receiver)
        for sender, names in receivers.items():
            roster.submit_sending(sender, "push", number, tuple(names), number=number)
        receipts: list[PushReceipt] = []
        for outcome in roster.gather(list(receivers), "push"):
            if outcome.failure:
                roster.handle(outcome.failure)
            else:
                receipts.extend(outcome.result.receipts)
        self.driver.note_refusals(receipts)
        return sorted(receipts, key=lambda receipt: (receipt.sender, receipt.receiver))

    def _train(self, sites: Sequence[str], order: TrainOrder, work: _Work, *, receivers: set[str]) -> list[TrainReport]:
        """Every site that is still there trains."""
        present = set(self.roster.present)
        names = [name for name in sites if name in present]
        return self._ask(names, "train", order, work, receivers=receivers)

    def _ask(
        self, names: Sequence[str], stage: str, order: TrainOrder, work: _Work, *, receivers: set[str] | None = None
    ) -> list[Any]:
        """The results of one call to each of these sites; who fails or is late is left out."""
        federation = self.config.federation
        kinds = {name: CallKind(stage, order.evaluate, name in (receivers or ())) for name in names}
        for name, kind in kinds.items():
            self._orders[name] = order
            self.roster.submit(
                name, stage, order, number=order.round_number, kind=kind, limit_s=federation.round_timeout_s
            )
        patience_s = self._patience_s(kinds, order)
        outcomes = self.roster.gather(names, stage, patience_s=patience_s, announces=not self._has_adoption(order))
        work.late += [name for name in names if self.roster.is_busy(name)]
        return [outcome.result for outcome in outcomes if self._took(outcome)]

    def _patience_s(self, kinds: dict[str, CallKind], order: TrainOrder) -> float | None:
        """How long to wait for these calls; in the last round, and for the server, as long as it takes."""
        federation = self.config.federation
        if not self.roster.pool.is_parallel or SERVER in kinds or order.round_number == federation.rounds:
            return None
        limits = (self.roster.pace.patience_s(kinds), federation.round_deadline_s)
        return min((limit for limit in limits if limit is not None), default=None)

    def _took(self, outcome: Outcome) -> bool:
        """Notes how a call ended; False where it failed."""
        if outcome.failure is not None:
            self.roster.handle(outcome.failure)
            return False
        if not self.roster.is_known(outcome.site):
            return False
        order = self._orders[outcome.site]
        if outcome.result.round_number != order.round_number:  # it was late, and has had another order since
            return True
        if outcome.method == "adopt" or outcome.site == SERVER or not self._has_adoption(order):
            self.roster.succeeded(outcome.site, outcome.result, has_checkpoint=order.checkpoint)
            self._note_mean(outcome)
        return True

    def _note_mean(self, outcome: Outcome) -> None:
        """Notes that the server, or a site, has the mean of a round now, as long as its process lives."""
        if outcome.site == SERVER or (isinstance(outcome.result, AdoptReport) and outcome.result.has_adopted):
            info = self.roster.member(outcome.site).info
            self._means[outcome.site] = (info, outcome.result.round_number)

    def _mean_of(self, name: str) -> int:
        """Round of the newest mean that the server, or a site, holds: got since its start, else from its checkpoint."""
        info = self.roster.member(name).info
        started, number = self._means.get(name, (None, 0))
        return number if started is info else info.restored_round

    def _has_adoption(self, order: TrainOrder) -> bool:
        """Whether more is to follow after training in this round."""
        return self.roster.server is not None and order.phase == "exchange"

    def _take_strays(self, work: _Work) -> None:
        """What late sites have reported since they were waited for."""
        for outcome in self.roster.take_strays():
            if outcome.method in ("train", "adopt") and self._took(outcome) and isinstance(outcome.result, TrainReport):
                announce(self.driver.listener, outcome.result)
                work.trained.append(outcome.result)


def _ended(report: TrainReport, adopted: AdoptReport | None) -> TrainReport:
    """Train report and adopt report as one."""
    if adopted is None:
        return report
    stages = {*report.seconds, *adopted.seconds}
    return replace(
        report,
        peers=(SERVER,) if adopted.has_adopted else (),
        merge="server" if adopted.has_adopted else "",
        validation_dice=adopted.validation_dice,
        is_best=adopted.is_best,
        seconds={stage: report.seconds.get(stage, 0.0) + adopted.seconds.get(stage, 0.0) for stage in sorted(stages)},
        peak_memory_bytes=max(report.peak_memory_bytes, adopted.peak_memory_bytes),
    )
