"""Memory of one large case: how far it grows while the case is loaded, scored and drawn, and what is kept of it.

Made-up volumes of the sizes that hospitals have; every measurement in a process of its own (Linux counts its peak).
Scored and drawn is a prediction of chance, which has surfaces all over the image: the most that a test can take.

    python -m benchmarks.large
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor

from gcml_ray.config import DataConfig
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import Sample, load_sample
from gcml_ray.prediction.metrics import score_case
from gcml_ray.report.overlays import draw_overlay
from gcml_ray.stopwatch import memory_growth

VOXEL_MM = (0.8, 0.8, 2.5)


@dataclass(frozen=True)
class Size:
    """Volumes of a case: voxels, channels, and the voxel size that they are resampled to."""

    title: str
    shape: tuple[int, int, int]
    channels: int
    target_mm: tuple[float, float, float] | None = None


SIZES = (
    Size("MR, four sequences", (240, 240, 155), 4),
    Size("CT", (512, 512, 200), 1),
    Size("CT, to 1 x 1 x 2.5 mm", (512, 512, 200), 1, (1.0, 1.0, 2.5)),
    Size("CT and PET, to 2 x 2 x 3 mm", (512, 512, 250), 2, (2.0, 2.0, 3.0)),
)


def make_case(size: Size, folder: Path) -> Case:
    """Noise with a block of foreground, as int16 NIfTI."""
    rng, affine = np.random.default_rng(0), np.diag([*VOXEL_MM, 1.0])
    label = np.zeros(size.shape, dtype=np.uint8)
    label[tuple(slice(length // 3, length // 2) for length in size.shape)] = 1
    paths = [str(folder / f"image{channel}.nii.gz") for channel in range(size.channels)]
    for path in paths:
        nibabel.save(nibabel.Nifti1Image(rng.integers(-100, 200, size=size.shape, dtype=np.int16), affine), path)
    nibabel.save(nibabel.Nifti1Image(label, affine), folder / "label.nii.gz")
    return Case("A", "case", tuple(paths), str(folder / "label.nii.gz"), "train")


def data_of(size: Size) -> DataConfig:
    """How such a case is read."""
    return DataConfig.model_validate(
        {
            "datalist": "unused.json",
            "channels": [f"c{channel}" for channel in range(size.channels)],
            "labels": {"background": 0, "tumour": 1},
            "spacing_is_real": True,
            "patch_size": (32, 32, 32),
            "orientation": "RAS",
            "target_spacing_mm": size.target_mm,
        }
    )


def grown(work: Callable[[], object]) -> tuple[float, float]:
    """By how many megabytes this process grows at the peak of a call, and its processor seconds."""
    began = time.process_time()
    with memory_growth() as growth:
        work()
    return growth[0] / 1e6, time.process_time() - began


def measure(size: Size, case: Case, what: str, queue: multiprocessing.Queue[tuple[float, float, float]]) -> None:
    """One measurement, in this process: megabytes that it grows by, seconds, megabytes of the case that are kept."""
    torch.set_num_threads(1)
    kept: list[Sample] = []
    found = grown(lambda: kept.append(load_sample(case, data_of(size))))
    sample = kept[0]
    guess = torch.randint(0, 2, sample.label.shape, dtype=torch.uint8)
    if what == "score":
        found = grown(lambda: score(sample, guess))
    elif what == "draw":
        with tempfile.TemporaryDirectory() as folder:
            arrays = (sample.image.numpy(), sample.label.numpy(), guess.numpy())
            found = grown(lambda: draw_overlay(*arrays, title="case", path=Path(folder) / "overlay.png"))
    queue.put((*found, sample.num_bytes / 1e6))


def score(sample: Sample, guess: Tensor) -> None:
    """All metrics of a test."""
    score_case(
        guess,
        sample.label,
        spacing=sample.spacing,
        tolerance=1.0,
        class_names=["tumour"],
        sigmoid=False,
        site="A",
        case="case",
        split="test",
        model="chance",
    )


def main() -> None:
    """A row a size."""
    print("| case | as float32, MB | kept, MB | load: + MB | CPU s | score: + MB | CPU s | draw: + MB | CPU s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    context = multiprocessing.get_context("spawn")
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(size, Path(folder))
            cells, kept = [], 0.0
            for what in ("load", "score", "draw"):
                queue: multiprocessing.Queue[tuple[float, float, float]] = context.Queue()
                process = context.Process(target=measure, args=(size, case, what, queue))
                process.start()
                more, seconds, kept = queue.get(timeout=1200)
                process.join()
                cells += [f"{more:,.0f}", f"{seconds:.1f}"]
        raw = 4 * float(np.prod(size.shape)) * (size.channels + 1) / 1e6
        shape = " x ".join(map(str, size.shape))
        print(f"| {size.title}, {shape} | {raw:,.0f} | {kept:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
