"""A site: one hospital's data, model and mailbox. A plain class; ``actors/ray_pool.py`` makes it a Ray actor.

Its methods are called from several threads at a time: ``train``, ``adopt``, ``evaluate``, ``visit`` and
``score_visitor`` in one, ``push`` in one, ``receive`` in two, ``register`` and ``status`` in one more. What they share
is the mailbox (locked), the stop flag (an event) and the status (replaced whole).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.faulty_trainer import with_chaos
from actors.mailbox import Mailbox
from gcml_ray.config import SERVER, Config
from gcml_ray.config.wire import WireConfig
from gcml_ray.errors import SiteError
from gcml_ray.push.inbox import Inbox
from gcml_ray.push.outbox import Outbox
from gcml_ray.push.signing import SigningKey
from gcml_ray.push.wire import Buffer, Expectation, Payload, PushHeader, malformed
from gcml_ray.records import (
    AdoptReport,
    EvaluationReport,
    Peer,
    PushReceipt,
    PushReport,
    SiteInfo,
    SiteStatus,
    Split,
    TrainOrder,
    TrainReport,
)


class Transport(Protocol):
    """How a sender's buffer reaches its receivers."""

    def check_placement(self, site: str) -> None:
        """Called once in the site's own process; raises ClusterError where the site must not run."""
        ...

    def send(
        self, header: PushHeader, buffer: Payload, receivers: Sequence[str], *, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        """Delivers one buffer to every receiver; a receiver that does not answer gives a refused receipt."""
        ...


class Trainer(Protocol):
    """What a site needs of ``gcml_ray.training.trainer.SiteTrainer``; tests bring their own."""

    def start(self, *, resume_round: int) -> SiteInfo:
        """Loads data and model."""
        ...

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """The weights to push."""
        ...

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """What a sender's push must look like."""
        ...

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """One round."""
        ...

    def adopt(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> AdoptReport:
        """Ends a round with a server: takes over its weights."""
        ...

    def evaluate(self, *, split: Split, model: str) -> EvaluationReport:
        """Scores a model."""
        ...

    @property
    def visits(self) -> Visits | None:
        """Models that travel to be scored; None for a server, which has no cases."""
        ...


class Visits(Protocol):
    """What a site needs of ``gcml_ray.training.visits.Visits``."""

    def export(self, run_id: str) -> tuple[PushHeader, Buffer]:
        """The personalised model."""
        ...

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """What a visitor must look like."""
        ...

    def score(self, header: PushHeader, buffer: Buffer) -> EvaluationReport:
        """Scores a visitor."""
        ...


TrainerFactory = Callable[..., Trainer]
VISIT = "/visit"  # added to the run id of models sent to be scored, so that no other push is taken for one


class NotStartedError(Exception):
    """Raised where a site is asked to work before ``start``: Ray has replaced a process that died on its own."""

    @classmethod
    def of(cls, site: str) -> NotStartedError:
        """With the words for it: exceptions with arguments of their own do not survive pickling."""
        return cls(f"site {site} has a new process that was not started yet; the old one ended")


class StopRequestedError(Exception):
    """Raised inside a site's own work after ``stop``: the round is given up, its checkpoint stays."""


class Site:
    """One site of a federation, or its server: the same but for the trainer and the room in its mailbox.

    Args:
        config: the federation's configuration.
        name: this site's name.
        folder: the run folder on this site's disk.
        run_id: identifies the run on every push.
        use_gpu: whether a GPU was granted.
        make_trainer: builds the trainer; by default ``gcml_ray.training.trainer.SiteTrainer``, imported only then,
            because it brings torch and MONAI with it; for the server ``gcml_ray.training.server.ServerTrainer``.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        folder: str,
        *,
        run_id: str,
        use_gpu: bool,
        make_trainer: TrainerFactory | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.folder = Path(folder)
        self.run_id = run_id
        self.use_gpu = use_gpu
        self.make_trainer = make_trainer
        self.is_async = config.federation.mode == "async"
        self.inbox = Inbox(name, wire=config.wire, is_signed=config.signs_pushes)
        self.outbox = Outbox(config.wire, key=None)
        self.guest_outbox = Outbox(WireConfig(), key=None)  # whole and exact: it is this model that is scored
        self.mailbox = Mailbox(config.method.max_incoming, inbox=self.inbox, keeps_newest=self.is_async)
        self.guest_inbox = Inbox(name, is_signed=config.signs_pushes)
        self.guests = Mailbox(1, inbox=self.guest_inbox, keeps_newest=True, takes_again=True)
        self.stopping = threading.Event()
        self.training = threading.Lock()
        self.current = SiteStatus(name, 0, "created", 0, 0)
        self.transport: Transport | None = None
        self.trainer: Trainer | None = None
        self.peers: frozenset[str] = frozenset()
        self.registered: dict[str, Peer] = {}

    def start(self, transport: Transport, peers: Sequence[str], resume_round: int) -> SiteInfo:
        """Loads data and model, restores a checkpoint; see ``SiteTrainer.start``."""
        transport.check_placement(self.name)
        self.transport = transport
        self.peers = frozenset(peers) - {self.name}
        if self.name == SERVER:
            self.mailbox = Mailbox(len(self.peers), inbox=self.inbox)
        make_trainer = with_chaos(self.config, self.name, self.make_trainer or default_trainer)
        trainer = make_trainer(self.config, self.name, self.folder, use_gpu=self.use_gpu, on_progress=self._on_progress)
        info = trainer.start(resume_round=resume_round)
        self.trainer = trainer
        self.current = SiteStatus(self.name, info.restored_round, "ready", 0, 0)
        key = SigningKey() if self.config.signs_pushes else None
        self.outbox = Outbox(self.config.wire, key=key)
        self.guest_outbox = Outbox(WireConfig(), key=key)
        return replace(info, public_key=key.public_key) if key else info

    def register(self, transport: Transport, peers: Mapping[str, Peer]) -> None:
        """Learns who takes part from now on.

        Args:
            transport: reaches all of them.
            peers: what to know of each, by name. Rounds of those with a new process, or without any, are forgotten.
        """
        keys = {name: peer.public_key for name, peer in peers.items()}
        try:
            self.inbox.register(keys)
            self.guest_inbox.register(keys)
        except ValueError as error:
            raise SiteError(self.name, 0, "register", str(error)) from error
        self.transport = transport
        known, self.registered = self.registered, dict(peers)
        gone = [name for name in known if name not in peers or peers[name].incarnation != known[name].incarnation]
        self.mailbox.forget(gone)
        self.outbox.forget(gone)
        self.peers = frozenset(peers) - {self.name}
        if self.name == SERVER:
            self.mailbox.capacity = max(self.mailbox.capacity, len(self.peers))

    def push(self, round_number: int, receivers: Sequence[str], timeout_s: float) -> PushReport:
        """Sends this site's weights to its receivers, actor to actor.

        Args:
            round_number: of the push.
            receivers: names of sites.
            timeout_s: how long to wait for the receivers' receipts.

        Raises:
            SiteError: asked for while this site trains; half-updated weights must not leave it.
        """
        if self.is_async:  # what was published after the last round; the next one may be training
            return self._push(round_number, receivers, timeout_s)
        if not self.training.acquire(blocking=False):
            raise SiteError(self.name, round_number, "push", "asked for while the site trains")
        try:
            return self._push(round_number, receivers, timeout_s)
        finally:
            self.training.release()

    def _push(self, round_number: int, receivers: Sequence[str], timeout_s: float) -> PushReport:
        """Exports and sends."""
        trainer, _ = self._started()
        header, buffer = trainer.export(self.run_id, round_number)
        return self._send(self.outbox, header, buffer, round_number, receivers, timeout_s=timeout_s)

    def visit(self, hosts: Sequence[str], timeout_s: float) -> PushReport:
        """Sends this site's personalised model to other sites, to be scored there and forgotten."""
        trainer, _ = self._started()
        with self.training:
            assert trainer.visits is not None
            header, buffer = trainer.visits.export(self.run_id + VISIT)
            return self._send(self.guest_outbox, header, buffer, header.round_number, hosts, timeout_s=timeout_s)

    def _send(
        self,
        outbox: Outbox,
        header: PushHeader,
        buffer: Buffer,
        round_number: int,
        receivers: Sequence[str],
        *,
        timeout_s: float,
    ) -> PushReport:
        """Sends one model, actor to actor."""
        _, transport = self._started()
        deadline = time.monotonic() + timeout_s
        try:
            parcels = outbox.parcels(header, buffer, receivers)
        except OverflowError as error:
            raise SiteError(self.name, round_number, "push", str(error)) from error
        receipts: list[PushReceipt] = []
        for parcel in parcels:
            left_s = max(0.0, deadline - time.monotonic())
            receipts += transport.send(parcel.header, parcel.payload, parcel.receivers, timeout_s=left_s)
        outbox.acknowledge(receipts)
        return PushReport(self.name, round_number, tuple(receipts))

    def receive(self, header: PushHeader, buffer: Any) -> PushReceipt:
        """Takes or refuses one push; returns at once, also while this site trains."""
        began = time.perf_counter()
        if (trainer := self.trainer) is None:
            reason = "not ready: the receiver is starting"
        else:
            reason = self._take(trainer, header, buffer)
        is_header = not malformed(header)
        return PushReceipt(
            round_number=header.round_number if is_header else 0,
            sender=header.sender if is_header else "?",
            receiver=self.name,
            accepted=not reason,
            reason=reason,
            size_bytes=buffer.nbytes if isinstance(buffer, np.ndarray) else 0,
            seconds=time.perf_counter() - began,
        )

    def _take(self, trainer: Trainer, header: PushHeader, buffer: Any) -> str:
        """Puts a push, or a model that is to be scored here, into its mailbox, or says why not."""
        visit_id = self.run_id + VISIT
        visits = trainer.visits if self.config.evaluation.cross_site else None
        if visits is not None and getattr(header, "run_id", None) == visit_id:
            return self.guests.deliver(
                header, buffer, expect=lambda sender: visits.expectation(visit_id, sender, peers=self.peers)
            )
        return self.mailbox.deliver(header, buffer, expect=lambda sender: self._registered(sender, trainer.expectation))

    def _registered(self, sender: str, expectation: Callable[..., Expectation]) -> Expectation:
        """What a push must look like, with the training cases that its sender told the driver."""
        expected = expectation(self.run_id, sender, peers=self.peers)
        peer = self.registered.get(sender)
        return expected if peer is None else replace(expected, num_train=peer.num_train)

    def train(self, order: TrainOrder) -> TrainReport:
        """One round on this site's data with what lies in the mailbox."""
        with self._working(order.round_number) as trainer:
            self.current = SiteStatus(self.name, order.round_number, "train", 0, self.config.federation.local_steps)
            return trainer.train_round(order, self._arrived(order))

    def adopt(self, order: TrainOrder) -> AdoptReport:
        """Ends a round with a server: takes over what it has sent, validates, writes the checkpoint."""
        with self._working(order.round_number) as trainer:
            return trainer.adopt(order, self._arrived(order))

    def _arrived(self, order: TrainOrder) -> list[tuple[PushHeader, Buffer]]:
        """What lies in the mailbox; with a barrier nothing of a later round than the one that all are in."""
        return self.mailbox.take(newest_round=None if self.is_async else order.round_number)

    def evaluate(self, split: Split, model: str) -> EvaluationReport:
        """Scores one of this site's models on its own cases."""
        with self._working() as trainer:
            return trainer.evaluate(split=split, model=model)

    def score_visitor(self, owner: str) -> EvaluationReport:
        """Scores the model that another site has sent, on this site's test cases, and forgets it."""
        with self._working() as trainer:
            guests = {header.sender: (header, buffer) for header, buffer in self.guests.take()}
            if owner not in guests:
                raise SiteError(self.name, 0, "visit", f"the model of {owner} is not here")
            assert trainer.visits is not None
            return trainer.visits.score(*guests[owner])

    @contextmanager
    def _working(self, round_number: int | None = None) -> Iterator[Trainer]:
        """The trainer, for one piece of work at a time; afterwards the site is ready, in this round or the last one."""
        trainer, _ = self._started()
        with self.training:
            try:
                yield trainer
            finally:
                number = self.current.round_number if round_number is None else round_number
                self.current = SiteStatus(self.name, number, "ready", 0, 0)

    def status(self) -> SiteStatus:
        """What this site is doing."""
        return self.current

    def release(self) -> None:
        """Lets data and model go at once, as trainer and site hold each other; nothing may be asked of it any more."""
        self.trainer = None

    def stop(self) -> None:
        """Ends the work in progress at its next step."""
        self.stopping.set()

    def _started(self) -> tuple[Trainer, Transport]:
        """What ``start`` has made."""
        if self.trainer is None or self.transport is None:
            raise NotStartedError.of(self.name)
        return self.trainer, self.transport

    def _on_progress(self, stage: str, step: int, num_steps: int) -> None:
        """Notes where the work is; the one place where it can be stopped."""
        self.current = SiteStatus(self.name, self.current.round_number, stage, step, num_steps)
        if self.stopping.is_set():
            raise StopRequestedError(f"site {self.name} was told to stop during {stage}")


def default_trainer(config: Config, name: str, folder: Path, **options: Any) -> Trainer:
    """The real trainer, imported in the site's own process."""
    if name == SERVER:
        from gcml_ray.training.server import ServerTrainer  # noqa: PLC0415 - as below

        return ServerTrainer(config, name, folder, **options)
    from gcml_ray.training.trainer import SiteTrainer  # noqa: PLC0415 - torch and MONAI only where training happens

    return SiteTrainer(config, name, folder, **options)


def trainer_in_own_process(config: Config, name: str, folder: Path, **options: Any) -> Trainer:
    """The same in a process that does nothing else: it starts sooner and takes less memory."""
    from gcml_ray.lean_imports import import_monai  # noqa: PLC0415 - as above

    import_monai()
    return default_trainer(config, name, folder, **options)
