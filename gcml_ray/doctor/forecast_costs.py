"""What a site has and what its work costs: the ground that the forecast stands on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gcml_ray.records import Split


@dataclass(frozen=True)
class SiteCases:
    """The cases of one site as their headers say: split and size on the training grid, (D, H, W) or (H, W)."""

    site: str
    grids: tuple[tuple[Split, tuple[int, ...]], ...]

    def count(self, split: Split) -> int:
        """Number of cases in a split."""
        return sum(part == split for part, _ in self.grids)

    def largest(self, *splits: Split) -> int:
        """Voxels of the largest case in these splits."""
        return max((math.prod(shape) for part, shape in self.grids if part in splits), default=0)

    def voxels(self, *splits: Split) -> int:
        """Voxels of all cases in these splits."""
        return sum(math.prod(shape) for part, shape in self.grids if part in splits)


@dataclass(frozen=True)
class SiteCosts:
    """What one site costs; see :func:`gcml_ray.doctor.probe.measure_site`.

    ``num_values`` are all weights (parameters and floating-point buffers), ``num_sent`` those of a push.
    ``activation_bytes``: what steps and predictions take beside weights, moments and data, on the device.
    ``window_s``: one sliding window of a prediction. ``load_s`` and ``score_s`` are for one voxel, the latter
    with all the metrics of a test. ``load_bytes``: by how much memory grows at the peak of loading, for one voxel.
    """

    site: str
    num_parameters: int
    num_values: int
    num_sent: int
    local_step_s: float
    mutual_step_s: float
    window_s: float
    load_s: float
    score_s: float
    checkpoint_s: float
    activation_bytes: int
    on_gpu: bool
    load_bytes: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where the sites run: ``slots`` work at full speed at a time, ``sites_per_machine`` share a machine.

    ``interpreter_bytes``: a process with torch and MONAI imported, before any data. ``sites_per_process``: how many
    share a process and take turns with what only the one that works needs; ``one_process``: all processes are this one.
    """

    slots: float
    sites_per_machine: int
    interpreter_bytes: int
    one_process: bool
    sites_per_process: int = 1
