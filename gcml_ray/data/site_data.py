"""One site's cases in memory, and its endless, resumable stream of training batches.

Legend: B batch, C channels, R regions, *patch = ``data.patch_size``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gcml_ray.config import DataConfig
from gcml_ray.data.case_cache import cached_sample
from gcml_ray.data.datalist import SPLITS, Case, cases_of_site, listed
from gcml_ray.data.loading import Sample
from gcml_ray.data.patches import PatchSampler
from gcml_ray.errors import DataError
from gcml_ray.records import Split
from gcml_ray.seeding import derive_seed, numpy_generator


@dataclass(frozen=True, eq=False)
class Batch:
    """One training batch.

    Attributes:
        image: (B, C, *patch) float32.
        label: (B, 1, *patch) int64 class indices (softmax), or (B, R, *patch) float32 in {0, 1} (regions).
    """

    image: Tensor
    label: Tensor


class SiteData:
    """The cases of one site; read once by :meth:`load`, then served from memory.

    Args:
        site: the site's name; cases of other sites are left out.
        cases: cases with a split each (see :func:`gcml_ray.data.datalist.assign_splits`).
        data: what images and labels are.
        seed: the federation's seed.
    """

    def __init__(self, site: str, cases: Sequence[Case], data: DataConfig, *, seed: int) -> None:
        self.site = site
        self._cases = sorted(cases_of_site(cases, site), key=lambda case: case.name)
        self._data = data
        self._seed = seed
        self._samples: dict[Split, tuple[Sample, ...]] = {}

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read and preprocess every case.

        Args:
            progress: called after each case with (cases done, cases in all).

        Raises:
            DataError: the site has no case, or a case no split, or cases are bad; names all of them.
        """
        self._check_cases()
        samples: dict[Split, list[Sample]] = {split: [] for split in SPLITS}
        problems: list[str] = []
        for done, case in enumerate(self._cases, start=1):
            try:
                samples[case.split or "train"].append(cached_sample(case, self._data))
            except DataError as error:
                problems.append(str(error))
            if progress is not None:
                progress(done, len(self._cases))
        if problems:
            raise DataError(f"site {self.site}: {len(problems)} of {len(self._cases)} cases are bad:{listed(problems)}")
        self._samples = {split: tuple(part) for split, part in samples.items()}

    @property
    def cases(self) -> Sequence[Case]:
        """All cases, by name."""
        return self._cases

    def split(self, name: Split) -> tuple[Sample, ...]:
        """The preprocessed cases of a split, in the order of their names."""
        assert self._samples, "load() comes first"
        return self._samples[name]

    def num_cases(self, name: Split) -> int:
        """Number of cases in a split; known before loading."""
        return sum(case.split == name for case in self._cases)

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the loaded cases."""
        samples = [sample for part in self._samples.values() for sample in part]
        parts = [part for one in samples for part in (one.image, one.label, one.foreground, one.background)]
        return [part for part in parts if part.numel()]

    @property
    def num_bytes(self) -> int:
        """Memory that the loaded cases take."""
        return sum(sample.num_bytes for part in self._samples.values() for sample in part)

    def batches(self, round_number: int, num_steps: int) -> Iterator[Batch]:
        """The batches of one round, a function of seed, site and round alone.

        The training cases form an endless stream, permuted anew each epoch. Round t (from 1) starts at place
        (t - 1) x steps x batch size, wherever the run was started or resumed; ``num_steps`` is the same in
        every round.
        """
        assert round_number >= 1, f"rounds count from 1, got {round_number}"
        sampler = PatchSampler(self._data)
        size = self._data.batch_size
        start = (round_number - 1) * num_steps * size
        for step in range(num_steps):
            first = start + step * size
            patches = [self._patch(sampler, place) for place in range(first, first + size)]
            label = torch.stack([label for _, label in patches])
            yield Batch(
                image=torch.stack([image for image, _ in patches]),
                label=label if self._data.is_sigmoid else label.to(torch.int64),
            )

    def _patch(self, sampler: PatchSampler, place: int) -> tuple[Tensor, Tensor]:
        """The patch at a place of the endless stream."""
        train = self.split("train")
        epoch, position = divmod(place, len(train))
        sample = train[int(self._order(epoch, len(train))[position])]
        return sampler.sample(sample, derive_seed(self._seed, "augment", self.site, place))

    def _order(self, epoch: int, num_train: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return numpy_generator(self._seed, "order", self.site, epoch).permutation(num_train)

    def _check_cases(self) -> None:
        if not self._cases:
            raise DataError(f"site {self.site} has no case in the datalist; check its name there")
        missing = [case.name for case in self._cases if case.split is None]
        if missing:
            raise DataError(f"site {self.site}: cases without a split: {', '.join(missing)}; call assign_splits first")
        if self.num_cases("train") == 0:
            raise DataError(f"site {self.site} has no training case; give one of its {len(self._cases)} that split")
