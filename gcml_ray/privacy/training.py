"""Differentially private local training: DP-SGD over the flat vectors of all models that a step trains.

Abadi et al. 2016, arXiv 1607.00133. A step takes the gradient of every case on its own, clips it to
``max_grad_norm``, adds Gaussian noise to the sum, divides by the expected batch size and leaves the rest to the
ordinary optimiser. A case is what the bound protects.

Methods that train two models in a step (the local one with the incoming, the shared or the private one) couple
them: each learns from what the other says, so one without noise would hand on what it has seen. Here both are
private, always: the gradients of all models together are one vector, clipped and noised as one, and a step is one
mechanism for the accountant however many models it trains. Our reading; ProxyFL adds noise to the proxy alone.

The loop over cases needs no hooks into layers, works with any network and loss, and holds one gradient, not B.

Legend: B batch, P values of parameters.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gcml_ray.config import Config
from gcml_ray.data.site_data import Batch, SiteData
from gcml_ray.errors import ConfigError
from gcml_ray.model.learner import Learner, Statistics
from gcml_ray.privacy.accounting import Ledger, epsilon_of, require_opacus
from gcml_ray.privacy.batches import poisson_batches, sample_rate
from gcml_ray.privacy.noise import Noise
from gcml_ray.seeding import derive_seed, numpy_generator, secret_seed

log = logging.getLogger(__name__)

Step = Callable[[Batch], Statistics]
LEDGER_FILE = "privacy.json"


def private_step(
    learners: Sequence[Learner],
    step: Step,
    batch: Batch,
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    expected_batch: float,
    noise: Noise,
) -> Statistics:
    """One optimiser step of each learner on (sum of the cases' clipped gradients + noise) / expected batch size.

    Args:
        learners: those that ``step`` trains; their gradients are clipped as one vector.
        step: forward and backward pass of each learner, as in training without privacy.
        batch: (B, ...) cases; where B is 0 the step is noise alone.
        max_grad_norm: the largest norm of one case's gradient.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``.
        expected_batch: the expected B; not B itself, which would tell how many cases were drawn.
        noise: on the learners' device.

    Returns:
        The mean over the cases of the step's statistics, without noise; empty where B is 0.
    """
    sums = [torch.zeros_like(learner.model.gradient) for learner in learners]  # (P,) each
    seen: list[Statistics] = []
    for case in range(len(batch.image)):
        for learner in learners:
            learner.is_collecting = True
        try:
            seen.append(step(Batch(image=batch.image[case : case + 1], label=batch.label[case : case + 1])))
        finally:
            for learner in learners:
                learner.is_collecting = False
        scale = clipping([learner.model.gradient for learner in learners], max_grad_norm)
        for total, learner in zip(sums, learners, strict=True):
            total.addcmul_(learner.model.gradient, scale)
    for total, learner in zip(sums, learners, strict=True):
        total.add_(noise.like(total), alpha=noise_multiplier * max_grad_norm)
        torch.div(total, expected_batch, out=learner.model.gradient)
        learner.take_step()
    return {name: torch.stack([statistics[name] for statistics in seen]).mean() for name in (seen[0] if seen else ())}


def clipping(parts: Sequence[Tensor], max_norm: float) -> Tensor:
    """The factor, at most 1, that brings the vector made of all parts, (P,) each, to the largest norm."""
    norm = torch.stack([part.norm() for part in parts]).norm()
    return torch.clamp(max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny), max=1.0)


def check_network(module: nn.Module, *, name: str) -> None:
    """Refuses a network whose layers see more than one case, or remember what they saw.

    Raises:
        ConfigError: it has BatchNorm, or normalisation with running statistics.
    """
    for layer_name, layer in module.named_modules():
        if isinstance(layer, _NormBase) and (layer.track_running_stats or "BatchNorm" in type(layer).__name__):
            raise ConfigError(
                f"privacy.mode dp_sgd cannot be kept by layer {layer_name} ({type(layer).__name__}) of network {name}: "
                "it mixes cases, or keeps statistics of them without noise. Choose norm: INSTANCE or GROUP in "
                "network.options, or a network without it"
            )


class PrivateTraining:
    """One site's private training: its noise, its sampling, and what it has spent.

    Args:
        config: the federation's configuration.
        data: the site's cases.
        folder: where its ledger lies.
        device: where it trains.
        has_trained: whether it goes on from a checkpoint.

    Raises:
        ConfigError: Opacus is missing, or the site has too few cases for ``batch_size`` or ``delta``.
        CheckpointError: the ledger is lost, or cannot be read.
    """

    def __init__(
        self, config: Config, data: SiteData, *, folder: Path, device: torch.device, has_trained: bool = False
    ) -> None:
        require_opacus()
        _check_sizes(config, data)
        privacy = config.privacy
        assert privacy.noise_multiplier is not None
        assert privacy.max_grad_norm is not None
        assert privacy.delta is not None
        self.config = config
        self.data = data
        self.site = data.site
        self.noise_multiplier = privacy.noise_multiplier
        self.max_grad_norm = privacy.max_grad_norm
        self.delta = privacy.delta
        self.sample_rate = sample_rate(config.data, num_train=data.num_cases("train"))
        self.ledger = Ledger(
            folder / LEDGER_FILE, identity=config.identity, sample_rate=self.sample_rate, is_expected=has_trained
        )
        self.noise = Noise(device)
        self._noise_seeds: Iterator[int] | None = None  # None: nobody can derive them

    @property
    def epsilon(self) -> float:
        """What the steps up to now have spent, at ``privacy.delta``."""
        return self._epsilon_after(0)

    def begin_round(self, round_number: int, num_steps: int) -> bool:
        """Counts a round's steps before they are taken; False where they would exceed ``privacy.epsilon_limit``."""
        limit = self.config.privacy.epsilon_limit
        if limit is not None and self._epsilon_after(num_steps) > limit:
            log.warning(
                "site %s stops training at round %d: epsilon is %.3f and privacy.epsilon_limit %g would be exceeded",
                self.site,
                round_number,
                self.epsilon,
                limit,
            )
            self.ledger.spend(0)  # also before its first round: a checkpoint without a ledger is refused
            return False
        self.ledger.spend(num_steps)
        self._noise_seeds = self._seeds("privacy noise", round_number) if self.config.privacy.seeded else None
        return True

    def batches(self, round_number: int, num_steps: int) -> Iterator[Batch]:
        """The round's Poisson batches, with cases drawn by a secret seed unless ``privacy.seeded``."""
        is_seeded = self.config.privacy.seeded
        root = self.config.federation.seed if is_seeded else secret_seed()
        return poisson_batches(
            self.data,
            self.config.data,
            num_steps=num_steps,
            coins=numpy_generator(root, "privacy coins", self.site, round_number),
            patch_seeds=self._seeds("privacy patch", round_number),
        )

    def take(self, learners: Sequence[Learner], step: Step, batch: Batch) -> Statistics:
        """One private step; see :func:`private_step`."""
        self.noise.restart(None if self._noise_seeds is None else next(self._noise_seeds))
        return private_step(
            learners,
            step,
            batch,
            max_grad_norm=self.max_grad_norm,
            noise_multiplier=self.noise_multiplier,
            expected_batch=self.config.data.batch_size,
            noise=self.noise,
        )

    def _epsilon_after(self, num_steps: int) -> float:
        return epsilon_of(
            self.noise_multiplier,
            sample_rate=self.sample_rate,
            num_steps=self.ledger.num_spent + num_steps,
            delta=self.delta,
        )

    def _seeds(self, purpose: str, round_number: int) -> Iterator[int]:
        """A seed for each draw: the operating system's entropy, or for tests a derived one."""
        if not self.config.privacy.seeded:
            return (secret_seed() for _ in itertools.count())
        root = self.config.federation.seed
        return (derive_seed(root, purpose, self.site, round_number, index) for index in itertools.count())


def private_training(
    config: Config, data: SiteData, folder: Path, device: torch.device, *, has_trained: bool
) -> PrivateTraining | None:
    """A site's private training; None where it trains without privacy."""
    if config.privacy.mode != "dp_sgd":
        return None
    return PrivateTraining(config, data, folder=folder, device=device, has_trained=has_trained)


def _check_sizes(config: Config, data: SiteData) -> None:
    """Raises ConfigError where a site has too few cases."""
    num_train, delta = data.num_cases("train"), config.privacy.delta
    if config.data.batch_size > num_train:
        raise ConfigError(
            f"privacy.mode dp_sgd draws data.batch_size {config.data.batch_size} cases a step, but site {data.site} "
            f"has {num_train} training cases: lower data.batch_size"
        )
    assert delta is not None
    if delta >= 1 / num_train:
        raise ConfigError(
            f"privacy.delta {delta:g} promises nothing at site {data.site}: with {num_train} training cases it must be "
            f"below {1 / num_train:g} (1 / cases)"
        )
