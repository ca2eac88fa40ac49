"""Where a site's tensors are while other sites of its process work: host memory, or a file mapped into memory.

Tensors keep their identity: a network, an optimiser and a data set that hold one find its values wherever they lie.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gcml_ray.model.learner import Learner

ALIGNMENT = 64  # bytes; what torch gives its own tensors


def lasting_tensors(learner: Learner) -> list[Tensor]:
    """What a learner must keep between two turns: weights, their average, moments; not its gradient.

    Single numbers (steps) stay where they are.
    """
    average = learner.model.average
    tensors = [learner.model.flat, *([average.values] if average is not None else [])]
    return [tensor for tensor in (*tensors, *learner.optimiser.moments.values()) if tensor.numel() > 1]


def move(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Moves tensors to a device; whether any of them was elsewhere."""
    strangers = [tensor for tensor in tensors if tensor.device.type != device.type]
    for tensor in strangers:
        tensor.data = tensor.data.to(device)
    return bool(strangers)


class Drawer:
    """Tensors on disk, in a file without a name that is gone with the process.

    They are read and written as in memory; the system reads a page when it is touched and writes it back in its own
    time. After :meth:`keep` none of them takes memory of this process.

    Args:
        folder: on the disk that holds the file; is made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pages: mmap.mmap | None = None
        self._first = self._end = 0

    def keep(self, tensors: Sequence[Tensor]) -> bool:
        """Lets go of the memory of these tensors, (any shape) on the CPU.

        Returns:
            Whether they have moved: at first they have, and where new ones have taken the place of old ones.

        Raises:
            OSError: the disk is full.
        """
        moves = not all(self._first <= tensor.data_ptr() < self._end for tensor in tensors)
        if moves:
            self._put(tensors)
        if self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)
        return moves

    def _put(self, tensors: Sequence[Tensor]) -> None:
        """Moves them into a new file; the old one goes with the last tensor that looks into it."""
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            os.posix_fallocate(file.fileno(), 0, sum(sizes))  # else a full disk would end the process
            pages = mmap.mmap(file.fileno(), sum(sizes))
        offset = 0
        for tensor, size in zip(tensors, sizes, strict=True):
            place = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
            tensor.data = place.copy_(tensor.detach())
            offset += size
        self._pages = pages
        self._first = tensors[0].data_ptr()
        self._end = self._first + offset
