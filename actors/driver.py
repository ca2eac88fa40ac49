"""The driver: samples the gossip graph, asks the sites, keeps the records. It never holds weights.

The protocol of a synchronous round (architecture, "A round"): plan, push, train, record. Every answer of
a site is a small record or a failure; what to do about a failure is decided in ``failure_policy.py``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from actors.failure_policy import Decision, History, decide, start_error
from actors.listener import Listener
from actors.local_pool import Outcome, SitePool
from actors.round_calls import peer_round, server_round
from gcml_ray.config import SERVER, Config, has_server, has_two_models
from gcml_ray.errors import CheckpointError, SiteError
from gcml_ray.gossip import phase_of, plan_round
from gcml_ray.records import (
    BEFORE_GOSSIP,
    PERSONALISED,
    AdoptReport,
    Edge,
    EvaluationReport,
    PushReceipt,
    RoundRecord,
    SiteFailure,
    SiteInfo,
    TrainOrder,
    TrainReport,
    by_site,
)
from gcml_ray.run_folder import RunFolder, RunState
from gcml_ray.tracking import Tracker

log = logging.getLogger(__name__)

POLL_S = 0.5
START_ATTEMPTS = 5  # the first call after a restart may still go to the process that is ending


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. ``status``: finished, stopped (asked to) or failed (no site left)."""

    status: str
    last_round: int
    infos: tuple[SiteInfo, ...]
    evaluations: tuple[EvaluationReport, ...]
    dropped: dict[str, str]
    start_seconds: float
    seconds: float


