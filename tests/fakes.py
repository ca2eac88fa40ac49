"""Fakes of this project: a trainer of a few numbers that can fail on purpose.

They need NumPy alone and pickle, so the same fake trains in this process and in a Ray actor.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gcml_ray.config import SERVER, Config, has_server
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.push.wire import Buffer, Expectation, PushHeader, TensorSpec, checksum
from gcml_ray.records import (
    AdoptReport,
    CaseScore,
    EvaluationReport,
    SiteInfo,
    Split,
    TrainOrder,
    TrainReport,
)
from gcml_ray.seeding import numpy_generator

Stage = Literal["start", "export", "train", "adopt", "evaluate", "visit", "score_visitor"]
Progress = Callable[[str, int, int], None]
ROUNDS = {"rounds": 4, "local_steps": 2, "warmup_rounds": 0, "cooldown_rounds": 0}
HELD_AT_MOST_S = 200.0


# --- configuration -----------------------------------------------------------------------------


def fake_config(folder: Path, *, sites: Sequence[str] = ("A", "B", "C"), **sections: dict[str, Any]) -> Config:
    """A federation for fake trainers: a datalist that names files which do not exist, 4 rounds, a ring.

    ``sections`` are merged into the sections of the configuration; ``method`` is replaced whole. The sites work in this
    process, unless they are placed somewhere. Nobody is left out of a round because the machine is slow.
    """
    is_placed = sections.get("resources", {}).get("placement", "none") != "none"
    folder.mkdir(parents=True, exist_ok=True)
    cases = [{"site": site, "image": f"{site}.nii", "label": f"{site}_seg.nii"} for site in sites]
    datalist = folder / "datalist.json"
    datalist.write_text(json.dumps({"cases": cases}))
    values: dict[str, Any] = {
        "name": "fake",
        "data": {
            "datalist": str(datalist),
            "channels": ["ct"],
            "labels": {"background": 0, "lesion": 1},
            "spacing_is_real": True,
            "patch_size": [8, 8, 8],
        },
        "network": {"name": "unet"},
        "optimiser": {"learning_rate": 1e-3},
        "method": {"name": "gcml", "topology": {"name": "ring"}},
        "federation": ROUNDS | {"seed": 7, "late_factor": None},
        "resources": {"pool": "ray" if is_placed else "local"},
        "tracking": {"enabled": False},
        "output": {"folder": str(folder / "run"), "num_overlays": 0},
    }
    for name, section in sections.items():
        values[name] = section if name == "method" else values.get(name, {}) | section
    return Config.model_validate(values)


# --- the trainer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when.

    ``kind``: ``raise`` an error, ``die`` (the process ends at once), ``hang`` (for an hour), ``slow`` (for
    ``seconds``), ``held`` (until :func:`release`, or for ``seconds``); in ``export`` also a push that is malformed in
    one way: ``nan``, ``size``, ``contract``, ``stale``, ``run``, ``fingerprint``, ``checksum``, ``dtype``, ``sender``
    or ``num_train``.
    """

    site: str
    round_number: int
    stage: Stage
    kind: str
    seconds: float = 0.0


@dataclass(frozen=True)
class FakeTrainers:
    """Makes the trainers of a federation; give it as ``make_trainer``. Pickles into an actor."""

    faults: tuple[Fault, ...] = ()
    num_values: int = 8

    def __call__(self, config: Config, site: str, folder: Path, *, use_gpu: bool, on_progress: Progress) -> FakeTrainer:
        """A trainer of one site; flaky where a fault names it."""
        del use_gpu
        mine = tuple(fault for fault in self.faults if fault.site == site)
        kind = FakeServer if site == SERVER else FlakyTrainer if mine else FakeTrainer
        return kind(config, site, folder, num_values=self.num_values, on_progress=on_progress, faults=mine)


