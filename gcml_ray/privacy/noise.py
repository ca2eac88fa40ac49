"""Standard normal noise that nobody can derive."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor

SECRET_BITS = 128


class Noise:
    """A stream of standard normal values on one device; a new one is begun for each draw that must stay secret.

    On a CPU the stream is NumPy's Philox with a key of 128 bits: torch's generator there keeps 32 bits of its seed, so
    few that all of them can be tried. On a GPU it is torch's Philox, whose seed has 63 here.

    Args:
        device: where the values are wanted.
        seed: see :meth:`restart`.
    """

    def __init__(self, device: torch.device, seed: int | None = None) -> None:
        self.device = device
        self.restart(seed)

    def restart(self, seed: int | None) -> None:
        """Begins the stream of a seed, or, with None, one of the operating system's entropy."""
        if self.device.type == "cpu":
            key = secrets.randbits(SECRET_BITS) if seed is None else seed
            self._numpy = np.random.Generator(np.random.Philox(key=key))
        else:
            self._torch = torch.Generator(self.device)
            self._torch.manual_seed(secrets.randbits(63) if seed is None else seed)

    def like(self, values: Tensor) -> Tensor:
        """The next values of the stream, float32, in the shape of ``values``."""
        if self.device.type == "cpu":
            return torch.from_numpy(self._numpy.standard_normal(values.shape, dtype=np.float32))
        return torch.randn(values.shape, generator=self._torch, device=self.device)
