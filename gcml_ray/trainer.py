"""One site's training: its data, its model, its checkpoints. Knows no other site and no transport.

Legend: S values of a push. Everything random is derived from (seed, site, round), so a trainer that
was restored at a round goes on exactly as one that never stopped.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from gcml_ray.checkpoint import SiteState, keep_as, load_model, load_round, save_model, save_round, saved_rounds
from gcml_ray.config import Config, NetworkConfig, ProxyFlMethod, has_server, has_two_models
from gcml_ray.data.contract import data_contract
from gcml_ray.data.datalist import check_files
from gcml_ray.data.pooling import cases_to_train_on
from gcml_ray.data.site_data import Batch, SiteData
from gcml_ray.errors import CheckpointError
from gcml_ray.evaluation import Evaluator
from gcml_ray.learner import Learner, learning_rate
from gcml_ray.log_notes import collected_warnings
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.methods import METHODS
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult
from gcml_ray.networks.registry import fingerprint
from gcml_ray.records import PERSONALISED, AdoptReport, EvaluationReport, SiteInfo, Split, TrainOrder, TrainReport
from gcml_ray.seeding import derive_seed
from gcml_ray.site_learner import WireFormat, build_learner, exchanged_network
from gcml_ray.wire import Buffer, Expectation, PushHeader

# Pushed weights are read-only on purpose; torch warns about that once a process.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

SHARED = "shared"


class SiteTrainer:
    """Trains and evaluates one site's model.

    ``local`` is the model that is exchanged. Methods with two models have ``personal`` beside it, which never leaves
    the site; it is the one that is validated, kept and tested then (:attr:`own`).

    Args:
        config: the federation's configuration.
        site: this site's name.
        folder: the run folder; checkpoints go to ``checkpoints/<site>``, overlays to ``overlays/<site>``.
        use_gpu: whether a GPU was granted to this site.
        on_progress: told (stage, step, number of steps) while it works; raises to stop the work.
    """

    def __init__(
        self,
        config: Config,
        site: str,
        folder: Path,
        *,
        use_gpu: bool,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.config = config
        self.site = site
        self.checkpoints = folder / "checkpoints" / site
        self.overlays = folder / "overlays" / site
        self.on_progress = on_progress
        self.device = torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
        self.wants_gpu = use_gpu
        self.seed = config.federation.seed

    # --- start -------------------------------------------------------------------------------

    def start(self, *, resume_round: int | None) -> SiteInfo:
        """Loads the data, builds the model and restores a checkpoint.

        Args:
            resume_round: 0 starts afresh, a positive number restores that round, None the newest one there is.

        Raises:
            DataError: a case of this site cannot be used.
            ConfigError: the network or the loss does not fit the configuration.
            CheckpointError: the checkpoint asked for is missing or belongs to something else.
        """
        began = time.perf_counter()
        torch.set_num_threads(max(1, int(self.config.resources.cpus_per_site)))
        with collected_warnings() as self.loading_notes:
            self.data = self._load_data()
        self.loss = build_segmentation_loss(self.config.loss, self.config.data)
        self.evaluator = Evaluator(self.config, self.site, self.data, self.device)
        self.contract = data_contract(self.config.data)
        self.local = self._build_learner(exchanged_network(self.config, self.site))
        self.personal = self._build_personal()
        self.incoming: dict[str, Learner] = {}
        self.wire_formats = self._wire_formats()
        self.host_buffer = torch.empty(self.local.model.num_sent) if self.device.type == "cuda" else None
        self.state = SiteState(site=self.site, round_number=0, identity=self.config.identity)
        self._restore(resume_round)
        return self._info(time.perf_counter() - began)

    def _load_data(self) -> SiteData:
        """This site's cases, checked and in memory."""
        cases = cases_to_train_on(self.config, self.site)
        check_files(cases)
        data = SiteData(self.site, cases, self.config.data, seed=self.seed)
        data.load(lambda done, total: self.on_progress("load", done, total))
        return data

    def _build_learner(self, network: NetworkConfig) -> Learner:
        """A learner with the initial weights of an exchanged model."""
        return build_learner(self.config, self.site, network, self.device)

    def _build_personal(self) -> Learner | None:
        """The second model, for methods with two: Ditto's starts as the shared one, ProxyFL's from its own weights."""
        if not has_two_models(self.config.method):
            return None
        is_private = isinstance(self.config.method, ProxyFlMethod)
        network = self.config.network_of(self.site)
        return build_learner(self.config, self.site, network, self.device, is_private=is_private)

    @property
    def own(self) -> Learner:
        """The model that this site keeps for itself."""
        return self.personal or self.local

    def _wire_formats(self) -> dict[str, WireFormat]:
        """What the pushes of each architecture in this federation look like, by its fingerprint."""
        own = exchanged_network(self.config, self.site)
        networks = [own] if isinstance(self.config.method, ProxyFlMethod) else [*self.config.site_networks.values()]
        formats = {}
        for network in (self.config.network, *networks):
            model = self.local.model if network == own else self._learner_for(network).model
            formats[fingerprint(network, self.config.data)] = WireFormat.of(self.config, network, model)
        return formats

    def _restore(self, resume_round: int | None) -> None:
        """Goes to the round asked for."""
        rounds = saved_rounds(self.checkpoints)
        if resume_round is None:
            resume_round = rounds[-1] if rounds else 0
        if resume_round == 0:
            return
        if resume_round not in rounds:
            raise CheckpointError(
                f"site {self.site} has no checkpoint of round {resume_round} in {self.checkpoints} (found {rounds}); "
                "resume where the run was made, or start it anew in another output.folder"
            )
        self.state = load_round(
            self.checkpoints,
            self.local,
            site=self.site,
            round_number=resume_round,
            identity=self.config.identity,
            personal=self.personal,
        )

    def _info(self, seconds: float) -> SiteInfo:
        """What the driver is told when this site is ready."""
        notes = list(self.loading_notes)
        if self.wants_gpu and self.device.type == "cpu":
            notes.append("a GPU was granted but CUDA is not available: training on the CPU")
        return SiteInfo(
            site=self.site,
            num_train=self.data.num_cases("train"),
            num_validation=self.data.num_cases("validation"),
            num_test=self.data.num_cases("test"),
            num_parameters=self.local.model.num_parameters,
            push_bytes=4 * self.local.model.num_sent,
            device=str(self.device),
            node=socket.gethostname(),
            pid=os.getpid(),
            restored_round=self.state.round_number,
            seconds=seconds,
            notes=tuple(notes),
        )

    # --- pushes ------------------------------------------------------------------------------

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """The weights to push, (S,), with their header. On a CPU a view, not a copy: the transport copies."""
        model = self.local.model
        weights = model.flat[: model.num_sent]
        if self.host_buffer is not None:
            weights = self.host_buffer.copy_(weights)
        buffer: Buffer = weights.detach().numpy()
        num_train = self.data.num_cases("train")
        header = self._format_of(self.site).header(
            buffer, run_id=run_id, round_number=round_number, sender=self.site, num_train=num_train
        )
        return header, buffer

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """What a push of ``sender`` must look like: a peer's for the next round, a server's ends the present one."""
        oldest = self.state.round_number + (0 if has_server(self.config.method) else 1)
        return self._format_of(sender).expectation(
            run_id, senders=peers, oldest_round=oldest, newest_round=self.config.federation.rounds
        )

    def _format_of(self, site: str) -> WireFormat:
        return self.wire_formats[fingerprint(exchanged_network(self.config, site), self.config.data)]

    def _learner_for(self, network: NetworkConfig) -> Learner:
        """The second learner, re-used from push to push; one for each architecture among the peers."""
        key = fingerprint(network, self.config.data)
        if key not in self.incoming:
            self.incoming[key] = self._build_learner(network)
        return self.incoming[key]

    def _open_incoming(self, message: IncomingModel) -> Learner:
        """Loads a push into the second learner: its weights, a fresh optimiser (our reading)."""
        learner = self._learner_for(self.config.network_of(message.sender))
        if learner.model.layout == self.local.model.layout:  # what is not sent starts from the receiver's own
            learner.model.flat.copy_(self.local.model.flat)
            for name, counter in learner.model.counters().items():
                counter.copy_(self.local.model.counters()[name])
        learner.model.load(message.weights)
        learner.forget_optimiser()
        learner.model.module.train()
        return learner

    # --- a round -----------------------------------------------------------------------------

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """One round: train, validate if asked, keep the best model, write the checkpoint if asked.

        Args:
            order: the driver's order.
            pushes: accepted pushes, in an order that depends on names alone.
        """
        if has_server(self.config.method):
            pushes = ()  # what a server sent too late for its round
        incoming = [
            IncomingModel(header.sender, header.num_train, torch.from_numpy(buffer)) for header, buffer in pushes
        ]
        seconds: dict[str, float] = {}
        with _timed(seconds, "train"):
            result = self._train(order, incoming, seconds)
        seconds["train"] -= sum(value for key, value in seconds.items() if key != "train")
        dice, is_best = self._end_round(order, result.validation_dice, seconds)
        means = result.statistics.means()
        regions = {name: value for name, value in means.items() if name.startswith("region/")}
        return TrainReport(
            site=self.site,
            round_number=order.round_number,
            peers=tuple(message.sender for message in incoming),
            num_steps=result.num_steps,
            losses={name: value for name, value in means.items() if name not in regions},
            regions={name.removeprefix("region/"): value for name, value in regions.items()},
            merge=result.merge,
            candidate_dice=result.candidate_dice,
            validation_dice=dice,
            is_best=is_best,
            seconds=seconds,
            learning_rate=self._rate(order.round_number, 0),
            peak_memory_bytes=_peak_memory_bytes(),
        )

    def adopt(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> AdoptReport:
        """Ends a round with a server: goes on with the server's weights, where they have arrived, and validates.

        Args:
            order: the driver's order; says whether to validate and to write a checkpoint.
            pushes: what the server sent; of another round than this it is left aside.
        """
        seconds: dict[str, float] = {}
        weights = [buffer for header, buffer in pushes if header.round_number == order.round_number]
        for buffer in weights:
            self.local.model.load(torch.from_numpy(buffer))
        dice, is_best = self._end_round(order, None, seconds)
        return AdoptReport(self.site, order.round_number, bool(weights), dice, is_best, seconds, _peak_memory_bytes())

    def _end_round(self, order: TrainOrder, dice: float | None, seconds: dict[str, float]) -> tuple[float | None, bool]:
        """Validates if asked and not done yet, keeps the best model, writes the checkpoint if asked."""
        is_best = False
        if order.evaluate:
            with _timed(seconds, "validate"):
                self.on_progress("validate", 0, 1)
                dice = self.evaluator.validation_dice(self.own) if dice is None else dice
            is_best = dice >= self.state.best_dice
        with _timed(seconds, "checkpoint"):
            self._advance(order, dice=dice, is_best=is_best)
        return dice, is_best

    def _train(self, order: TrainOrder, incoming: Sequence[IncomingModel], seconds: dict[str, float]) -> RoundResult:
        """Runs the method; scoring inside it counts as merging time."""
        number, steps = order.round_number, self.config.federation.local_steps
        torch.manual_seed(derive_seed(self.seed, "torch", self.site, number))
        for learner in (self.local, self.own):
            learner.model.module.train()

        def score(learner: Learner) -> float:
            with _timed(seconds, "merge"):
                self.on_progress("merge", 0, 1)
                return self.evaluator.validation_dice(learner)

        context = RoundContext(
            round_number=number,
            phase=order.phase,
            exchange_index=max(0, number - self.config.federation.num_warmup - 1),
            num_steps=steps,
            num_train=self.data.num_cases("train"),
            batches=(self._on_device(batch) for batch in self.data.batches(number, steps)),
            loss=self.loss,
            sigmoid=self.config.data.is_sigmoid,
            learning_rate=lambda step: self._rate(number, step),
            score=score,
            open_incoming=self._open_incoming,
            on_step=lambda step: self.on_progress("train", step, steps),
            personal=self.personal,
        )
        return METHODS[self.config.method.name](self.local, incoming, context, self.config.method)

    def _on_device(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return Batch(image=batch.image.to(self.device), label=batch.label.to(self.device))

    def _rate(self, round_number: int, step: int) -> float:
        return learning_rate(self.config.optimiser, self.config.federation, round_number=round_number, step=step)

    def _advance(self, order: TrainOrder, *, dice: float | None, is_best: bool) -> None:
        """Moves the state to this round and writes what has to be kept."""
        number = order.round_number
        name = f"model_{number:05d}.safetensors"
        ends_warmup = number == self.config.federation.num_warmup
        if is_best or ends_warmup:
            save_model(self.checkpoints / name, self.own.model, facts=self._facts(number, dice))
        self.state = replace(self.state, round_number=number)
        if is_best and dice is not None:
            self.state = replace(self.state, best_round=number, best_dice=dice, best_file=name)
        if ends_warmup:
            self.state = replace(self.state, before_gossip_file=name)
        if order.checkpoint:
            self.on_progress("checkpoint", 0, 1)
            save_round(self.checkpoints, self.local, self.state, personal=self.personal)

    def _facts(self, round_number: int, dice: float | None) -> Mapping[str, str]:
        """What a model file says of itself."""
        network = self.config.network_of(self.site)
        return {
            "site": self.site,
            "round": str(round_number),
            "validation_dice": "" if dice is None else repr(dice),
            "method": self.config.method.name,
            "network": json.dumps(network.model_dump(mode="json")),
            "fingerprint": fingerprint(network, self.config.data),
            "data_contract": self.contract,
            "seed": str(self.seed),
        }

    # --- evaluation --------------------------------------------------------------------------

    def evaluate(self, *, split: Split, model: str) -> EvaluationReport:
        """Scores one of this site's models on one split, and draws its best and worst test cases.

        Args:
            split: which of the site's cases.
            model: ``personalised`` (best on validation), ``before_gossip`` (at the end of the warm-up), or
                ``shared`` (the exchanged model as it is now).
        """
        learner, round_number = self._model_to_evaluate(model)
        report = self.evaluator.evaluate(
            learner, split=split, model=model, round_number=round_number, on_progress=self.on_progress
        )
        if model == PERSONALISED and split == "test":
            keep_as(self.checkpoints / self.state.best_file, self.checkpoints / "personalised.safetensors")
            self.evaluator.draw(learner, report.scores, self.overlays)
        return report

    def _model_to_evaluate(self, model: str) -> tuple[Learner, int]:
        """A learner holding the model asked for, and the round it comes from."""
        if model == SHARED:
            return self.local, self.state.round_number
        name = self.state.best_file if model == PERSONALISED else self.state.before_gossip_file
        if not name:
            raise CheckpointError(f"site {self.site} has no {model} model: it was never evaluated or had no warm-up")
        learner = self._learner_for(self.config.network_of(self.site))
        facts = load_model(self.checkpoints / name, learner.model)
        return learner, int(facts["round"])


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the time of a block to ``seconds[stage]``."""
    began = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - began
