"""One site's cases in memory, and its endless, resumable stream of training batches.

Legend: B batch, C channels, R regions, *patch = ``data.patch_size``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcml_ray.config import DataConfig
from gcml_ray.data.case_cache import cached_sample
from gcml_ray.data.datalist import SPLITS, Case, cases_of_site, listed
from gcml_ray.data.loading import Sample
from gcml_ray.data.patch_stream import Patch, PatchStream, PatchWorkers, stacked
from gcml_ray.data.problems import CaseError, CaseProblem, grouped
from gcml_ray.errors import DataError, SiteError
from gcml_ray.records import Split

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """One training batch.

    Attributes:
        image: (B, C, *patch) float32.
        label: (B, 1, *patch) int64 class indices (softmax), or (B, R, *patch) float32 in {0, 1} (regions).
    """

    image: Tensor
    label: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copy to a GPU goes on while the caller does."""
        if device.type == "cpu":
            return self
        image, label = (part.pin_memory().to(device, non_blocking=True) for part in (self.image, self.label))
        return Batch(image=image, label=label)


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
        self._workers: PatchWorkers | None = None

    def load(self, progress: Callable[[int, int], None] | None = None, *, is_whole: bool = True) -> None:
        """Read and preprocess every case.

        Args:
            progress: called after each case with (cases done, cases in all).
            is_whole: whether these are all cases of the site, so that their labels tell what it can learn.

        Raises:
            DataError: the site has no case, or a case no split, or cases are bad; names all of them.
        """
        self._check_cases()
        samples: dict[Split, list[Sample]] = {split: [] for split in SPLITS}
        problems: list[CaseProblem] = []
        for done, case in enumerate(self._cases, start=1):
            try:
                samples[case.split or "train"].append(cached_sample(case, self._data))
            except CaseError as error:
                problems += [(case, problem) for problem in error.problems]
            if progress is not None:
                progress(done, len(self._cases))
        if problems:
            lines = grouped(problems, len(self._cases))
            num_bad = len({case for case, _ in problems})
            several = f"{num_bad} of {len(self._cases)} cases are bad:{listed(lines)}"
            raise DataError(f"site {self.site}: {several if len(lines) > 1 else lines[0]}")
        self._samples = {split: tuple(part) for split, part in samples.items()}
        if is_whole:
            self._warn_if_empty("training", samples["train"], "it can learn nothing alone")
            self._warn_if_empty("validation", samples["validation"], "it chooses its best model blindly")

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
        size = self._data.batch_size
        first = (round_number - 1) * num_steps * size
        places = [range(start, start + size) for start in range(first, first + num_steps * size, size)]
        for image, label in self._cut(places, round_number):
            yield Batch(image=image, label=label if self._data.is_sigmoid else label.to(torch.int64))

    def _cut(self, places: Sequence[Sequence[int]], round_number: int) -> Iterator[Patch]:
        """The patches at these places of the stream, a batch at a time."""
        stream = PatchStream(self.split("train"), self._data, seed=self._seed, site=self.site)
        if not self._data.num_workers:
            yield from (stacked([stream[place] for place in part]) for part in places)
            return
        self._workers = self._workers or PatchWorkers(stream, self._data.num_workers)
        try:
            yield from self._workers.batches(places)
        except (RuntimeError, OSError) as error:  # with one all have to go; the next round starts new ones
            self._workers = None
            words = (
                f"a process of data.num_workers failed ({error}): such processes need memory, room in /dev/shm for the "
                "cases and four open files a case (ulimit -n); set data.num_workers to 0 to do without"
            )
            raise SiteError(self.site, round_number, "train", words) from error

    def _warn_if_empty(self, kind: str, samples: Sequence[Sample], then: str) -> None:
        if samples and not any(sample.label.any() for sample in samples):
            log.warning("site %s: none of its %s cases has a labelled voxel; %s", self.site, kind, then)

    def _check_cases(self) -> None:
        if not self._cases:
            raise DataError(f"site {self.site} has no case in the datalist; check its name there")
        missing = [case.name for case in self._cases if case.split is None]
        if missing:
            raise DataError(f"site {self.site}: cases without a split: {', '.join(missing)}; call assign_splits first")
        if self.num_cases("train") == 0:
            raise DataError(f"site {self.site} has no training case; give one of its {len(self._cases)} that split")
