"""A site's endless stream of training patches, cut here or by processes beside it (``data.num_workers``).

Each patch is a function of seed, site and its place in the stream, so who cuts it changes nothing.

Legend: B batch, C channels, R regions, *patch = ``data.patch_size``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gcml_ray.config import DataConfig
from gcml_ray.lean_imports import import_monai
from gcml_ray.seeding import derive_seed, numpy_generator

if TYPE_CHECKING:  # it brings MONAI along, which a worker loads in its own way
    from gcml_ray.data.loading import Sample

Patch = tuple[Tensor, Tensor]


class PatchStream(Dataset[Patch]):
    """The training cases as an endless stream, permuted anew each epoch; place 0 is the first patch.

    Args:
        train: the training cases.
        data: how patches are made.
        seed: the federation's seed.
        site: whose cases.
    """

    def __init__(self, train: Sequence[Sample], data: DataConfig, *, seed: int, site: str) -> None:
        from gcml_ray.data.patches import PatchSampler  # noqa: PLC0415 - MONAI, see above

        self._train = train
        self._data = data
        self._seed = seed
        self._site = site
        self._sampler = PatchSampler(data)

    def __getitem__(self, place: int) -> Patch:
        """Image (C, *patch) and label (1 or R, *patch) of the patch at a place."""
        epoch, position = divmod(place, len(self._train))
        order = numpy_generator(self._seed, "order", self._site, epoch).permutation(len(self._train))
        seed = derive_seed(self._seed, "augment", self._site, place)
        return self._sampler.sample(self._train[int(order[position])], seed)

    def __reduce__(self) -> tuple[Any, ...]:
        """As plain tensors: a worker loads MONAI before it makes samples of them."""
        parts = [(one.case, one.image, one.label, one.spacing, one.foreground, one.background) for one in self._train]
        return _stream_in_worker, (parts, self._data, self._seed, self._site, os.getpid())


def stacked(patches: Sequence[Patch]) -> Patch:
    """Patches as one batch: image (B, C, *patch), label (B, 1 or R, *patch)."""
    return torch.stack([image for image, _ in patches]), torch.stack([label for _, label in patches])


def _stream_in_worker(
    parts: Sequence[tuple[Any, ...]], data: DataConfig, seed: int, site: str, parent: int
) -> PatchStream:
    if os.getppid() != parent:  # killed meanwhile: torch watches whoever is the parent from now on, which never ends
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the run, which ends after its round
    import_monai()
    from gcml_ray.data.loading import Sample  # noqa: PLC0415 - after MONAI

    return PatchStream([Sample(*part) for part in parts], data, seed=seed, site=site)


class PatchWorkers:
    """Processes that cut the patches of the next batches while a step runs; they live as long as this object.

    Args:
        stream: what they cut from; each process gets the cases once, through shared memory.
        number: how many.
    """

    def __init__(self, stream: PatchStream, number: int) -> None:
        self._places: list[list[int]] = []
        self._loader: DataLoader[Patch] = DataLoader(
            stream,
            batch_sampler=self._places,
            collate_fn=stacked,
            num_workers=number,
            multiprocessing_context="spawn",  # threads of Ray and torch do not survive a fork
            persistent_workers=True,  # no timeout: with one torch would not look whether they live
            generator=torch.Generator(),  # else starting them would take a number from the network's dropout
        )

    def batches(self, places: Sequence[Sequence[int]]) -> Iterator[Patch]:
        """One batch of the patches at each of these lists of places."""
        self._places[:] = [list(part) for part in places]
        return iter(self._loader)