@dataclass
class _Site:
    """What the driver knows of one site."""

    info: SiteInfo
    history: History = field(default_factory=History)
    checkpoint_round: int = 0


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
        self.pool = pool
        self.folder = folder
        self.tracker = tracker
        self.listener = listener
        self.stop = stop
        self.sites: dict[str, _Site] = {}
        self.server: _Site | None = None
        self.dropped: dict[str, str] = {}
        self.resumable = 0

    # --- the run -----------------------------------------------------------------------------

    def run(self, sites: Sequence[str], *, resume: RunState | None, test: bool = True) -> RunSummary:
        """All rounds from the first, or from where ``resume`` says, and the test at the end.

        Args:
            sites: names of the sites.
            resume: the state of an earlier run in the same folder.
            test: whether test cases are scored at the end; a search must not look at them.

        Raises:
            SiteError: a site cannot start; bad input is for the user to mend.
            CheckpointError: every site of the run to resume was dropped.
        """
        began = time.perf_counter()
        done = self.resumable = resume.last_complete_round if resume else 0
        self.dropped = dict(resume.dropped) if resume else {}
        self._start(sites, resume)
        self.tracker.log_sites([site.info for site in self.sites.values()])
        start_seconds = time.perf_counter() - began
        if resume:
            self.folder.truncate_after(done)
        self._write_state(done, "running")
        try:
            done = self._rounds(done)
            is_over = done == self.config.federation.rounds
            status = "failed" if not self.sites else "finished" if is_over else "stopped"
            evaluations = self._test() if test and status == "finished" else ()
        except KeyboardInterrupt:
            self._write_state(self._resume_round(), "stopped")
            raise
        self._write_state(self._resume_round(), status)
        infos = tuple(site.info for site in self.sites.values())
        return RunSummary(status, done, infos, evaluations, self.dropped, start_seconds, time.perf_counter() - began)

    def _rounds(self, done: int) -> int:
        """The rounds after ``done``, until the last one, a stop, or the loss of every site; the last one done."""
        for number in range(done + 1, self.config.federation.rounds + 1):
            if self.stop.is_set() or not self.sites:
                break
            self._round(number)
            done = number
        return done

    def _start(self, sites: Sequence[str], resume: RunState | None) -> None:
        """Launches all sites at once and waits until the last one is ready."""
        living = [site for site in sites if site not in self.dropped]
        if not living:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in self.dropped.items())
            raise CheckpointError(
                f"{self.folder.path} cannot be resumed, all its sites were dropped ({reasons}). "
                "Mend their cause and start anew in another output.folder"
            )
        self.listener.on_start(self.config, living)
        names = [*living, SERVER] if has_server(self.config.method) else living
        self.pool.launch(names)
        for name in names:
            at = resume.site_rounds.get(name, resume.last_complete_round) if resume else 0
            self.pool.start(name, resume_round=at)
        self.tracker.start(self.config)  # while the sites load
        outcomes = self._gather(names, timeout_s=self.config.federation.start_timeout_s, stage="start", number=0)
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        if failures:
            raise start_error(failures)
        infos = [outcome.result for outcome in outcomes]
        started = {info.site: _Site(info, checkpoint_round=info.restored_round) for info in infos}
        self.server = started.pop(SERVER, None)
        self.sites = started

    # --- one round ---------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        """Plan, exchange and train, record."""
        began = time.perf_counter()
        plan = plan_round(
            self.config.method,
            self.config.federation,
            round_number=number,
            num_train={name: site.info.num_train for name, site in self.sites.items()},
        )
        self.listener.on_round_begin(plan)
        failures: list[SiteFailure] = []
        one_round = server_round if self.server and plan.phase == "exchange" else peer_round
        work = one_round(self, plan, self._order(number), failures)
        record = RoundRecord(
            plan=plan,
            trained=work.trained,
            pushes=work.pushes,
            failures=tuple(failures),
            seconds=time.perf_counter() - began,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            stage_seconds=work.seconds,
        )
        self.folder.append_round(record)
        self._write_state(self._resume_round(), "running")
        self.tracker.log_round(record)
        self.listener.on_round_end(record)

    def push(self, edges: Sequence[Edge], number: int, failures: list[SiteFailure]) -> tuple[PushReceipt, ...]:
        """Every sender pushes to its receivers; a sender that fails is left with its weights unsent."""
        receivers: dict[str, list[str]] = {}
        for edge in edges:
            receivers.setdefault(edge.sender, []).append(edge.receiver)
        for sender, names in receivers.items():
            self.pool.submit(sender, "push", number, tuple(names), round_number=number)
        timeout_s = self.config.federation.push_timeout_s
        outcomes = self._gather(list(receivers), timeout_s=timeout_s, stage="push", number=number)
        receipts: list[PushReceipt] = []
        for outcome in outcomes:
            if outcome.failure:
                self._handle(outcome.failure, failures)
            else:
                receipts.extend(outcome.result.receipts)
        for receipt in receipts:
            if not receipt.accepted:
                log.warning(
                    "round %d: %s refused the push of %s: %s",
                    receipt.round_number,
                    receipt.receiver,
                    receipt.sender,
                    receipt.reason,
                )
        return tuple(sorted(receipts, key=lambda receipt: (receipt.sender, receipt.receiver)))

    def train(
        self, sites: Sequence[str], order: TrainOrder, failures: list[SiteFailure], *, ends_round: bool
    ) -> tuple[TrainReport, ...]:
        """Every living site trains. ``ends_round``: whether the sites' reports are whole, or more is to follow."""
        names = [name for name in sites if name in self.sites]
        return tuple(self._ask(names, "train", order, failures, ends_round=ends_round))

    def form_mean(self, order: TrainOrder, failures: list[SiteFailure]) -> bool:
        """The server forms the mean of what it has received; False where it cannot."""
        return bool(self._ask([SERVER], "train", order, failures, ends_round=True))

    def adopt(self, order: TrainOrder, failures: list[SiteFailure]) -> dict[str, AdoptReport]:
        """Every living site takes over what the server has sent, and ends its round."""
        reports = self._ask(list(self.sites), "adopt", order, failures, ends_round=True)
        return {report.site: report for report in reports}

    def _ask(
        self, names: Sequence[str], stage: str, order: TrainOrder, failures: list[SiteFailure], *, ends_round: bool
    ) -> list[Any]:
        """The results of one call to each of these sites; who fails or is late is left out."""
        number = order.round_number
        for name in names:
            self.pool.submit(name, stage, order, round_number=number)
        timeout_s = self.config.federation.round_timeout_s
        results = []
        for outcome in self._gather(names, timeout_s=timeout_s, stage=stage, number=number, announces=ends_round):
            if outcome.failure:
                self._handle(outcome.failure, failures)
                continue
            results.append(outcome.result)
            site = self._member(outcome.site)
            if ends_round:
                site.history = replace(site.history, failures_in_a_row=0)
            if order.checkpoint:
                site.checkpoint_round = number
        return results

    def _order(self, number: int) -> TrainOrder:
        """Evaluation and checkpoints by their rhythm, and always where a phase or the run ends."""
        federation = self.config.federation
        last = number == federation.rounds
        ends_warmup = number == federation.num_warmup
        return TrainOrder(
            round_number=number,
            phase=phase_of(federation, number),
            evaluate=number % federation.evaluate_every == 0 or ends_warmup or last,
            checkpoint=number % self.config.output.checkpoint_every == 0 or last,
        )

    # --- calls and failures ------------------------------------------------------------------

    def _member(self, name: str) -> _Site:
        """A site, or the server."""
        if name == SERVER:
            assert self.server is not None
            return self.server
        return self.sites[name]

    def _gather(
        self, sites: Sequence[str], *, timeout_s: float, stage: str, number: int, announces: bool = True
    ) -> list[Outcome]:
        """Waits for one outcome of every site; who does not answer in time becomes a failure of kind ``late``."""
        waiting = set(sites)
        outcomes: list[Outcome] = []
        deadline = time.monotonic() + timeout_s * (1 if self.pool.is_parallel else len(waiting))
        while waiting and time.monotonic() < deadline:
            for outcome in self.pool.wait(POLL_S):
                if outcome.site in waiting and outcome.method == stage:
                    waiting.discard(outcome.site)
                    outcomes.append(outcome)
                    if announces and outcome.site != SERVER:
                        self._announce(outcome)
            self.listener.on_status(self.pool.statuses())
        for site in sorted(waiting):
            message = f"no answer within {timeout_s:g} s"
            outcomes.append(Outcome(site, stage, failure=SiteFailure(site, number, stage, "late", message)))
        return sorted(outcomes, key=lambda outcome: outcome.site)

    def _announce(self, outcome: Outcome) -> None:
        """Shows a result as soon as it is there."""
        if isinstance(outcome.result, SiteInfo):
            self.listener.on_site_ready(outcome.result)
        elif isinstance(outcome.result, TrainReport):
            self.listener.on_site_trained(outcome.result)
        elif isinstance(outcome.result, EvaluationReport):
            for report in by_site(outcome.result):
                self.listener.on_evaluated(report)

    def _handle(self, failure: SiteFailure, failures: list[SiteFailure]) -> None:
        """Records a failure and does what the policy says."""
        failures.append(failure)
        site = self._member(failure.site)
        decision = decide(failure, site.history)
        log.warning(
            "site %s failed in round %d, %s (%s): %s -> %s",
            failure.site,
            failure.round_number,
            failure.stage,
            failure.kind,
            failure.message,
            decision.value,
        )
        self.listener.on_failure(failure, decision)
        site.history = replace(site.history, failures_in_a_row=site.history.failures_in_a_row + 1)
        if decision is Decision.RESTART:
            site.history = replace(site.history, restarts=site.history.restarts + 1)
            self._restart(failure, failures)
        elif decision is Decision.DROP:
            self._drop(failure.site, f"{failure.stage}, {failure.kind}: {failure.message}")

    def _restart(self, failure: SiteFailure, failures: list[SiteFailure]) -> None:
        """New process for a site, restored from its newest checkpoint; a site that cannot come back is dropped.

        The round is the newest that the site has told of: a file of a later one may be left from before a resume.
        """
        name, number, last = failure.site, failure.round_number, failure
        self.pool.restart(name)
        for _ in range(START_ATTEMPTS):
            self.pool.start(name, resume_round=self._member(name).checkpoint_round)
            timeout_s = self.config.federation.start_timeout_s
            (outcome,) = self._gather([name], timeout_s=timeout_s, stage="start", number=number)
            if outcome.failure is None:
                self._member(name).info = outcome.result
                return
            last = replace(outcome.failure, round_number=number)
            if last.kind != "unreachable":
                break
        failures.append(last)
        self.listener.on_failure(last, Decision.DROP)
        self._drop(name, f"did not come back: {last.message}")

    def _drop(self, name: str, reason: str) -> None:
        """Goes on without a site; without its server a federation cannot go on."""
        if name == SERVER:
            raise SiteError(SERVER, 0, "round", f"the server is lost ({reason}): resume the run where it stopped")
        log.warning("site %s is dropped: %s", name, reason)
        self.pool.remove(name)
        del self.sites[name]
        self.dropped[name] = reason

    # --- the end -----------------------------------------------------------------------------

    def _test(self) -> tuple[EvaluationReport, ...]:
        """Every site scores its personalised model, and its own model before gossip, on its test cases."""
        models = [PERSONALISED]
        if 0 < self.config.federation.num_warmup < self.config.federation.rounds:
            models.append(BEFORE_GOSSIP)
        if has_two_models(self.config.method):
            models.append("shared")
        reports: list[EvaluationReport] = []
        number = self.config.federation.rounds
        for model in models:
            names = list(self.sites)
            for name in names:
                self.pool.submit(name, "evaluate", "test", model, round_number=number)
            timeout_s = self.config.federation.round_timeout_s
            for outcome in self._gather(names, timeout_s=timeout_s, stage="evaluate", number=number):
                if outcome.failure:
                    log.warning("site %s was not evaluated: %s", outcome.site, outcome.failure.message)
                    self.listener.on_failure(outcome.failure, Decision.SKIP)
                else:
                    reports.extend(by_site(outcome.result))
                    self.folder.write_cases(outcome.result.scores)
        self.tracker.log_scores(reports)
        return tuple(reports)

    def _resume_round(self) -> int:
        """The newest round from which the run could go on: the newest checkpoint of any site."""
        self.resumable = max((site.checkpoint_round for site in self.sites.values()), default=self.resumable)
        return self.resumable

    def _write_state(self, resume_round: int, status: Any) -> None:
        rounds = {name: site.checkpoint_round for name, site in self.sites.items()}
        self.folder.write_state(RunState(resume_round, status, tuple(self.sites), rounds, self.dropped))
