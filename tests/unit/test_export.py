"""Exports that need neither MONAI's tools nor MLflow: a folder for gcml predict, graphs; and starting from one."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gcml_ray.cli.main import app
from gcml_ray.config import Config, NetworkConfig
from gcml_ray.config.file import parse_config
from gcml_ray.errors import CheckpointError, ConfigError, ExportError
from gcml_ray.export import model as export_module
from gcml_ray.export.model import (
    Source,
    _explained,
    export_onnx,
    export_safetensors,
    export_torch,
    open_source,
    sites_to_export,
)
from gcml_ray.files.model_card import CARD_FILE, WEIGHTS_FILE
from gcml_ray.files.run_folder import MODEL_FILE, RunState
from gcml_ray.model.start_weights import load_start_weights
from gcml_ray.networks.registry import BUILDERS, build_network
from gcml_ray.prediction.load import load_model
from gcml_ray.training.site_learner import build_learner
from tests.makers import make_config
from tests.model_files import write_run

# Small, but no map shrinks to a voxel or two: normalising those magnifies rounding.
NETWORKS: dict[str, tuple[dict[str, Any], dict[int, list[int]]]] = {
    "unet": ({"channels": [4, 8], "strides": [2]}, {2: [8, 8], 3: [8, 8, 8]}),
    "dynunet": (
        {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "filters": [4, 4, 8], "deep_supervision": True},
        {2: [16, 16], 3: [16, 16, 16]},
    ),
    "segresnet": ({"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, {2: [8, 8], 3: [8, 8, 8]}),
    "sanet_v1": ({"nf": 4}, {2: [32, 32], 3: [32, 32, 32]}),
    "sanet_v2": ({"nf": 8}, {2: [64, 64], 3: [32, 64, 64]}),
}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(write_run(tmp_path).output.folder, "A")


def _export(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["export", *arguments])


# --- safetensors and card ----------------------------------------------------------------------


def test_an_exported_folder_predicts_as_the_run_does(tmp_path: Path, source: Source) -> None:
    image = (np.random.default_rng(0).normal(size=(2, 12, 12, 8)).astype(np.float32), np.eye(4))
    export_safetensors(source, tmp_path)
    moved = load_model(tmp_path)
    of_run = load_model(source.run.path, "A").predict(image, probabilities=True)
    assert moved.facts[0].site == "A"
    np.testing.assert_array_equal(moved.predict(image, probabilities=True).probabilities, of_run.probabilities)


def test_an_exported_model_of_another_site_is_refused(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path)
    with pytest.raises(CheckpointError, match="holds the model of site A, not of B"):
        load_model(tmp_path, "B")


def test_an_exported_model_cannot_be_an_ensemble(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path)
    with pytest.raises(ConfigError, match="the model of site A alone"):
        load_model(tmp_path, ensemble=True)


def test_the_folder_of_a_run_asks_for_a_site(source: Source) -> None:
    with pytest.raises(ConfigError, match="Sites with one: A, B"):
        load_model(source.run.path)


# --- graphs ------------------------------------------------------------------------------------


def _source_of(name: str, spatial_dims: int, folder: Path) -> Source:
    options, patches = NETWORKS[name]
    network = {"name": name, "options": options}
    config = write_run(
        folder, sites=("A",), spatial_dims=spatial_dims, network=network, data={"patch_size": patches[spatial_dims]}
    )
    return open_source(config.output.folder, "A")


def test_the_networks_tried_here_are_all_there_are() -> None:
    assert set(NETWORKS) == set(BUILDERS)


@pytest.mark.parametrize(
    ("name", "spatial_dims"),
    [*((name, dims) for name in ("unet", "dynunet", "segresnet") for dims in (2, 3)), ("sanet_v1", 3), ("sanet_v2", 2)],
)
def test_torch_export_of_every_network_says_what_the_network_says(name: str, spatial_dims: int, tmp_path: Path) -> None:
    """The export compares itself (batches of 1 and 3) and fails otherwise; here batch 2, and training mode after it."""
    source = _source_of(name, spatial_dims, tmp_path)
    line = export_torch(source, tmp_path)
    image = torch.randn(2, 2, *source.config.window_size)
    graph = torch.export.load(tmp_path / "model.pt2").module()
    with torch.inference_mode():
        torch.testing.assert_close(graph(image), source.module.eval()(image), rtol=1e-4, atol=1e-4)
    assert "largest difference from the network" in line


@pytest.mark.parametrize(("name", "spatial_dims"), [("unet", 3), ("dynunet", 2), ("segresnet", 3)])
def test_onnx_says_what_the_network_says_for_any_batch(name: str, spatial_dims: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    source = _source_of(name, spatial_dims, tmp_path)
    line = export_onnx(source, tmp_path)
    image = torch.randn(2, 2, *source.config.window_size)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = source.module.eval()(image)
    found = torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "largest difference from the network" in line


def test_graph_facts_say_shape_channels_and_activation(tmp_path: Path, source: Source) -> None:
    export_torch(source, tmp_path)
    facts = json.loads((tmp_path / "graph.json").read_text())
    assert facts["input"] == {"name": "image", "shape": ["batch", 2, 8, 8, 8]}
    assert facts["output"] == {"name": "logits", "shape": ["batch", 2, 8, 8, 8]}
    assert (facts["channels"], facts["outputs"], facts["activation"]) == (
        ["t1", "t2"],
        ["background", "box"],
        "softmax",
    )
    assert facts["window_blend"] == "gaussian"
    assert [step["_target_"] for step in facts["preparation"]] == ["LoadImaged", "Orientationd", "NormalizeIntensityd"]


def test_a_graph_that_differs_from_the_network_is_an_error(source: Source) -> None:
    with pytest.raises(ExportError, match="differs from its network"):
        export_module._difference(source, lambda image: source.module(image) * 1.01)


def test_a_graph_of_nan_is_an_error(source: Source) -> None:
    with pytest.raises(ExportError, match="differs from its network"):
        export_module._difference(source, lambda image: source.module(image) * torch.nan)


def test_a_full_disk_is_not_put_down_to_the_network(source: Source) -> None:
    with pytest.raises(OSError, match="No space left"), _explained("ONNX", source):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_missing_package_names_the_extra(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed; pip install 'gcml-ray\[export\]'"):
        export_onnx(source, tmp_path)


# --- sites -------------------------------------------------------------------------------------


def test_all_sites_of_a_run_without_models_is_an_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path, sites=()).output.folder
    with pytest.raises(ConfigError, match=r"no site of .* has a personalised\.safetensors; .*gcml run --resume"):
        sites_to_export(folder, ["all"])


def test_command_exports_all_sites_each_into_its_folder(tmp_path: Path, source: Source) -> None:
    run, out = str(source.run.path), tmp_path / "out"
    result = _export("--run", run, "--site", "all", "--format", "safetensors", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        f"{site}/{name}" for site in "AB" for name in (CARD_FILE, WEIGHTS_FILE)
    ]


@pytest.mark.parametrize("has_folder", [True, False])
def test_command_names_the_site_without_a_model_and_exports_the_others(
    tmp_path: Path, source: Source, *, has_folder: bool
) -> None:
    run, out = source.run, tmp_path / "out"
    model = run.checkpoints("B") / MODEL_FILE
    model.unlink()
    if not has_folder:  # it stayed on the disk of its site
        model.parent.rmdir()
    run.checkpoints("C").mkdir()  # dropped: it never had a model
    run.write_state(RunState(3, "finished", ("A", "B"), dropped={"C": "died"}))
    result = _export("--run", str(run.path), "--site", "all", "--format", "safetensors", "--out", str(out))
    assert [line.partition(" is missing")[0] for line in result.output.splitlines() if line.startswith("not")] == [
        f"not exported: site B: {model}"
    ]
    assert (result.exit_code, [path.name for path in out.iterdir()]) == (1, ["A"])


def test_command_exports_the_others_where_the_first_sites_model_is_damaged(tmp_path: Path, source: Source) -> None:
    (source.run.checkpoints("A") / MODEL_FILE).write_bytes(b"damaged")
    out = tmp_path / "out"
    result = _export("--run", str(source.run.path), "--site", "all", "--format", "safetensors", "--out", str(out))
    assert "not exported: A: " in result.output
    assert (result.exit_code, [path.name for path in out.iterdir()]) == (1, ["B"])


def test_command_names_the_sites_there_are(tmp_path: Path, source: Source) -> None:
    result = _export("--run", str(source.run.path), "--site", "C", "--format", "torch", "--out", str(tmp_path / "out"))
    assert "sites with a personalised model in this run: A, B" in str(result.exception)


def test_command_names_a_folder_that_is_no_run(tmp_path: Path) -> None:
    result = _export("--run", str(tmp_path), "--site", "A", "--format", "torch", "--out", str(tmp_path / "out"))
    assert "is not the folder of a run" in str(result.exception)


def test_command_refuses_to_register_what_is_no_pyfunc(tmp_path: Path, source: Source) -> None:
    result = _export(
        "--run", str(source.run.path), "--site", "A", "--format", "onnx", "--out", str(tmp_path / "out"), "--register"
    )
    assert "would be ignored by --format onnx" in str(result.exception)


def test_command_predicts_from_an_exported_folder_without_a_site(tmp_path: Path, source: Source) -> None:
    out = tmp_path / "model"
    _export("--run", str(source.run.path), "--site", "A", "--format", "safetensors", "--out", str(out))
    result = CliRunner().invoke(
        app,
        ["predict", "--run", str(out), "--images", str(tmp_path / "datalist.json"), "--out", str(tmp_path / "labels")],
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "labels" / "c0.nii.gz").is_file()


# --- starting from an export -------------------------------------------------------------------


def _start(config: Config, path: Path, **changes: Any) -> Config:
    return config.model_copy(update={"network": config.network.model_copy(update={"start_from": str(path), **changes})})


def _weights(config: Config, site: str, *, is_private: bool = False) -> torch.Tensor:
    learner = build_learner(config, site, config.network, torch.device("cpu"), is_private=is_private)
    return learner.model.flat.clone()


def test_every_site_starts_from_the_weights_whatever_common_init_says(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path)
    config = make_config(tmp_path, federation={"common_init": False})
    assert not torch.equal(_weights(config, "A"), _weights(config, "B")), "without start_from they differ"
    config = _start(config, tmp_path)
    expected = torch.cat([value.flatten() for value in source.module.state_dict().values()])
    torch.testing.assert_close(_weights(config, "A"), expected, rtol=0, atol=0)
    torch.testing.assert_close(_weights(config, "B"), expected, rtol=0, atol=0)


def test_a_private_model_does_not_start_from_the_exchanged_ones_weights(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path)
    config = _start(source.config, tmp_path)
    assert not torch.equal(_weights(config, "A", is_private=True), _weights(config, "A"))


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path, source: Source) -> None:
    export_safetensors(source, tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    first, second = sorted(weights)[:2]
    weights["foreign"] = weights.pop(first)
    weights[second] = torch.zeros(1, 2, 3)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=rf"missing: {first}; not in the network: foreign; .*{second} \(1, 2, 3\)"):
        load_start_weights(source.module, str(tmp_path / "other.safetensors"), source.config.data)


@pytest.mark.parametrize("wrapped", [lambda state: state, lambda state: {"model": state, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["unet", "dynunet"])
def test_a_foreign_bundle_of_the_same_network_can_be_the_start(
    name: str, prefix: str, wrapped: Any, tmp_path: Path
) -> None:
    """DynUNet names some of its weights twice in its state dictionary."""
    config = make_config(tmp_path, data={"patch_size": [16, 16, 16]})
    network = NetworkConfig(name=name, options=NETWORKS[name][0])
    theirs, ours = build_network(network, config.data), build_network(network, config.data)
    (tmp_path / "bundle" / "models").mkdir(parents=True)
    state = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    torch.save(wrapped(state), tmp_path / "bundle" / "models" / "model.pt")
    load_start_weights(ours, str(tmp_path / "bundle"), config.data)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())


def test_buffers_that_are_in_no_state_dictionary_may_stand_in_a_file(tmp_path: Path, source: Source) -> None:
    """A model file holds all buffers of a network, also those that it could make anew."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 1))
    module.register_buffer("scale", torch.ones(1), persistent=False)
    weights = {"0.weight": torch.full((1, 2), 3.0), "0.bias": torch.zeros(1), "scale": torch.ones(1)}
    torch.save(weights, tmp_path / "w.pt")
    load_start_weights(module, str(tmp_path / "w.pt"), source.config.data)
    assert module[0].weight.tolist() == [[3.0, 3.0]]