class FakeTrainer:
    """Satisfies ``actors.site.Trainer``. Incoming weights are averaged in, training adds known numbers.

    What it did is in ``checkpoints/SITE/calls.txt``, a line a call, whichever process it ran in; its weights
    after round 3 are in ``round_00003.npy`` beside it.
    """

    def __init__(
        self,
        config: Config,
        site: str,
        folder: Path,
        *,
        num_values: int,
        on_progress: Progress,
        faults: tuple[Fault, ...] = (),
    ) -> None:
        self.config = config
        self.site = site
        self.folder = folder / "checkpoints" / site
        self.on_progress = on_progress
        self.faults = faults
        self.weights: Buffer = np.zeros(num_values, dtype=np.float32)
        self.round_number = 0

    def note(self, stage: str, number: int) -> None:
        """Writes a call down, and lets a flaky trainer fail in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "calls.txt").open("a", encoding="utf-8") as file:
            file.write(f"{stage} {number} {os.getpid()}\n")

    def start(self, *, resume_round: int) -> SiteInfo:
        """Starts at zero, or at a round's file."""
        self.note("start", 0)
        self.round_number = resume_round
        if self.round_number:
            self.weights = np.load(weights_file(self.folder, self.round_number))
        size = self.weights.size
        return SiteInfo(self.site, 5, 1, 1, size, 4 * size, "cpu", "node", os.getpid(), self.round_number, 0.1)

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """The weights, well described."""
        self.note("export", round_number)
        return self._header(run_id, round_number, self.weights), self.weights

    def _header(self, run_id: str, round_number: int, buffer: Buffer) -> PushHeader:
        return PushHeader(
            run_id=run_id,
            round_number=round_number,
            sender=self.site,
            num_train=5,
            fingerprint="tiny",
            contract="ct->lesion",
            layout=(TensorSpec("weights", (self.weights.size,), "float32", 0),),
            num_values=self.weights.size,
            dtype="float32",
            checksum=checksum(buffer),
        )

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """The same model from every peer."""
        del sender
        layout = (TensorSpec("weights", (self.weights.size,), "float32", 0),)
        last = self.config.federation.rounds
        oldest = self.round_number + 1
        if self.config.federation.mode == "async":
            oldest = max(0, self.round_number - self.config.federation.max_staleness)
        if has_server(self.config.method) and self.site != SERVER:
            oldest = self.round_number  # the server's push ends the round that was just trained
        return Expectation(run_id, peers, "tiny", "ct->lesion", layout, self.weights.size, oldest, last)

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """Mean of own and incoming weights, plus numbers that depend on seed, site and round alone."""
        number = order.round_number
        self.note("train", number)
        models = [self.weights, *(buffer for _, buffer in pushes)]
        mean = np.mean(models, axis=0, dtype=np.float32)
        for step in range(1, self.config.federation.local_steps + 1):
            self.on_progress("train", step, self.config.federation.local_steps)
        draw = numpy_generator(self.config.federation.seed, "train", self.site, number)
        self.weights = mean + draw.standard_normal(mean.size, dtype=np.float32)
        self.round_number = number
        if order.checkpoint:
            self._save(number)
        dice = 0.5 if order.evaluate else None
        peers = tuple(header.sender for header, _ in pushes)
        losses = {"segmentation": 1.0 / number}
        return TrainReport(self.site, number, peers, 2, losses, {}, "", {}, dice, False, {"train": 0.1}, 1e-3, 1000)

    def adopt(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> AdoptReport:
        """Goes on with what the server has sent, if anything."""
        number = order.round_number
        self.note("adopt", number)
        for _, buffer in pushes:
            self.weights = buffer.copy()
        self.round_number = number
        if order.checkpoint:
            self._save(number)
        dice = 0.5 if order.evaluate else None
        return AdoptReport(self.site, number, bool(pushes), dice, False, {"validate": 0.1}, 1000)

    def _save(self, number: int) -> None:
        path = weights_file(self.folder, number)
        np.save(path.with_suffix(".tmp.npy"), self.weights)
        os.replace(path.with_suffix(".tmp.npy"), path)

    def evaluate(self, *, split: Split, model: str) -> EvaluationReport:
        """Two cases with known scores."""
        self.note("evaluate", self.round_number)
        scores = tuple(
            CaseScore(self.site, case, split, model, "lesion", dice, 2.0, 0.9)
            for case, dice in (("x", 0.8), ("y", 0.6))
        )
        return EvaluationReport(self.site, split, model, self.round_number, scores, 0.1)

    @property
    def visits(self) -> FakeVisits:
        """Models that travel to be scored."""
        return FakeVisits(self)


@dataclass(frozen=True)
class FakeVisits:
    """A visitor's Dice is its first weight, so that a test can tell whose it was."""

    host: FakeTrainer

    def export(self, run_id: str) -> tuple[PushHeader, Buffer]:
        """The weights as they are."""
        self.host.note("visit", self.host.round_number)
        return self.host._header(run_id, self.host.round_number, self.host.weights), self.host.weights

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """As for a push, of the last round."""
        expected = self.host.expectation(run_id, sender, peers=peers)
        return replace(expected, oldest_round=self.host.config.federation.rounds)

    def score(self, header: PushHeader, buffer: Buffer) -> EvaluationReport:
        """One case."""
        self.host.note("score_visitor", self.host.round_number)
        score = CaseScore(self.host.site, "x", "test", header.sender, "lesion", first_weight_as_dice(buffer), 2.0, 0.9)
        return EvaluationReport(self.host.site, "test", header.sender, header.round_number, (score,), 0.1)


def first_weight_as_dice(weights: Buffer) -> float:
    """A number between 0 and 1 that belongs to these weights alone."""
    return 0.5 + float(np.arctan(weights[0])) / np.pi


class FlakyTrainer(FakeTrainer):
    """Fails where its faults say so."""

    def note(self, stage: str, number: int) -> None:
        """Writes the call down first, so that a test can count what was begun."""
        super().note(stage, number)
        for fault in self.faults:
            if (fault.stage, fault.round_number) == (stage, number):
                self._fail(fault)

    def _fail(self, fault: Fault) -> None:
        if fault.kind == "raise":
            raise ValueError(f"broken {fault.stage} of {fault.site} in round {fault.round_number}")
        if fault.kind == "die":
            os._exit(1)
        if fault.kind == "held":
            self._hold(fault)
            return
        seconds = 3600.0 if fault.kind == "hang" else fault.seconds
        if seconds:
            threading.Event().wait(seconds)

    def _hold(self, fault: Fault) -> None:
        deadline = time.monotonic() + (fault.seconds or HELD_AT_MOST_S)
        while not release_file(self.folder, fault.round_number).exists():
            if time.monotonic() > deadline:
                if fault.seconds:
                    return
                raise TimeoutError(f"{self.site} was never released from round {fault.round_number}")
            time.sleep(0.02)

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """The weights, spoilt in one way where a fault says so."""
        header, buffer = super().export(run_id, round_number)
        for fault in self.faults:
            if (fault.stage, fault.round_number) == ("export", round_number):
                return self._spoil(fault.kind, header, buffer)
        return header, buffer

    def _spoil(self, kind: str, header: PushHeader, buffer: Buffer) -> tuple[PushHeader, Any]:
        spoilt: dict[str, tuple[PushHeader, Any]] = {
            "size": (header, buffer[:-1]),
            "contract": (replace(header, contract="mr->tumour"), buffer),
            "stale": (replace(header, round_number=header.round_number - 1), buffer),
            "run": (replace(header, run_id="another"), buffer),
            "fingerprint": (replace(header, fingerprint="huge"), buffer),
            "checksum": (header, buffer + np.float32(1)),
            "dtype": (header, buffer.astype(np.float64)),
            "sender": (replace(header, sender="stranger"), buffer),
            "num_train": (replace(header, num_train=500), buffer),
        }
        if kind == "nan":
            bad = np.where(np.arange(buffer.size) == 1, np.float32(np.nan), buffer)
            return replace(header, checksum=checksum(bad)), bad
        return spoilt.get(kind, (header, buffer))


class FakeServer(FlakyTrainer):
    """The plain mean of what arrived."""

    def start(self, *, resume_round: int) -> SiteInfo:
        """Starts at the newest mean up to a round."""
        rounds = [int(path.stem[6:]) for path in self.folder.glob("round_*.npy")]
        known = [number for number in rounds if number <= resume_round]
        return super().start(resume_round=max(known, default=0))

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """Forms the mean."""
        number = order.round_number
        self.note("train", number)
        if not pushes:
            raise ValueError("nothing has arrived")
        self.weights = np.mean([buffer for _, buffer in pushes], axis=0, dtype=np.float32)
        self.round_number = number
        if order.checkpoint:
            self._save(number)
        peers = tuple(header.sender for header, _ in pushes)
        return TrainReport(self.site, number, peers, 0, {}, {}, "mean", {}, None, False, {}, 0.0, 1000)


def weights_file(folder: Path, round_number: int) -> Path:
    """Where a fake trainer keeps the weights of a round."""
    return folder / f"round_{round_number:05d}.npy"


def release_file(folder: Path, round_number: int) -> Path:
    """Whose being there ends a site's being held in a round."""
    return folder / f"release_{round_number:05d}"


def release(run: RunFolder, site: str, round_number: int) -> None:
    """Lets a site go on that a fault holds in a round, whichever process it is in."""
    file = release_file(run.checkpoints(site), round_number)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def run_folder(config: Config) -> RunFolder:
    """Where a federation's run is, or will be."""
    return RunFolder(Path(config.output.folder))


def final_weights(folder: RunFolder) -> dict[str, Buffer]:
    """The newest weights of every site, from its checkpoints."""
    sites = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    return {site: np.load(max(folder.checkpoints(site).glob("round_*.npy"))) for site in sites}


def calls_of(folder: RunFolder, site: str, stage: Stage) -> list[int]:
    """The rounds in which a site's stage was begun, in order, over all its processes."""
    lines = (folder.checkpoints(site) / "calls.txt").read_text(encoding="utf-8").splitlines()
    return [int(number) for name, number, _ in map(str.split, lines) if name == stage]
