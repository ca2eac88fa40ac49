"""MONAI bundles: verified and run by MONAI's own tools, and giving the label maps of gcml predict."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from gcml_ray.config import NetworkConfig
from gcml_ray.data.image_cases import find_cases
from gcml_ray.export.bundle import SCHEMA, export_bundle
from gcml_ray.export.bundle_config import network_definition, own_code_reason
from gcml_ray.export.model import Source, open_source
from gcml_ray.networks.registry import BUILDERS, build_network, forward_heads
from gcml_ray.prediction.load import load_model
from gcml_ray.training.site_learner import build_learner
from tests.makers import make_config
from tests.model_files import save_volume, write_run

pytest.importorskip("fire", reason="python -m monai.bundle")
monai_bundle = pytest.importorskip("monai.bundle")

RAS = np.diag([1.0, 1.0, 1.0, 1.0])
LPS_THICK = np.array([[-1.0, 0, 0, 30], [0, -1.0, 0, 20], [0, 0, 2.0, -5], [0, 0, 0, 1]])
SWAPPED = np.array([[0, 0, 1.5, 0], [-1.0, 0, 0, 9], [0, 1.2, 0, 0], [0, 0, 0, 1]])
REGIONS = {
    "labels": {"background": 0, "edema": 2, "core": 4},
    "regions": {"whole": ["edema", "core"], "core": ["core"]},
}
CROSSING = {"labels": {"air": 0, "a": 1, "b": 2, "c": 3}, "regions": {"x": ["a", "b"], "y": ["b", "c"]}}
DYNUNET = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "filters": [4, 4, 8], "deep_supervision": True}
# What MONAI's specification calls mandatory; its own schema lies on a server, which a test must not need.
SPECIFICATION = {
    "type": "object",
    "required": [
        "schema",
        "version",
        "changelog",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "required": [
                        "type",
                        "format",
                        "num_channels",
                        "spatial_shape",
                        "dtype",
                        "value_range",
                        "is_patch_data",
                        "channel_def",
                    ],
                },
            },
        },
    },
}


def _bundle(folder: Path, **sections: Any) -> tuple[Source, Path]:
    """An untrained model of site A as a bundle."""
    config = write_run(folder, sites=("A",), **sections)
    source, bundle = open_source(config.output.folder, "A"), folder / "bundle"
    bundle.mkdir()
    export_bundle(source, bundle)
    return source, bundle


def _images(folder: Path, *affines: np.ndarray[Any, Any]) -> Path:
    """A case of two channels, 12 x 14 x 10 voxels, for each affine."""
    random = np.random.default_rng(3)
    for number, affine in enumerate(affines):
        for channel in ("t1", "t2"):
            values = random.normal(50, 20, (12, 14, 10)).astype(np.float32)
            values[:3] = 0  # what normalise: nonzero leaves out
            save_volume(folder / f"p{number}_{channel}.nii.gz", values, affine)
    return folder


def _run_in_monai(bundle: Path, images: Path, out: Path) -> None:
    monai_bundle.run(
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        bundle_root=str(bundle),
        dataset_dir=str(images),
        output_dir=str(out),
    )


def _predict(source: Source, images: Path, out: Path) -> list[str]:
    """The names of the label files that gcml predict writes."""
    model = load_model(source.run.path, "A")
    cases = find_cases([images], model.config.data, site="A", split=None).cases
    return [path.name for case in cases for path in model.predict_case(case, out)]


def _read(path: Path) -> tuple[np.ndarray[Any, Any], Any]:
    image: Any = nibabel.load(path)
    return np.asanyarray(image.dataobj), image.affine


# --- MONAI's own tools -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({}, id="oriented"),
        pytest.param({"orientation": None, "normalise": "all", "labels": {"air": 0, "lesion": 7}}, id="as stored"),
        pytest.param({"orientation": "LPS", **REGIONS}, id="regions"),
        pytest.param({"target_spacing_mm": [1.0, 1.0, 1.5]}, id="resampled"),
        pytest.param({"target_spacing_mm": [1.0, 1.0, 1.5], **REGIONS}, id="resampled regions"),
        pytest.param({"resize": [8, 16, 8]}, id="resized"),
        pytest.param(CROSSING, id="crossing regions"),
    ],
)  # fmt: skip
def test_monai_runs_a_bundle_and_gives_the_labels_of_gcml_predict(data: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    source, bundle = _bundle(tmp_path, data=data)
    images = _images(tmp_path / "images", RAS, LPS_THICK, SWAPPED)
    names = _predict(source, images, tmp_path / "ours")
    _run_in_monai(bundle, images, tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == sorted(names)
    for name in names:
        (ours, grid), (theirs, their_grid) = _read(tmp_path / "ours" / name), _read(tmp_path / "theirs" / name)
        assert len(np.unique(ours)) > 1, "an empty prediction would prove nothing"
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(their_grid, grid, atol=1e-5)
        # Interpolated probabilities round differently in float32 and float64; a voxel on the border may turn.
        assert (ours != theirs).mean() <= (1e-3 if "target_spacing_mm" in data else 0)


def test_pictures_run_too(tmp_path: Path) -> None:
    source, bundle = _bundle(tmp_path, spatial_dims=2)
    images = tmp_path / "images"
    images.mkdir()
    for channel in ("t1", "t2"):
        (tmp_path / "cases" / f"A0_{channel}.png").rename(images / f"p_{channel}.png")
    _predict(source, images, tmp_path / "ours")
    _run_in_monai(bundle, images, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "p.png").read_bytes() == (tmp_path / "ours" / "p.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("unet", {"channels": [4, 8], "strides": [2]}, 8),
        ("dynunet", DYNUNET, 16),
        ("segresnet", {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, 8),
        ("sanet_v1", {"nf": 4}, 32),
    ],
)  # fmt: skip
def test_monai_verifies_the_network_of_a_bundle(name: str, options: dict[str, Any], side: int, tmp_path: Path) -> None:
    network = {"name": name, "options": options}
    _, bundle = _bundle(tmp_path, network=network, data={"patch_size": [side] * 3})
    configs = bundle / "configs"
    monai_bundle.verify_net_in_out(
        "network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
    )


def test_monai_verifies_the_metadata(tmp_path: Path) -> None:
    """MONAI takes a schema that lies where it would download it to."""
    pytest.importorskip("jsonschema")
    _, bundle = _bundle(tmp_path)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SPECIFICATION))
    meta = bundle / "configs" / "metadata.json"
    monai_bundle.verify_metadata(meta_file=str(meta), filepath=str(schema))
    content = json.loads(meta.read_text())
    assert content["schema"] == SCHEMA
    del content["authors"]
    meta.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'authors' is a required property"):
        monai_bundle.verify_metadata(meta_file=str(meta), filepath=str(schema))


def test_the_command_line_of_the_readme_runs_in_the_bundle(tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    _, bundle = _bundle(tmp_path)
    _images(bundle / "images", RAS)
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    subprocess.run(command, cwd=bundle, check=True, capture_output=True, timeout=120)  # noqa: S603 - our interpreter
    assert (bundle / "predictions" / "p0.nii.gz").is_file()


def test_a_folder_without_images_is_an_error_not_a_success(tmp_path: Path) -> None:
    _, bundle = _bundle(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="Failed to evaluate"):
        _run_in_monai(bundle, tmp_path / "empty", tmp_path / "out")


# --- content -----------------------------------------------------------------------------------


def test_weights_are_tensors_by_name_and_each_as_large_as_it_is(tmp_path: Path) -> None:
    source, bundle = _bundle(tmp_path)
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in source.module.state_dict().items())
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_metadata_and_readme_say_where_the_model_comes_from(tmp_path: Path) -> None:
    _, bundle = _bundle(tmp_path)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"] == {"validation_mean_dice": 0.5}
    assert {key: metadata["provenance"][key] for key in ("site", "round", "seed", "peers")} == {
        "site": "A", "round": 3, "seed": 7, "peers": []
    }  # fmt: skip
    readme = (bundle / "docs" / "README.md").read_text()
    assert "| data contract |" in readme
    assert "MONAI's transforms and network are enough" in readme


def test_a_bundle_with_our_own_code_says_so(tmp_path: Path) -> None:
    _, bundle = _bundle(tmp_path, network={"name": "sanet_v1", "options": {"nf": 4}}, data={"resize": [32, 32, 32]})
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert "gcml-ray" in metadata["required_packages_version"]
    readme = (bundle / "docs" / "README.md").read_text()
    assert "the network is `gcml_ray.networks.sanet.SaNetV1`" in readme
    assert "labels written by `gcml_ray.export.bundle_runner`: data.resize" in readme


def test_a_bundle_in_monais_terms_alone_needs_no_gcml_ray(tmp_path: Path) -> None:
    _, bundle = _bundle(tmp_path)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert set(metadata["required_packages_version"]) == {"nibabel", "pytorch-ignite"}
    assert "gcml_ray" not in (bundle / "configs" / "inference.json").read_text()


def test_numbered_and_whole_files_make_cases_too(tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    source, bundle = _bundle(tmp_path)
    by_name = _images(tmp_path / "names", SWAPPED)
    numbered, whole = tmp_path / "numbers", tmp_path / "whole"
    numbered.mkdir()
    channels = []
    for index, channel in enumerate(("t1", "t2")):
        channels.append(_read(by_name / f"p0_{channel}.nii.gz")[0])
        (by_name / f"p0_{channel}.nii.gz").rename(numbered / f"p0_000{index}.nii.gz")
    save_volume(whole / "p0.nii.gz", np.stack(channels, axis=-1), SWAPPED)
    _predict(source, numbered, tmp_path / "ours")
    for images in (numbered, whole):
        _run_in_monai(bundle, images, tmp_path / f"theirs-{images.name}")
        theirs = _read(tmp_path / f"theirs-{images.name}" / "p0.nii.gz")[0]
        np.testing.assert_array_equal(theirs, _read(tmp_path / "ours" / "p0.nii.gz")[0])


def test_numbers_of_cases_are_not_taken_for_channels(tmp_path: Path) -> None:
    """lung_0000 to lung_0002 of one channel: three cases, as for ``gcml predict``."""
    pytest.importorskip("ignite")
    _, bundle = _bundle(tmp_path, data={"channels": ["ct"]})
    images = _images(tmp_path / "names", SWAPPED)
    first = next(images.glob("*.nii.gz"))
    numbered = tmp_path / "numbers"
    numbered.mkdir()
    for index in range(3):
        shutil.copy(first, numbered / f"lung_000{index}.nii.gz")
    _run_in_monai(bundle, numbered, tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [f"lung_000{i}.nii.gz" for i in range(3)]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_definition_of_every_network_builds_that_network(name: str) -> None:
    """Its defaults, in JSON and back, on the meta device: names and shapes are those of the registry's network."""
    from monai.bundle import ConfigParser  # noqa: PLC0415 - slow to import

    data = make_data()
    network = NetworkConfig(name=name)
    definition = json.loads(json.dumps(network_definition(network, data)))
    with torch.device("meta"):
        theirs = ConfigParser({"net": definition}).get_parsed_content("net")
        ours = build_network(network, data)
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (theirs, ours)]
    assert shapes[0] == shapes[1]


def make_data() -> Any:
    """A data section in 3D with two channels and three classes."""
    from gcml_ray.config import DataConfig  # noqa: PLC0415 - for its one use

    return DataConfig(
        datalist="none",
        channels=("a", "b"),
        labels={"air": 0, "x": 1, "y": 2},
        spacing_is_real=True,
        patch_size=(64, 64, 64),
    )


def test_a_bundle_can_be_the_start_of_a_run(tmp_path: Path) -> None:
    source, bundle = _bundle(tmp_path)
    config = make_config(tmp_path)
    network = config.network.model_copy(update={"start_from": str(bundle)})
    learner = build_learner(config, "B", network, torch.device("cpu"))
    image = torch.randn(1, 2, 8, 8, 8)
    with torch.inference_mode():
        found, expected = (forward_heads(module.eval(), image)[0] for module in (learner.model.module, source.module))
    torch.testing.assert_close(found, expected)


def test_only_what_monai_cannot_say_is_left_to_our_own_code() -> None:
    data = make_data()
    assert own_code_reason(data) is None
    assert "resize" in str(own_code_reason(data.model_copy(update={"resize": (8, 8, 8)})))
    assert "pictures" in str(own_code_reason(data.model_copy(update={"spatial_dims": 2})))
