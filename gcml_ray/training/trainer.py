"""One site's training: its data, its model, its checkpoints. Knows no other site and no transport.

Legend: S values of a push. Everything random is derived from (seed, site, round), so a trainer that
was restored at a round goes on exactly as one that never stopped.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gcml_ray.config import Config, NetworkConfig, ProxyFlMethod, has_server, has_two_models
from gcml_ray.data.datalist import check_files
from gcml_ray.data.pooling import cases_to_train_on
from gcml_ray.data.site_data import SiteData
from gcml_ray.errors import SiteError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.methods import METHODS
from gcml_ray.methods.rounds import IncomingModel, RoundContext, RoundResult, take_plainly
from gcml_ray.model.checkpoint import SiteState
from gcml_ray.model.learner import Learner, learning_rate
from gcml_ray.networks.registry import fingerprint
from gcml_ray.privacy.pushes import push_noise
from gcml_ray.privacy.training import private_training
from gcml_ray.push.wire import Buffer, Expectation, PushHeader
from gcml_ray.records import (
    ENSEMBLE,
    PERSONALISED,
    SHARED,
    AdoptReport,
    EvaluationReport,
    Judgement,
    SiteInfo,
    Split,
    TrainOrder,
    TrainReport,
)
from gcml_ray.seeding import derive_seed
from gcml_ray.stopwatch import peak_memory_bytes, timed
from gcml_ray.training.cpu import num_threads, prepare_thread
from gcml_ray.training.evaluation import Evaluator, Scored
from gcml_ray.training.exchange import Exchange, Published
from gcml_ray.training.judge import Judge
from gcml_ray.training.log_notes import collected_warnings
from gcml_ray.training.peer_models import PeerModels
from gcml_ray.training.site_files import SiteFiles
from gcml_ray.training.site_learner import build_learner, check_networks, exchanged_network, start_averages
from gcml_ray.training.visits import Visits
from gcml_ray.training.workbench import Workbench, in_turn


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
        bench: what it shares with the other sites of its process; None where it is alone.
    """

    def __init__(
        self,
        config: Config,
        site: str,
        folder: Path,
        *,
        use_gpu: bool,
        on_progress: Callable[[str, int, int], None],
        bench: Workbench | None = None,
    ) -> None:
        self.config = config
        self.site = site
        self.files = SiteFiles(config, site, RunFolder(folder).checkpoints(site))
        self.overlays = RunFolder(folder).overlays(site)
        self.on_progress = on_progress
        self.device = torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
        self.wants_gpu = use_gpu
        self.seed = config.federation.seed
        self.is_spoilt = False
        self.bench = bench or Workbench()
        self.learners: tuple[Learner, ...] = ()

    # --- start -------------------------------------------------------------------------------

    @in_turn
    def start(self, *, resume_round: int) -> SiteInfo:
        """Loads the data, builds the model and restores a checkpoint.

        Args:
            resume_round: 0 starts afresh, a positive number restores that round.

        Raises:
            DataError: a case of this site cannot be used.
            ConfigError: the network or the loss does not fit the configuration.
            CheckpointError: the checkpoint asked for is missing or belongs to something else.
        """
        began = time.perf_counter()
        torch.set_num_threads(num_threads(self.config.resources.cpus_per_site))
        data = self.config.data
        check_networks(self.config, self.site, self.device)  # first, as freed memory is kept from here on
        if self.device.type == "cpu":
            prepare_thread()
        with collected_warnings() as self.loading_notes:
            self.data = self._load_data()
        self.loss = build_segmentation_loss(self.config.loss, self.config.data)
        self.evaluator = Evaluator(self.config, self.site, self.data, self.device)
        self.judge = Judge(self.config, self.site, self.files, self.evaluator)
        folder, has_trained = self.files.folder, resume_round > 0
        self.private = private_training(self.config, self.data, folder, self.device, has_trained=has_trained)
        self._build_models()
        if self.config.resources.compile:
            self.on_progress("compile", 0, 1)
            for learner in self.learners:
                learner.compile_ahead((data.batch_size, len(data.channels), *data.patch_size))
        with collected_warnings() as notes:
            self.files.restore(self.local, self.personal, resume_round=resume_round, cases=self.data.cases)
        self.loading_notes += notes
        self._publish()
        return self._info(time.perf_counter() - began)

    @property
    def state(self) -> SiteState:
        """How far this site is, and its best model so far."""
        return self.files.state

    def _load_data(self) -> SiteData:
        """This site's cases, checked and in memory."""
        cases = cases_to_train_on(self.config, self.site)
        check_files(cases)
        data = SiteData(self.site, cases, self.config.data, seed=self.seed)
        data.load(lambda done, total: self.on_progress("load", done, total))
        return data

    def _build_models(self, published: Published | None = None) -> None:
        """The models with their initial weights; ``published`` is what is pushed until others are published."""
        self.local = self._build("local", exchanged_network(self.config, self.site))
        self.personal = self._build_personal()
        self.learners = (self.local,) if self.personal is None else (self.local, self.personal)
        start_averages(self.config, self.local, self.personal)
        noise = push_noise(self.config, self.site, self.local.model, self.files.folder)
        num_train = self.data.num_cases("train")
        self.exchange = Exchange(
            self.config, self.site, self.local, num_train, second=self.bench.second, noise=noise, published=published
        )
        self.peers = PeerModels(self.config, self.site, self.files, self.evaluator, self.exchange)
        self.visits = Visits(
            self.config, self.site, self.files, self.evaluator, self.exchange, on_progress=self.on_progress
        )

    def _build_personal(self) -> Learner | None:
        """The second model, for methods with two: Ditto's starts as the shared one, ProxyFL's from its own weights."""
        if not has_two_models(self.config.method):
            return None
        is_private = isinstance(self.config.method, ProxyFlMethod)
        return self._build("personal", self.config.network_of(self.site), is_private=is_private)

    def _build(self, role: str, network: NetworkConfig, *, is_private: bool = False) -> Learner:
        """A new learner with weights of its own, using the network that the workbench shares."""
        learner = build_learner(self.config, self.site, network, self.device, is_private=is_private)
        return self.bench.place(learner, f"{role} {fingerprint(network, self.config.data)}")

    @property
    def own(self) -> Learner:
        """The model that this site keeps for itself."""
        return self.personal or self.local

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
            push_bytes=self.exchange.push_bytes,
            device=str(self.device),
            node=socket.gethostname(),
            pid=os.getpid(),
            restored_round=self.state.round_number,
            seconds=seconds,
            notes=tuple(notes),
        )

    # --- pushes ------------------------------------------------------------------------------

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """The weights to push, with their header; see :meth:`gcml_ray.training.exchange.Exchange.export`."""
        if self.is_spoilt and self.config.federation.mode == "sync":  # without a barrier a round may be under way
            with self.bench.turn(self):
                self._mend()
        return self.exchange.export(run_id, round_number)

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """What a push of ``sender`` must look like."""
        return self.exchange.expectation(run_id, sender, peers=peers, own_round=self.state.round_number)

    def _publish(self) -> None:
        """Without a barrier, what is pushed is a copy made at the end of a round: the next one may be training."""
        if self.config.federation.mode == "async":
            self.exchange.publish(self.state.round_number)

    # --- a round -----------------------------------------------------------------------------

    @in_turn
    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """One round: train, validate if asked, keep the best model, write the checkpoint if asked.

        Args:
            order: the driver's order.
            pushes: accepted pushes, in an order that depends on names alone.
        """
        if has_server(self.config.method):
            pushes = ()  # what a server sent too late for its round
        self._mend()
        arrived = self.exchange.incoming(pushes, own_round=self.state.round_number)
        judging: dict[str, float] = {}
        incoming: Sequence[IncomingModel] = arrived
        judged: tuple[Judgement, ...] = ()
        if arrived and self.judge.is_active:
            with timed(judging, "judge"):
                self.on_progress("judge", 0, 1)
                incoming, judged = self.judge.screen(arrived, self.local, self.exchange)
        seconds: dict[str, float] = {}
        self.is_spoilt = True  # until the round is whole
        with timed(seconds, "train"):
            result = self._train(order, incoming, seconds)
        seconds["train"] -= sum(value for key, value in seconds.items() if key != "train")
        seconds |= judging
        self._check_finite(order.round_number)
        self.peers.keep(incoming, order.round_number)
        dice, is_best = self._end_round(order, result.validation_dice if order.evaluate else None, seconds)
        self.is_spoilt = False
        is_async = self.config.federation.mode == "async"
        means = result.statistics.means()
        regions = {name: value for name, value in means.items() if name.startswith("region/")}
        return TrainReport(
            site=self.site,
            round_number=order.round_number,
            peers=tuple(push.sender for push in incoming) if result.num_steps else (),  # none once an epsilon is spent
            num_steps=result.num_steps,
            losses={name: value for name, value in means.items() if name not in regions},
            regions={name.removeprefix("region/"): value for name, value in regions.items()},
            merge=result.merge,
            candidate_dice=result.candidate_dice,
            validation_dice=dice,
            is_best=is_best,
            seconds=seconds,
            learning_rate=self._rate(order.round_number, 0),
            peak_memory_bytes=peak_memory_bytes(),
            staleness=tuple(push.staleness for push in incoming) if is_async else (),
            age_s=tuple(push.age_s for push in incoming) if is_async else (),
            privacy_epsilon=spender.epsilon if (spender := self.private or self.exchange.noise) else None,
            judged=judged,
        )

    @in_turn
    def adopt(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> AdoptReport:
        """Ends a round with a server: goes on with the server's weights, where they have arrived, and validates.

        Args:
            order: the driver's order; says whether to validate and to write a checkpoint.
            pushes: what the server sent; of another round than this it is left aside.
        """
        self._mend()
        seconds: dict[str, float] = {}
        weights = [buffer for header, buffer in pushes if header.round_number == order.round_number]
        for buffer in weights:
            self.local.model.load(torch.from_numpy(buffer))
            if self.exchange.noise is not None:
                self.exchange.noise.note_known(torch.from_numpy(buffer))
        dice, is_best = self._end_round(order, None, seconds)
        return AdoptReport(self.site, order.round_number, bool(weights), dice, is_best, seconds, peak_memory_bytes())

    def _end_round(self, order: TrainOrder, dice: float | None, seconds: dict[str, float]) -> tuple[float | None, bool]:
        """Validates if asked and not done yet, keeps the best model, writes the checkpoint if asked."""
        is_best = False
        if order.evaluate:
            with timed(seconds, "validate"):
                self.on_progress("validate", 0, 1)
                if dice is None:
                    dice = self.evaluator.validation_dice(self.own)
            is_best = dice >= self.state.best_dice
        with timed(seconds, "checkpoint"):
            with self.own.model.averaged():
                self.files.advance(order.round_number, self.own, dice=dice, is_best=is_best)
            if order.checkpoint:
                self.on_progress("checkpoint", 0, 1)
                self.files.save(self.local, self.personal)
            self._publish()
        return dice, is_best

    def _check_finite(self, round_number: int) -> None:
        """Refuses to go on with weights that hold NaN or infinity.

        Raises:
            SiteError: training has diverged.
        """
        if not all(learner.model.is_finite for learner in self.learners):
            raise SiteError(
                self.site,
                round_number,
                "train",
                "the weights became NaN or infinite: training goes on from the last checkpoint, or from the start. If "
                "it happens again, lower optimiser.learning_rate or set optimiser.clip_norm",
            )

    def _mend(self) -> None:
        """Goes back to the last whole round if one was broken off: half-trained weights must not be used."""
        if not self.is_spoilt:
            return
        self._build_models(self.exchange.published)
        self.files.restore(self.local, self.personal, resume_round=self.files.newest_round)
        self._publish()
        self.is_spoilt = False

    def _train(self, order: TrainOrder, incoming: Sequence[IncomingModel], seconds: dict[str, float]) -> RoundResult:
        """Runs the method; scoring inside it counts as merging time."""
        number, steps = order.round_number, self.config.federation.local_steps
        if self.private is not None and not self.private.begin_round(number, steps):
            return RoundResult()

        torch.manual_seed(derive_seed(self.seed, "torch", self.site, number))
        for learner in (self.local, self.own):
            learner.model.module.train()

        def score(learner: Learner) -> float:
            with timed(seconds, "merge"):
                self.on_progress("merge", 0, 1)
                return self.evaluator.validation_dice(learner)

        context = RoundContext(
            round_number=number,
            phase=order.phase,
            exchange_index=max(0, number - self.config.federation.num_warmup - 1),
            num_steps=steps,
            num_train=self.data.num_cases("train"),
            batches=(batch.to(self.device) for batch in (self.private or self.data).batches(number, steps)),
            loss=self.loss,
            sigmoid=self.config.data.is_sigmoid,
            learning_rate=lambda step: self._rate(number, step),
            score=score,
            open_incoming=self.exchange.open_incoming,
            on_step=lambda step: self.on_progress("train", step, steps),
            personal=self.personal,
            take=self.private.take if self.private else take_plainly,
        )
        return METHODS[self.config.method.name](self.local, incoming, context, self.config.method)

    def _rate(self, round_number: int, step: int) -> float:
        return learning_rate(self.config.optimiser, self.config.federation, round_number=round_number, step=step)

    # --- evaluation --------------------------------------------------------------------------

    @in_turn
    def evaluate(self, *, split: Split, model: str) -> EvaluationReport:
        """Scores one of this site's models on one split, and draws its best and worst test cases.

        Args:
            split: which of the site's cases.
            model: ``personalised`` (best on validation), ``before_gossip`` (at the end of the warm-up),
                ``shared`` (the exchanged model as it is now), or ``ensemble`` (with peers' models).
        """
        self._mend()
        if model == PERSONALISED and not self.state.best_file:  # the run ended before any model was validated
            order = TrainOrder(self.state.round_number, "cooldown", evaluate=True, checkpoint=False)
            self._end_round(order, None, {})
        learner, round_number = self._model_to_evaluate(model)
        report = self.evaluator.evaluate(
            learner, split=split, model=model, round_number=round_number, on_progress=self.on_progress
        )
        if model == PERSONALISED and split == "test" and round_number > 0:  # else it is the initial model
            self.files.keep_personalised()
            assert isinstance(learner, Learner)
            self.evaluator.draw(learner, report.scores, self.overlays)
        return replace(report, peak_memory_bytes=peak_memory_bytes())

    def _model_to_evaluate(self, model: str) -> tuple[Scored, int]:
        """What predicts, and the round that it comes from."""
        if model == ENSEMBLE:
            return self.peers.choose()
        if model == SHARED:
            return self.local, self.state.round_number
        learner = self.exchange.learner_for(self.config.network_of(self.site))
        return learner, self.files.load(model, learner.model)
