"""A run folder with model files but without training, and networks whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gcml_ray.config import Config
from gcml_ray.data.contract import data_contract
from gcml_ray.files.run_folder import MODEL_FILE, RunFolder
from gcml_ray.model.checkpoint import save_model
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import build_network, fingerprint
from gcml_ray.prediction.predict import ModelFacts, PersonalModel
from tests.makers import make_config

Array = NDArray[Any]


def write_run(folder: Path, *, sites: tuple[str, ...] = ("A", "B"), **sections: Any) -> Config:
    """A federation's files, its run folder with ``config.yaml``, and an untrained model a site."""
    config = make_config(folder, **sections)
    run = RunFolder.create(config.output.folder, config)
    for seed, site in enumerate(sites):
        torch.manual_seed(seed)
        write_model(run, config, site)
    return config


def write_model(run: RunFolder, config: Config, site: str, /, **changes: str) -> Path:
    """``personalised.safetensors`` of a site; ``changes`` falsify its header."""
    network = config.network_of(site)
    facts = {
        "site": site,
        "round": "3",
        "validation_dice": "0.5",
        "method": "gcml",
        "network": json.dumps(network.model_dump(mode="json")),
        "fingerprint": fingerprint(network, config.data),
        "data_contract": data_contract(config.data),
        "seed": "7",
    }
    path = run.checkpoints(site) / MODEL_FILE
    model = FlatModel(build_network(network, config.data), send_buffers=True)
    save_model(path, model, facts=facts | changes)
    return path


def personal(config: Config, *modules: nn.Module) -> PersonalModel:
    """A model made of given networks."""
    facts = [ModelFacts("A", 3, "", "gcml", "", "") for _ in modules]
    return PersonalModel(config, facts, modules, torch.device("cpu"))


class Bright(nn.Module):
    """Class 1 (or the only region) where the first channel, normalised, is above 0."""

    def __init__(self, *, num_outputs: int = 2) -> None:
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, image: Tensor) -> Tensor:
        first = image[:, :1]
        return first if self.num_outputs == 1 else torch.cat([-first, first], dim=1)


class Fixed(nn.Module):
    """The same logits (C, *spatial) whatever the image; for windows of the whole image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[2:] == self.logits.shape[1:], "the window must hold the whole image"
        return self.logits.repeat(len(image), *[1] * self.logits.ndim)  # a copy: MONAI weighs it in place


def save_volume(path: Path, array: Array, affine: Array | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def bright_box(shape: tuple[int, ...], box: tuple[slice, ...]) -> Array:
    """10 everywhere and 200 in a box."""
    image = np.full(shape, 10, np.float32)
    image[box] = 200
    return image
