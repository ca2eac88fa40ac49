"""A trainer that breaks down or lies as ``chaos`` says; see :mod:`gcml_ray.chaos`.

It wraps the real trainer: stages are seen through its progress, pushes are changed on their way out. Nothing
in the product's own code knows of it but ``Site.start``.

Legend: S values of a push, B batch.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.site_pool import SiteDiedError, SiteHungError
from gcml_ray.chaos import LIES, Fault, faults_of
from gcml_ray.config import Config
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.push.wire import Buffer, Expectation, PushHeader, checksum
from gcml_ray.records import AdoptReport, EvaluationReport, SiteInfo, Split, TrainOrder, TrainReport
from gcml_ray.seeding import numpy_generator

if TYPE_CHECKING:
    from actors.site import TrainerFactory


Progress = Callable[[str, int, int], None]
Push = tuple[PushHeader, Buffer]
HANG_POLL_S = 0.2
EXIT_CODE = 66  # of a process that was told to die


class ChaosError(Exception):
    """A site's code that fails on purpose."""


def with_chaos(config: Config, site: str, make_trainer: TrainerFactory) -> TrainerFactory:
    """The factory as it is, or one whose trainer has this site's faults."""
    faults = faults_of(config.chaos, site)
    if not faults:
        return make_trainer

    def make_faulty(config: Config, site: str, folder: Path, **options: Any) -> FaultyTrainer:
        return FaultyTrainer(make_trainer, config, site, folder, faults=faults, **options)

    return make_faulty