def test_a_file_with_code_in_it_is_refused(tmp_path: Path, source: Source) -> None:
    torch.save(source.module, tmp_path / "pickled.pt")
    with pytest.raises(ConfigError, match=r"pickled\.pt cannot be read"):
        load_start_weights(source.module, str(tmp_path / "pickled.pt"), source.config.data)


def test_a_start_that_is_not_there_is_named(tmp_path: Path, source: Source) -> None:
    with pytest.raises(ConfigError, match=r"start_from: .*nowhere was not found on this machine"):
        load_start_weights(source.module, str(tmp_path / "nowhere"), source.config.data)


def test_another_data_contract_is_a_warning(tmp_path: Path, source: Source, caplog: pytest.LogCaptureFixture) -> None:
    export_safetensors(source, tmp_path)
    other = source.config.data.model_copy(update={"normalise": "all"})
    load_start_weights(source.module, str(tmp_path), other)
    assert "another data contract" in caplog.text


def test_start_from_becomes_absolute_and_is_part_of_the_identity(tmp_path: Path) -> None:
    sections = make_config(tmp_path).model_dump(mode="json", by_alias=True)
    random = parse_config(sections, source="test")
    started = parse_config(sections, ["network.start_from=some/export"], source="test")
    assert started.network.start_from == str(Path.cwd() / "some/export")
    assert started.identity != random.identity
