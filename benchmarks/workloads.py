"""Networks, patches and made-up batches that the benchmarks of single steps share.

Legend: B batch, C channels or outputs, *spatial = D H W.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gcml_ray.config import Config
from gcml_ray.config.file import parse_config
from gcml_ray.data.site_data import Batch
from gcml_ray.losses.segmentation import build_segmentation_loss
from gcml_ray.model.learner import Learner, SegmentationLoss
from gcml_ray.training.site_learner import build_learner

UNET = {"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1}
LGG = {"channels": [16, 32, 64, 128], "strides": [2, 2, 2], "num_res_units": 1, "norm": "instance"}
HIPPOCAMPUS = {"channels": [16, 32, 64], "strides": [2, 2], "num_res_units": 1, "norm": "instance"}
REGIONS = {"WT": ["necrosis", "oedema", "enhancing"], "TC": ["necrosis", "enhancing"], "ET": ["enhancing"]}
BRATS_DATA = {
    "channels": ["t1", "t1ce", "t2", "flair"],
    "labels": {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 4},
    "regions": REGIONS,
}
BRATS_LOSS = {
    "name": "jaccard_focal",
    "smooth": 10.0,
    "class_weights": [0.17, 0.33, 0.5],
    "focal_gamma": 2.0,
    "head_weights": [0.4, 0.2, 0.2, 0.2],
}
ADAM = {"name": "adam", "amsgrad": True, "learning_rate": 3e-3, "clip_norm": 0.1}


@dataclass(frozen=True)
class Workload:
    """One network on patches of one size, with the sections of a configuration that differ from the plain ones."""

    network: dict[str, Any]
    patch: tuple[int, ...]
    batch_size: int = 2
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    optimiser: dict[str, Any] = field(default_factory=lambda: {"name": "adamw", "learning_rate": 1e-3})


WORKLOADS = {
    "tiny": Workload({"name": "unet", "options": {"channels": [4, 8], "strides": [2]}}, (16, 16, 16)),
    "unet": Workload({"name": "unet", "options": UNET}, (36, 32, 20)),  # configs/phantom.yaml
    "lgg": Workload({"name": "unet", "options": LGG}, (64, 64, 16), data={"channels": ["t1", "flair", "t1ce"]}),
    "hippocampus": Workload(
        {"name": "unet", "options": HIPPOCAMPUS},
        (32, 48, 32),
        data={"channels": ["mri"], "labels": {"background": 0, "anterior": 1, "posterior": 2}},
    ),
    "retina": Workload(
        {"name": "unet", "options": LGG}, (96, 96), 4, {"channels": ["red", "green", "blue"], "spatial_dims": 2}
    ),
    "sanet_small": Workload(  # configs/brats_small.yaml
        {"name": "sanet_v1", "options": {"nf": 8}}, (64, 64, 64), 1, BRATS_DATA, BRATS_LOSS, ADAM
    ),
    "sanet": Workload(  # configs/brats.yaml
        {"name": "sanet_v1", "options": {"nf": 24}}, (128, 128, 128), 2, BRATS_DATA, BRATS_LOSS, ADAM
    ),
}


def make_config(workload: Workload, *, amp: str = "none", is_compiled: bool = False, **method: Any) -> Config:
    """A configuration with this workload; its data are never read. ``method``: keys of a GCML section."""
    data = {
        "datalist": "unused",
        "channels": ["t1", "flair"],
        "labels": {"background": 0, "lesion": 1},
        "spacing_is_real": True,
        "patch_size": list(workload.patch),
        "batch_size": workload.batch_size,
    }
    return parse_config(
        {
            "name": "benchmark",
            "data": data | workload.data,
            "network": workload.network,
            "loss": workload.loss,
            "optimiser": workload.optimiser,
            "method": {"name": "gcml", "topology": {"name": "ring"}, **method},
            "federation": {"rounds": 1, "local_steps": 1},
            "resources": {"amp": amp, "gpus_per_site": 0 if amp == "none" else 1, "compile": is_compiled},
            "output": {"folder": "unused"},
        },
        source="benchmarks/workloads.py",
    )


def make_learner(config: Config, device: torch.device, *, site: str = "A") -> Learner:
    """A model in training mode with its optimiser."""
    learner = build_learner(config, site, config.network, device)
    learner.model.module.train()
    return learner


def make_loss(config: Config) -> SegmentationLoss:
    """The segmentation loss of a configuration."""
    return build_segmentation_loss(config.loss, config.data)


def make_batch(config: Config, device: torch.device) -> Batch:
    """Noise (B, C, *spatial) with a ball of foreground in the middle; every region gets the same ball."""
    data = config.data
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(data.batch_size, len(data.channels), *data.patch_size, generator=generator)
    axes = [torch.linspace(-1, 1, size) for size in data.patch_size]
    ball = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0) < 0.3
    num_labels = data.num_outputs if data.is_sigmoid else 1
    label = ball.expand(data.batch_size, num_labels, *data.patch_size)
    image[:, 0] += label[:, 0]
    return Batch(image.to(device), label.to(device, torch.float32 if data.is_sigmoid else torch.int64).contiguous())


def interleaved(calls: Sequence[Callable[[], float]], *, repeats: int) -> list[list[float]]:
    """The results of each call, all of them in turn in every repeat: a noisy spell hits all alike."""
    results: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for found, call in zip(results, calls, strict=True):
            found.append(call())
    return results


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of values that were measured side by side."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))