class FaultyTrainer:
    """Satisfies ``actors.site.Trainer``.

    What happens once leaves a file beside the site's checkpoints, so a site does not die again when the round is
    repeated. With ``resources.pool: local`` nobody can end or outwait a site: there a kill and a hang raise
    what the pool reports as a site that died or was late.

    Args:
        make_trainer: builds the trainer that does the work.
        config: the federation's configuration.
        site: this site's name.
        folder: the run folder.
        faults: this site's.
        use_gpu: for the trainer.
        on_progress: the site's; told what the trainer tells, before anything breaks.
    """

    def __init__(
        self,
        make_trainer: TrainerFactory,
        config: Config,
        site: str,
        folder: Path,
        *,
        faults: Sequence[Fault],
        use_gpu: bool,
        on_progress: Progress,
    ) -> None:
        self.config = config
        self.site = site
        self.markers = RunFolder(folder).checkpoints(site)
        self.faults = faults
        self.on_progress = on_progress
        self.round_number = 0
        self.last_step_at = 0.0
        self.first_push: Push | None = None
        self.trainer: Any = make_trainer(config, site, folder, use_gpu=use_gpu, on_progress=self._on_progress)

    # --- what a site asks of its trainer -----------------------------------------------------

    def start(self, *, resume_round: int) -> SiteInfo:
        """Starts the trainer."""
        info: SiteInfo = self.trainer.start(resume_round=resume_round)
        if any(fault.kind == "labels" for fault in self.faults):
            self._spoil_labels()
        return replace(info, notes=(*info.notes, *(f"chaos: {fault.text}" for fault in self.faults)))

    def export(self, run_id: str, round_number: int) -> Push:
        """The push, as the site's lies change it."""
        self._break_at("push", 0, 1, round_number)
        push: Push = self.trainer.export(run_id, round_number)
        header, buffer = push
        self.first_push = self.first_push or (header, buffer.copy())
        for fault in self._current(round_number):
            if fault.kind in LIES:
                push = self._lie(fault, push, round_number)
        return push

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """What a push of ``sender`` must look like."""
        expected: Expectation = self.trainer.expectation(run_id, sender, peers=peers)
        return expected

    def train_round(self, order: TrainOrder, pushes: Sequence[Push]) -> TrainReport:
        """One round."""
        self.round_number = order.round_number
        self.last_step_at = time.perf_counter()
        report: TrainReport = self.trainer.train_round(order, pushes)
        return report

    def adopt(self, order: TrainOrder, pushes: Sequence[Push]) -> AdoptReport:
        """Ends a round with a server."""
        self.round_number = order.round_number
        report: AdoptReport = self.trainer.adopt(order, pushes)
        return report

    def evaluate(self, *, split: Split, model: str) -> EvaluationReport:
        """Scores a model."""
        report: EvaluationReport = self.trainer.evaluate(split=split, model=model)
        return report

    @property
    def visits(self) -> Any:
        """Models that travel to be scored: those of the trainer."""
        return self.trainer.visits

    # --- breaking down -----------------------------------------------------------------------

    def _current(self, number: int) -> list[Fault]:
        """The faults of a round; before the first one, those of loading."""
        return [fault for fault in self.faults if fault.covers(number) or (not number and fault.stage == "load")]

    def _on_progress(self, stage: str, step: int, num_steps: int) -> None:
        """Passes on what the trainer tells, and breaks down where it must."""
        self.on_progress(stage, step, num_steps)
        self._break_at(stage, step, num_steps, self.round_number)

    def _break_at(self, stage: str, step: int, num_steps: int, number: int) -> None:
        """The breakdowns of this stage; what happens once is noted before it happens."""
        for fault in self._current(number):
            if fault.kind in LIES or (fault.stage or "train") != stage:
                continue
            if fault.happens_once:
                marker = self.markers / fault.marker
                if marker.exists():
                    continue
                self.markers.mkdir(parents=True, exist_ok=True)
                marker.write_text(f"{fault.text}\n", encoding="utf-8")
            self._break(fault, f"chaos: {fault.text}, in round {number}, {stage}", (stage, step, num_steps))
        self.last_step_at = time.perf_counter()

    def _break(self, fault: Fault, words: str, progress: tuple[str, int, int]) -> None:
        is_alone = self.config.resources.pool != "local"  # in a process of its own
        match fault.kind:
            case "slow":
                time.sleep((fault.factor - 1) * max(0.0, time.perf_counter() - self.last_step_at))
            case "nan":
                self.trainer.local.model.flat.fill_(float("nan"))
            case "kill" if is_alone:
                os._exit(EXIT_CODE)
            case "hang" if is_alone:
                while True:  # until it is killed, or told to stop
                    time.sleep(HANG_POLL_S)
                    self.on_progress(*progress)
            case "kill":
                raise SiteDiedError(words)
            case "hang":
                raise SiteHungError(words)
            case "oom":
                raise MemoryError(words)
            case "disk":
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({words})")
            case _:
                raise ChaosError(words)

    # --- lying -------------------------------------------------------------------------------

    def _lie(self, fault: Fault, push: Push, number: int) -> Push:
        """A push (S,) changed as the fault says; false weights get a correct checksum."""
        header, buffer = push
        assert self.first_push is not None
        match fault.kind:
            case "impersonate":
                return replace(header, sender=fault.victim), buffer
            case "stale":
                return self.first_push
            case "replay":
                lie = self.first_push[1]
            case "random":
                draw = numpy_generator(self.config.federation.seed, "chaos", self.site, number)
                lie = (draw.standard_normal(buffer.size) * buffer.std()).astype(np.float32)
            case "flip":
                lie = -buffer
            case "scale":
                lie = buffer * np.float32(fault.factor)
            case "nan_push":
                lie = np.where(np.arange(buffer.size) % 2 == 1, np.float32(np.nan), buffer)
            case _:
                return header, buffer  # labels: the lie was told while it trained
        return replace(header, checksum=checksum(lie)), lie

    def _spoil_labels(self) -> None:
        """Makes the trainer learn the class after the right one, or the complement of every region."""
        batches, data = self.trainer.data.batches, self.config.data

        def spoilt(round_number: int, num_steps: int) -> Iterator[Any]:
            for batch in batches(round_number, num_steps):
                if any(fault.kind == "labels" and fault.covers(round_number) for fault in self.faults):
                    label = 1 - batch.label if data.is_sigmoid else (batch.label + 1) % data.num_outputs
                    yield replace(batch, label=label)
                else:
                    yield batch

        self.trainer.data.batches = spoilt
