"""A site's model as a MONAI bundle, which MONAI's own tools verify, run and take over.

======================= =====================================================================
``configs/metadata.json``  what MONAI's specification asks for, and the model's provenance
``configs/inference.json`` network, transforms, sliding window (:mod:`gcml_ray.export.bundle_config`)
``models/model.pt``        the network's state dictionary: tensors by name, nothing else
``docs/README.md``         how to run it
``model.json``             the card of all exports (:mod:`gcml_ray.files.model_card`)
``model.safetensors``      the same weights for ``gcml predict``
======================= =====================================================================

Source: MONAI bundle specification, docs.monai.io (mb_specification). Legend: C outputs.
"""

from __future__ import annotations

import io
from importlib.metadata import version
from pathlib import Path

import torch

from gcml_ray.config import DataConfig
from gcml_ray.export.bundle_config import RUNNER, Json, inference_config, network_definition, own_code_reason
from gcml_ray.export.model import Source, export_safetensors
from gcml_ray.files.model_card import Provenance, write_json

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
FORMAT_VERSION = "1.0.0"


def export_bundle(source: Source, folder: Path) -> str:
    """Writes a bundle. Returns a line that says what it needs."""
    export_safetensors(source, folder)
    config = source.config
    network = config.network_of(source.card.provenance.site)
    write_json(folder / "configs" / "inference.json", inference_config(config, network))
    write_json(folder / "configs" / "metadata.json", _metadata(source))
    (folder / "models").mkdir()
    weights = io.BytesIO()  # not to the disk at once: torch does not say that one is full
    torch.save(source.module.state_dict(), weights)
    (folder / "models" / "model.pt").write_bytes(weights.getvalue())
    (folder / "docs").mkdir()
    (folder / "docs" / "README.md").write_text(_readme(source), encoding="utf-8")
    needs = "MONAI, pytorch-ignite, fire and nibabel" if not _own_parts(source) else "MONAI and gcml-ray"
    return f"bundle: python -m monai.bundle run --config_file configs/inference.json; needs {needs}"


def _own_parts(source: Source) -> list[str]:
    """What of the bundle is gcml_ray's own code, in words; empty where MONAI is enough."""
    config = source.config
    network = config.network_of(source.card.provenance.site)
    target = network_definition(network, config.data)["_target_"]
    parts = [f"the network is `{target}`"] if target.startswith("gcml_ray.") else []
    reason = own_code_reason(config.data)
    return parts + ([f"images are prepared and labels written by `{RUNNER}`: {reason}"] if reason else [])


def _packages(source: Source) -> dict[str, str]:
    """Packages beside MONAI, torch and NumPy, with the versions this was made with."""
    names = ["nibabel"]
    names += ["pytorch-ignite"] if own_code_reason(source.config.data) is None else []
    names += ["gcml-ray"] if _own_parts(source) else []
    return {name: _version(name) for name in names}


def _version(package: str) -> str:
    """The version installed here; of pytorch-ignite, which an export does without, the one that was tested."""
    try:
        return version(package)
    except ModuleNotFoundError:
        return {"pytorch-ignite": "0.5.5"}[package]


def _metadata(source: Source) -> Json:
    """``metadata.json``; keys beyond the specification are allowed by it."""
    origin, config = source.card.provenance, source.config
    title = f"{config.name}-{origin.site}"
    dice = {"validation_mean_dice": origin.validation_dice, "test_mean_dice": origin.test_dice}
    return {
        "schema": SCHEMA,
        "version": FORMAT_VERSION,
        "changelog": {FORMAT_VERSION: f"exported after round {origin.round_number} of {origin.num_rounds}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": _packages(source),
        "name": title,
        "task": f"segmentation of {', '.join(config.data.foreground_names)}",
        "description": f"Personalised segmentation model of site {origin.site}, trained by {origin.method} in the "
        f"federation {config.name} with gcml-ray",
        "authors": "the sites of the federation",
        "copyright": "the sites of the federation",
        "intended_use": "Research; not a medical device, not for diagnosis",
        "data_type": "nibabel" if config.data.spatial_dims == 3 else "picture",
        "image_classes": ", ".join(config.data.channels),
        "label_classes": ", ".join(f"{value} {name}" for name, value in config.data.labels.items()),
        "eval_metrics": {name: value for name, value in dice.items() if value is not None},
        "network_data_format": _data_format(config.data, config.window_size),
        "provenance": provenance_facts(origin),
    }


def provenance_facts(origin: Provenance) -> Json:
    """Where the model comes from, for people and for MONAI's metadata."""
    return {
        "site": origin.site,
        "method": origin.method,
        "round": origin.round_number,
        "rounds_of_the_run": origin.num_rounds,
        "peers": list(origin.peers),
        "pushes_taken": origin.num_pushes,
        "seed": origin.seed,
        "data_contract": origin.data_contract,
        "network_fingerprint": origin.fingerprint,
        "configuration": origin.identity,
        "exported_at": origin.exported_at,
        "versions": origin.versions,
    }


def _data_format(data: DataConfig, window: tuple[int, ...]) -> Json:
    """Input and output of the network, as MONAI's specification wants them."""
    names = list(data.regions) if data.regions is not None else list(data.labels)
    shared: Json = {"type": "image", "spatial_shape": list(window), "dtype": "float32", "is_patch_data": True}
    return {
        "inputs": {
            "image": {
                **shared,
                "format": "magnitude",
                "modality": "n/a",
                "num_channels": len(data.channels),
                "value_range": [],
                "channel_def": {str(index): name for index, name in enumerate(data.channels)},
            }
        },
        "outputs": {
            "pred": {
                **shared,
                "format": "segmentation",
                "num_channels": data.num_outputs,
                "value_range": [],
                "channel_def": {str(index): name for index, name in enumerate(names)},
            }
        },
    }


# --- docs/README.md ------------------------------------------------------------------------------


def _readme(source: Source) -> str:
    """How to run the bundle, and where it comes from."""
    origin, config, data = source.card.provenance, source.config, source.config.data
    own = _own_parts(source)
    needs = "\n".join(
        f"* {package} (made with {made_with})"
        for package, made_with in {"monai": version("monai"), "fire": "any", **_packages(source)}.items()
    )
    code = "\n".join(f"* {part}" for part in own) if own else "* nothing: MONAI's transforms and network are enough"
    facts = "\n".join(f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in _rows(origin))
    labels = ", ".join(f"{value} {name}" for name, value in data.labels.items())
    return README.format(
        name=config.name,
        site=origin.site,
        channels=", ".join(data.channels),
        first=data.channels[0],
        labels=labels,
        needs=needs,
        code=code,
        facts=facts,
    )


def _rows(origin: Provenance) -> list[tuple[str, object]]:
    scores: Json = {"validation_Dice": origin.validation_dice, "test_Dice": origin.test_dice}
    return [*provenance_facts(origin).items(), *scores.items()]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str("-" if value is None else value)


README = """# {name}, model of site {site}

A personalised segmentation model, exported by gcml-ray. For research; it is not a medical device.

Input channels, in this order: {channels}. Output: one label file a case with the values {labels}.

## Run

From this folder (`dataset_dir` holds `<case>_{first}.nii.gz` and so on, or one file a case with all channels):

```
python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir LABELS
python -m monai.bundle verify_net_in_out network_def --meta_file configs/metadata.json \\
  --config_file configs/inference.json
```

A configuration of MONAI can run any code: use only a bundle from somebody you trust.
`gcml predict --run` takes this folder too.

## Needs

{needs}

Code of gcml_ray in this bundle:

{code}

## Provenance

| fact | value |
|---|---|
{facts}
"""
