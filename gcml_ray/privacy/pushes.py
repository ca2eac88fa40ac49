"""Clipped and noised pushes: what leaves a site is what others know already, plus a bounded, noised update.

The Gaussian mechanism over a whole site's update (McMahan et al. 2018, arXiv 1710.06963, without its sampling of
sites). The update is the difference to what all others know already: the server's weights that this site took over
last, else its own last push, else the initial weights, which all sites know. The site's own model is not touched.

Legend: S values of a push.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gcml_ray.config import Config
from gcml_ray.errors import ConfigError
from gcml_ray.model.checkpoint import read_tensors, write_tensors
from gcml_ray.model.weights import FlatModel
from gcml_ray.privacy.accounting import Ledger, epsilon_of, require_opacus
from gcml_ray.privacy.noise import Noise
from gcml_ray.privacy.training import LEDGER_FILE, clipping
from gcml_ray.seeding import derive_seed

KNOWN_FILE = "pushed.safetensors"


def clipped_and_noised(update: Tensor, *, max_norm: float, noise_multiplier: float, noise: Noise) -> Tensor:
    """``update`` (S,) at norm ``max_norm`` or less, plus Gaussian noise of ``noise_multiplier`` x ``max_norm``."""
    scale = clipping([update], max_norm)
    return update * scale + noise.like(update) * (noise_multiplier * max_norm)


class PushNoise:
    """One site's noised pushes, on the CPU.

    Args:
        config: the federation's configuration.
        site: this site's name.
        initial: (S,) the weights that the site began with.
        folder: where it keeps what others know of it, and its ledger.

    Raises:
        ConfigError: Opacus is missing.
        CheckpointError: the ledger cannot be read.
    """

    def __init__(self, config: Config, site: str, initial: Tensor, folder: Path) -> None:
        require_opacus()
        self.config = config
        self.site = site
        self.ledger = Ledger(folder / LEDGER_FILE, identity=config.identity, sample_rate=1.0)
        self._path = folder / KNOWN_FILE
        self._pushed_round = 0
        self._noise = Noise(torch.device("cpu"))
        self.known = self._read(initial.to("cpu", copy=True))
        self._pushed = self.known

    @property
    def epsilon(self) -> float:
        """What the pushes up to now have spent, against an outsider who asks whether the site's data took part."""
        privacy = self.config.privacy
        assert privacy.noise_multiplier is not None
        assert privacy.delta is not None
        return epsilon_of(
            privacy.noise_multiplier, sample_rate=1.0, num_steps=self.ledger.num_spent, delta=privacy.delta
        )

    def noised(self, weights: Tensor, round_number: int) -> Tensor:
        """What is pushed in the place of ``weights``, (S,) on the CPU; the same for every push of a round.

        Args:
            weights: not changed.
            round_number: the round of the push, or of the published weights.
        """
        if round_number == self._pushed_round:
            return self._pushed
        privacy = self.config.privacy
        assert privacy.noise_multiplier is not None
        assert privacy.max_update_norm is not None
        root = self.config.federation.seed
        self._noise.restart(derive_seed(root, "privacy push", self.site, round_number) if privacy.seeded else None)
        self.ledger.spend(1)
        self._pushed = self.known + clipped_and_noised(
            weights - self.known,
            max_norm=privacy.max_update_norm,
            noise_multiplier=privacy.noise_multiplier,
            noise=self._noise,
        )
        self._pushed_round = round_number
        self.note_known(self._pushed)
        return self._pushed

    def note_known(self, weights: Tensor) -> None:
        """Sets the weights (S,) that others know, the reference from which clipped updates are measured."""
        self.known = weights.to("cpu", copy=True)
        write_tensors(self._path, {"weights": self.known.numpy()}, {"identity": self.config.identity})

    def _read(self, initial: Tensor) -> Tensor:
        """What an earlier process of this run noted; a file of another configuration does not count."""
        if not self._path.exists():
            return initial
        tensors, facts = read_tensors(self._path)
        return torch.from_numpy(tensors["weights"]) if facts.get("identity") == self.config.identity else initial


def push_noise(config: Config, site: str, model: FlatModel, folder: Path) -> PushNoise | None:
    """A site's noise on its pushes; None where it pushes without noise.

    Args:
        config: the federation's configuration.
        site: this site's name.
        model: what is pushed, with its initial weights.
        folder: the site's checkpoints.

    Raises:
        ConfigError: running statistics would be noised.
    """
    if config.privacy.mode != "update_noise":
        return None
    if model.num_sent > model.num_parameters:
        raise ConfigError(
            "privacy.mode update_noise would noise running statistics (a variance may become negative): set "
            "method.buffers keep, or norm: INSTANCE or GROUP in network.options"
        )
    return PushNoise(config, site, model.flat[: model.num_sent], folder)
