"""A site: one hospital's data, model and mailbox. A plain class; ``actors/pool.py`` makes it a Ray actor.

Its methods are called from several threads at a time: ``train`` and ``evaluate`` in one, ``push`` in one,
``receive`` in two, ``status`` and ``stop`` in one more. What they share is the mailbox (locked), the stop
flag (an event) and the status (replaced whole).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.mailbox import Mailbox
from gcml_ray.config import SERVER, Config
from gcml_ray.errors import SiteError
from gcml_ray.records import (
    AdoptReport,
    EvaluationReport,
    PushReceipt,
    PushReport,
    SiteInfo,
    SiteStatus,
    Split,
    TrainOrder,
    TrainReport,
)
from gcml_ray.wire import Buffer, Expectation, PushHeader


class Transport(Protocol):
    """How a sender's buffer reaches its receivers."""

    def check_placement(self, site: str) -> None:
        """Called once in the site's own process; raises ClusterError where the site must not run."""
        ...

    def send(
        self, header: PushHeader, buffer: Buffer, receivers: Sequence[str], *, timeout_s: float
    ) -> tuple[PushReceipt, ...]:
        """Delivers one buffer to every receiver; a receiver that does not answer gives a refused receipt."""
        ...


class Trainer(Protocol):
    """What a site needs of ``gcml_ray.trainer.SiteTrainer``; tests bring their own."""

    def start(self, *, resume_round: int | None) -> SiteInfo:
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


TrainerFactory = Callable[..., Trainer]


class NotStartedError(Exception):
    """Raised where a site is asked to work before ``start``: Ray has replaced a process that died on its own."""


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
        make_trainer: builds the trainer; by default ``gcml_ray.trainer.SiteTrainer``, imported only then,
            because it brings torch and MONAI with it; for the server ``gcml_ray.server.ServerTrainer``.
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
        self.mailbox = Mailbox(config.method.max_incoming)
        self.stopping = threading.Event()
        self.training = threading.Lock()
        self.current = SiteStatus(name, 0, "created", 0, 0)
        self.transport: Transport | None = None
        self.trainer: Trainer | None = None
        self.peers: frozenset[str] = frozenset()

    def start(self, transport: Transport, peers: Sequence[str], resume_round: int | None) -> SiteInfo:
        """Loads data and model, restores a checkpoint; see ``SiteTrainer.start``."""
        transport.check_placement(self.name)
        self.transport = transport
        self.peers = frozenset(peers) - {self.name}
        if self.name == SERVER:
            self.mailbox = Mailbox(len(self.peers))
        make_trainer = self.make_trainer or _default_trainer
        trainer = make_trainer(self.config, self.name, self.folder, use_gpu=self.use_gpu, on_progress=self._on_progress)
        info = trainer.start(resume_round=resume_round)
        self.trainer = trainer
        self.current = SiteStatus(self.name, info.restored_round, "ready", 0, 0)
        return info

    def push(self, round_number: int, receivers: Sequence[str]) -> PushReport:
        """Sends this site's weights to its receivers, actor to actor.

        Raises:
            SiteError: asked for while this site trains; half-updated weights must not leave it.
        """
        trainer, transport = self._started()
        if not self.training.acquire(blocking=False):
            raise SiteError(self.name, round_number, "push", "asked for while the site trains")
        try:
            header, buffer = trainer.export(self.run_id, round_number)
            receipts = transport.send(header, buffer, receivers, timeout_s=self.config.federation.push_timeout_s)
        finally:
            self.training.release()
        return PushReport(self.name, round_number, receipts)

    def receive(self, header: PushHeader, buffer: Any) -> PushReceipt:
        """Takes or refuses one push; returns at once, also while this site trains."""
        began = time.perf_counter()
        if (trainer := self.trainer) is None:
            reason = "not ready: the receiver is starting"
        else:
            reason = self.mailbox.deliver(
                header, buffer, expect=lambda sender: trainer.expectation(self.run_id, sender, peers=self.peers)
            )
        return PushReceipt(
            round_number=getattr(header, "round_number", 0),
            sender=str(getattr(header, "sender", "?")),
            receiver=self.name,
            accepted=not reason,
            reason=reason,
            size_bytes=int(getattr(buffer, "nbytes", 0)),
            seconds=time.perf_counter() - began,
        )

    def train(self, order: TrainOrder) -> TrainReport:
        """One round on this site's data with what lies in the mailbox."""
        trainer, _ = self._started()
        with self.training:
            self.current = SiteStatus(self.name, order.round_number, "train", 0, self.config.federation.local_steps)
            try:
                return trainer.train_round(order, self.mailbox.take())
            finally:
                self.current = SiteStatus(self.name, order.round_number, "ready", 0, 0)

    def adopt(self, order: TrainOrder) -> AdoptReport:
        """Ends a round with a server: takes over what it has sent, validates, writes the checkpoint."""
        trainer, _ = self._started()
        with self.training:
            try:
                return trainer.adopt(order, self.mailbox.take())
            finally:
                self.current = SiteStatus(self.name, order.round_number, "ready", 0, 0)

    def evaluate(self, split: Split, model: str) -> EvaluationReport:
        """Scores one of this site's models on its own cases."""
        trainer, _ = self._started()
        with self.training:
            try:
                return trainer.evaluate(split=split, model=model)
            finally:
                self.current = SiteStatus(self.name, self.current.round_number, "ready", 0, 0)

    def status(self) -> SiteStatus:
        """What this site is doing."""
        return self.current

    def stop(self) -> None:
        """Ends the work in progress at its next step."""
        self.stopping.set()

    def _started(self) -> tuple[Trainer, Transport]:
        """What ``start`` has made."""
        if self.trainer is None or self.transport is None:
            raise NotStartedError(f"site {self.name} has a new process that was not started yet; the old one ended")
        return self.trainer, self.transport

    def _on_progress(self, stage: str, step: int, num_steps: int) -> None:
        """Notes where the work is; the one place where it can be stopped."""
        self.current = SiteStatus(self.name, self.current.round_number, stage, step, num_steps)
        if self.stopping.is_set():
            raise StopRequestedError(f"site {self.name} was told to stop during {stage}")


def _default_trainer(config: Config, name: str, folder: Path, **options: Any) -> Trainer:
    """The real trainer, imported in the site's own process."""
    if name == SERVER:
        from gcml_ray.server import ServerTrainer  # noqa: PLC0415 - as below

        return ServerTrainer(config, name, folder, **options)
    from gcml_ray.trainer import SiteTrainer  # noqa: PLC0415 - torch and MONAI only where training happens

    return SiteTrainer(config, name, folder, **options)
