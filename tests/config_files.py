"""A configuration file of a federation, and what is said of one that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gcml_ray.config.file import load_config
from gcml_ray.errors import ConfigError

CONFIG = """\
name: two-hospitals
data:
  datalist: lists/all.json
  channels: [t1, flair]
  labels: {background: 0, tumour: 1}
  spacing_is_real: true
  patch_size: [32, 32, 16]
network: {name: unet, options: {channels: [8, 16]}}
optimiser:
  learning_rate: 1e-3
method:
  name: gcml
  topology: {name: push_k, k: 2}
  dcml: {lambda: 0.3}
federation: {rounds: 20, local_steps: 5}
output: {folder: runs/one}
"""


def write(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def values(**sections: Any) -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load(CONFIG.replace("1e-3", "0.001"))
    return result | sections


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()[1:]
