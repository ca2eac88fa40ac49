"""The server of methods that have one: holds one flat vector, the mean of what the sites sent; has no data.

Satisfies ``actors.site.Trainer``, so a server lives in the pool as sites do: it receives and pushes as they do, and
its "training" is forming the mean. It restarts from its own checkpoint.

Legend: S values of a push.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError, DamagedError, SiteError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.files.whole_files import clear_drafts
from gcml_ray.model.checkpoint import damaged_file, read_tensors, round_file, saved_rounds, write_tensors
from gcml_ray.push.wire import Buffer, Expectation, PushHeader
from gcml_ray.records import AdoptReport, EvaluationReport, SiteInfo, Split, TrainOrder, TrainReport
from gcml_ray.stopwatch import peak_memory_bytes
from gcml_ray.training.cpu import keep_freed_memory
from gcml_ray.training.site_learner import WireFormat, build_learner

log = logging.getLogger(__name__)

KEPT_MEANS = 2  # of past rounds
BLOCK = 1 << 16  # values


def size_weighted_mean(pushes: Sequence[tuple[PushHeader, Buffer]]) -> Buffer:
    """sum_k n_k w_k / sum_k n_k over the pushes, (S,), n_k training cases (FedAvg, arXiv 1602.05629, Algorithm 1)."""
    total = sum(header.num_train for header, _ in pushes)
    shares = [np.float32(header.num_train / total) for header, _ in pushes]
    mean = np.zeros_like(pushes[0][1])
    scratch = np.empty(min(BLOCK, mean.size), mean.dtype)
    for start in range(0, mean.size, BLOCK):  # all pushes of a block while its sum lies in the cache
        part = mean[start : start + BLOCK]
        for share, (_, weights) in zip(shares, pushes, strict=True):
            part += np.multiply(weights[start : start + BLOCK], share, out=scratch[: part.size])
    return mean


class ServerTrainer:
    """Forms the size-weighted mean of the pushes of a round.

    Args:
        config: the federation's configuration.
        site: its name in the pool.
        folder: the run folder; checkpoints go to ``checkpoints/server``.
        use_gpu: not used, a mean over vectors in memory needs none.
        on_progress: told (stage, step, number of steps) as it works; raises to stop the work.
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
        del use_gpu
        self.visits = None  # a server has no cases to score models on
        self.config = config
        self.site = site
        self.checkpoints = RunFolder(folder).checkpoints(site)
        self.on_progress = on_progress
        self.weights: Buffer | None = None
        self.num_train = 0
        self.round_number = 0

    def start(self, *, resume_round: int) -> SiteInfo:
        """Restores the newest mean up to a round.

        Args:
            resume_round: 0 starts afresh. The server forms no mean in warm-up and cool-down, so the newest one up to
                that round is the right one. A damaged file is put aside.
        """
        began = time.perf_counter()
        keep_freed_memory()  # of one round's mean for the next
        model = build_learner(self.config, self.site, self.config.network, torch.device("cpu")).model
        self.format = WireFormat.of(self.config, self.config.network, model)
        self._restore(resume_round)
        return SiteInfo(
            site=self.site,
            num_train=0,
            num_validation=0,
            num_test=0,
            num_parameters=model.num_parameters,
            push_bytes=self.format.push_bytes(self.config.wire),
            device="cpu",
            node=socket.gethostname(),
            pid=os.getpid(),
            restored_round=self.round_number,
            seconds=time.perf_counter() - began,
        )

    def export(self, run_id: str, round_number: int) -> tuple[PushHeader, Buffer]:
        """The mean, (S,), with its header.

        Raises:
            SiteError: there is none yet.
        """
        if self.weights is None:
            raise SiteError(self.site, round_number, "push", "there is no mean to push: no site's weights have arrived")
        header = self.format.header(
            self.weights, run_id=run_id, round_number=round_number, sender=self.site, num_train=self.num_train
        )
        return header, self.weights

    def expectation(self, run_id: str, sender: str, *, peers: frozenset[str]) -> Expectation:
        """What a site's push must look like."""
        del sender  # all sites have one network here
        last = self.config.federation.rounds
        return self.format.expectation(run_id, senders=peers, oldest_round=self.round_number + 1, newest_round=last)

    def train_round(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> TrainReport:
        """The mean of the pushes that have arrived for this round becomes the server's weights."""
        began = time.perf_counter()
        pushes = [(header, buffer) for header, buffer in pushes if header.round_number == order.round_number]
        if not pushes:
            raise SiteError(self.site, order.round_number, "train", "no site's weights have arrived")
        mean = size_weighted_mean(pushes)
        self.on_progress("train", 1, 1)
        self.weights = mean
        self.num_train = sum(header.num_train for header, _ in pushes)
        self.round_number = order.round_number
        if order.checkpoint:
            self.on_progress("checkpoint", 0, 1)
            self._save()
        return TrainReport(
            site=self.site,
            round_number=order.round_number,
            peers=tuple(header.sender for header, _ in pushes),
            num_steps=0,
            losses={},
            regions={},
            merge="size_weighted",
            candidate_dice={},
            validation_dice=None,
            is_best=False,
            seconds={"merge": time.perf_counter() - began},
            learning_rate=0.0,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def adopt(self, order: TrainOrder, pushes: Sequence[tuple[PushHeader, Buffer]]) -> AdoptReport:
        """Never called: a server takes nothing over."""
        del pushes
        raise SiteError(self.site, order.round_number, "adopt", "a server adopts nothing")

    def evaluate(self, *, split: Split, model: str) -> EvaluationReport:
        """Never called: a server has no cases."""
        raise SiteError(self.site, self.round_number, "evaluate", f"a server has no {split} cases to score {model} on")

    # --- checkpoints -------------------------------------------------------------------------

    def _save(self) -> None:
        """Writes the mean, and removes what is older than the last two, or left from a course that was given up."""
        assert self.weights is not None
        state = {"round_number": self.round_number, "num_train": self.num_train, "identity": self.config.identity}
        write_tensors(
            round_file(self.checkpoints, self.round_number), {"weights": self.weights}, {"state": json.dumps(state)}
        )
        rounds = saved_rounds(self.checkpoints)
        kept = [number for number in rounds if number <= self.round_number][-KEPT_MEANS:]
        for number in set(rounds) - set(kept):
            round_file(self.checkpoints, number).unlink(missing_ok=True)

    def _restore(self, resume_round: int) -> None:
        """The newest mean up to a round that can be read; without one the next exchange forms the first."""
        clear_drafts(self.checkpoints)
        for number in reversed(saved_rounds(self.checkpoints)):
            if number <= resume_round:
                try:
                    return self._load(number)
                except DamagedError as error:
                    round_file(self.checkpoints, number).replace(damaged_file(self.checkpoints, number))
                    log.warning("the server goes on without its mean of round %d: %s", number, error)
        if resume_round > self.config.federation.num_warmup:
            log.warning(
                "the server has no mean of an earlier round in %s: the next exchange forms one; a site that joins "
                "before it begins with weights of its own",
                self.checkpoints,
            )
        return None

    def _load(self, round_number: int) -> None:
        path = round_file(self.checkpoints, round_number)
        tensors, metadata = read_tensors(path)
        try:
            state, weights = json.loads(metadata["state"]), tensors["weights"]
            same = (state["identity"], weights.shape) == (self.config.identity, (self.format.num_values,))
            self.round_number, self.num_train = int(state["round_number"]), int(state["num_train"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a server's checkpoint ({error!r})") from error
        if not same:
            raise CheckpointError(
                f"{path} belongs to another configuration: resume with the one the run began with, or delete the file: "
                "the next exchange forms a new mean"
            )
        self.weights = weights.astype(np.float32)
