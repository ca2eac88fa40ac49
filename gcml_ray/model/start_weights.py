"""Weights that a run starts from: ``network.start_from``, an export of gcml-ray or a MONAI bundle of anybody.

Names and shapes must be those of the network; the architecture behind them is not asked for, so a bundle that was
trained elsewhere serves as well. Pickled code is never run.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gcml_ray.config import DataConfig
from gcml_ray.data.contract import data_contract
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.files.model_card import WEIGHTS_FILE
from gcml_ray.model.checkpoint import CHECKSUM, read_tensors
from gcml_ray.wording import some

log = logging.getLogger(__name__)

BUNDLE_WEIGHTS = Path("models") / "model.pt"
WRAPPERS = ("state_dict", "model", "network", "model_state_dict")  # where trainers put the weights inside a .pt file
MAX_NAMED = 5


def load_start_weights(module: nn.Module, start_from: str, data: DataConfig) -> None:
    """Copies weights by name into a network, all of them or none.

    Args:
        module: the network; changed in place.
        start_from: ``.safetensors``, ``.pt`` or ``.pth``, or the folder of an export or of a MONAI bundle.
        data: of the run that starts; another data contract in the file is a warning, as it may be meant.

    Raises:
        ConfigError: the file cannot be read, or is of another network; lists the names that differ.
    """
    path = _weights_file(start_from)
    weights, contract = _read(path)
    problems = _mismatches(module, weights)
    if problems:
        raise ConfigError(
            f"network.start_from: {path} does not fit the network: {'; '.join(problems)}. Set network.name and "
            "network.options to those of the weights, or leave start_from out"
        )
    module.load_state_dict(weights, strict=False)  # names that one module shares with another stand once or twice
    if contract not in (None, data_contract(data)):
        log.warning(
            "%s was trained under another data contract (labels, channels, grid or normalisation); the run starts from "
            "it all the same",
            path,
        )


def _weights_file(start_from: str) -> Path:
    """The file with the weights."""
    path = Path(start_from)
    candidates = [path / WEIGHTS_FILE, path / BUNDLE_WEIGHTS] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    expected = f"{WEIGHTS_FILE} or {BUNDLE_WEIGHTS} in it" if path.is_dir() else "a file or folder there"
    raise ConfigError(
        f"network.start_from: {start_from} was not found on this machine, expected {expected}; every site needs it "
        "under this path"
    )


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors by name, and the data contract that they were trained under where the file says so."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as handle:
                header = handle.metadata() or {}
            if CHECKSUM in header:  # a model of gcml-ray; those of others have none
                read_tensors(path)
            return load_file(path), header.get("data_contract")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise ConfigError(f"network.start_from: {error}") from error
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"network.start_from: {path} cannot be read ({type(error).__name__}: {reason}); give .safetensors, or a "
            ".pt file with a state dictionary and nothing else"
        ) from error
    return _state_dict(content, path), None


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Tensors by name out of what a ``.pt`` file holds."""
    if isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
        weights = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
        if weights and all(name.startswith("module.") for name in weights):  # of DataParallel
            weights = {name.removeprefix("module."): value for name, value in weights.items()}
        if weights:
            return weights
    raise ConfigError(f"network.start_from: {path} holds no state dictionary (tensors by name)")


def _mismatches(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """What is missing, too much, or of another shape; a weight that has two names in the network needs one."""
    own = module.state_dict()
    needed = dict(module.named_parameters()) | dict(module.named_buffers())
    missing = [name for name in needed if name in own and name not in weights]
    unknown = [name for name in weights if name not in own and name not in needed]  # our files hold all buffers
    reshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    kinds = {"missing": missing, "not in the network": unknown, "of another shape": reshaped}
    return [f"{kind}: {some(names, MAX_NAMED)}" for kind, names in kinds.items() if names]
