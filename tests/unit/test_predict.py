"""Legend: D H W voxels. Networks are made up, so that their answer is known; see ``tests/model_files.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import gcml_ray
from gcml_ray.config import Config
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import prepare_image
from gcml_ray.data.restoring import is_resampled, restore
from gcml_ray.errors import CheckpointError, ConfigError, DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.load import load_model
from gcml_ray.prediction.predict import keep_largest
from tests.makers import make_config
from tests.model_files import Array, Bright, Fixed, bright_box, personal, save_volume, write_model, write_run

SHAPE = (10, 14, 8)
BOX = (slice(1, 4), slice(8, 12), slice(2, 7))
TURN = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
AFFINES = {
    "RAS": np.eye(4),
    "LAS anisotropic": np.diag([-0.5, 1.0, 3.0, 1.0]),
    "LPI": np.diag([-1.0, -1.0, -1.0, 1.0]),
    "PSR swapped axes": np.array([[0, 0, 2.0, -7], [-1.0, 0, 0, 5], [0, 1.5, 0, 3], [0, 0, 0, 1]]),
    "oblique": np.vstack([np.hstack([TURN @ np.diag([-1.0, 1.2, 2.0]), [[4], [5], [6]]]), [0, 0, 0, 1]]),
}


def config_of(folder: Path, **data: Any) -> Config:
    """One channel, normalised over all voxels, a patch that holds every image here."""
    values = {"channels": ["ct"], "normalise": "all", "patch_size": [32] * data.get("spatial_dims", 3)}
    return make_config(folder, data=values | data)


def left_half(shape: tuple[int, ...], num: int) -> torch.Tensor:
    """Logits (2, D, H, W) for class 1 in the first ``num`` planes of the first axis."""
    logits = torch.zeros(2, *shape)
    logits[1] = -1
    logits[1, :num] = 1
    return logits


def first_axis(affine: Array, shape: tuple[int, ...]) -> Array:
    """The world x of every voxel, in mm."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.asarray((indices @ affine[:3, :3].T + affine[:3, 3])[..., 0])


# --- grids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_labels_lie_on_the_grid_of_the_file(tmp_path: Path, affine: Array) -> None:
    image = save_volume(tmp_path / "p1.nii.gz", bright_box(SHAPE, BOX), affine)
    model = personal(config_of(tmp_path), Bright())
    (written,) = model.predict_case(Case("A", "p1", (str(image),), "", None), tmp_path / "out")
    stored, original = nibabel.load(written), nibabel.load(image)
    expected = np.zeros(SHAPE)
    expected[BOX] = 1
    np.testing.assert_array_equal(stored.get_fdata(), expected)
    np.testing.assert_array_equal(stored.affine, original.affine)
    np.testing.assert_allclose(stored.header.get_zooms(), original.header.get_zooms())
    assert (int(stored.header["sform_code"]), int(stored.header["qform_code"])) == (
        int(original.header["sform_code"]),
        int(original.header["qform_code"]),
    )
    assert stored.get_data_dtype() == np.uint8


@pytest.mark.parametrize("name", ["RAS", "LAS anisotropic", "LPI", "PSR swapped axes"])
def test_network_sees_the_configured_orientation_whatever_the_file_has(tmp_path: Path, name: str) -> None:
    """In RAS the first axis runs from left to right, so its first half is where the world's x is small."""
    affine = AFFINES[name]
    x = first_axis(affine, SHAPE)
    ras_shape = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), affine)).shape
    model = personal(config_of(tmp_path, patch_size=list(ras_shape)), Fixed(left_half(ras_shape, ras_shape[0] // 2)))
    labels = model.predict((bright_box(SHAPE, BOX), affine)).labels
    np.testing.assert_array_equal(labels, x < (x.min() + x.max()) / 2)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize(
    "resampling", [{"target_spacing_mm": [0.8, 1.6, 2.0]}, {"resize": [7, 16, 9]}], ids=["spacing", "size"]
)
def test_a_linear_function_survives_the_way_back(tmp_path: Path, name: str, resampling: dict[str, Any]) -> None:
    """Linear interpolation reproduces a linear function of the place; so any shift or swap of voxels would show."""
    data = config_of(tmp_path, **resampling).data
    prepared = prepare_image(torch.rand(1, *SHAPE), AFFINES[name], data)
    assert is_resampled(prepared)
    slope = np.array([1.0, 0.1, -0.7])

    def plane(affine: Array, shape: tuple[int, ...]) -> Array:
        indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        return np.asarray((indices @ affine[:3, :3].T + affine[:3, 3]) @ slope)

    on_grid = torch.from_numpy(plane(prepared.grid.affine.numpy(), prepared.grid.shape))[None].float()
    back = restore(on_grid, prepared, data)[0].numpy()
    inner = (slice(2, -2),) * 3  # beyond the outermost voxel's centre the border is repeated
    np.testing.assert_allclose(back[inner], plane(AFFINES[name], SHAPE)[inner], atol=2e-3)


def test_resampled_box_comes_back_in_its_place(tmp_path: Path) -> None:
    """From 1 mm to 2 mm and back: the box may lose its edge by less than a voxel, never its centre."""
    box = (slice(4, 12), slice(6, 14), slice(4, 10))
    image = bright_box((20, 24, 16), box)
    labels = personal(config_of(tmp_path, target_spacing_mm=[2.0] * 3), Bright()).predict((image, np.eye(4))).labels
    assert labels is not None
    found = np.argwhere(labels == 1)
    np.testing.assert_allclose(found.mean(axis=0), [7.5, 9.5, 6.5], atol=0.5)
    np.testing.assert_allclose(np.ptp(found, axis=0) + 1, [8, 8, 6], atol=2)


def test_file_without_resampling_is_not_called_resampled(tmp_path: Path) -> None:
    data = config_of(tmp_path, target_spacing_mm=[1.0, 1.0, 1.0]).data
    assert not is_resampled(prepare_image(torch.rand(1, *SHAPE), np.diag([-1.0, 1, 1, 1]), data))


def test_picture_gives_a_png_of_its_own_size(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, spatial_dims=2, spacing_is_real=False, resize=[16, 16], labels={"background": 0, "vessel": 255}
    )
    Image.fromarray(bright_box((21, 33), (slice(2, 9), slice(5, 20))).astype(np.uint8)).save(tmp_path / "eye.png")
    (written,) = personal(config, Bright()).predict_case(
        Case("A", "eye", (str(tmp_path / "eye.png"),), "", None), tmp_path / "out"
    )
    mask = np.asarray(Image.open(written))
    assert (written.name, mask.shape, set(np.unique(mask))) == ("eye.png", (21, 33), {0, 255})
    np.testing.assert_allclose(np.argwhere(mask).mean(axis=0), [5.0, 12.0], atol=0.75)


def test_slice_stored_as_a_volume_of_one_stays_one(tmp_path: Path) -> None:
    image = save_volume(tmp_path / "s.nii.gz", bright_box((12, 10, 1), (slice(2, 5), slice(3, 8))))
    model = personal(config_of(tmp_path, spatial_dims=2), Bright())
    (written,) = model.predict_case(Case("A", "s", (str(image),), "", None), tmp_path / "out")
    assert nibabel.load(written).shape == (12, 10, 1)


def test_coronal_slice_is_resampled_and_its_labels_keep_its_affine(tmp_path: Path) -> None:
    """Pixels of 2 x 3 mm go to 1 mm and back: the box stays in its place."""
    box, coronal = (slice(2, 5), slice(3, 8)), np.array([[2.0, 0, 0, 7], [0, 0, -5, 8], [0, 3, 0, 9], [0, 0, 0, 1]])
    image = save_volume(tmp_path / "s.nii.gz", bright_box((12, 10, 1), (*box, slice(None))), coronal)
    config = config_of(tmp_path, spatial_dims=2, target_spacing_mm=[1.0, 1.0])
    (written,) = personal(config, Bright()).predict_case(Case("A", "s", (str(image),), "", None), tmp_path / "out")
    labels = nibabel.load(written)
    np.testing.assert_array_equal(labels.affine, coronal)
    np.testing.assert_array_equal(np.asarray(labels.dataobj)[..., 0], bright_box((12, 10), box) == 200)


# --- labels and regions ------------------------------------------------------------------------------


def test_region_files_hold_zeros_and_ones(tmp_path: Path) -> None:
    config = config_of(tmp_path, labels={"background": 0, "x": 3, "y": 4}, regions={"both": ["x", "y"]})
    image = save_volume(tmp_path / "p1.nii.gz", bright_box(SHAPE, BOX))
    (written,) = personal(config, Bright(num_outputs=1)).predict_case(
        Case("A", "p1", (str(image),), "", None), tmp_path / "out"
    )
    stored = nibabel.load(written).get_fdata()
    assert written.name == "p1_both.nii.gz"
    assert (stored.sum(), stored[BOX].min()) == (3 * 4 * 5, 1)


def test_png_that_cannot_hold_the_values_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, spatial_dims=2, spacing_is_real=False, labels={"background": 0, "vessel": 700})
    Image.fromarray(bright_box((8, 8), (slice(2, 5),)).astype(np.uint8)).save(tmp_path / "eye.png")
    case = Case("A", "eye", (str(tmp_path / "eye.png"),), "", None)
    with pytest.raises(DataError, match="a png mask holds 0 to 255"):
        personal(config, Bright()).predict_case(case, tmp_path)


def test_only_the_largest_piece_stays() -> None:
    mask = np.zeros((5, 8), dtype=bool)
    mask[0, 0], mask[1, 1], mask[2, 2] = True, True, True  # one piece: corners touch
    mask[4, 5:7] = True
    expected = mask.copy()
    expected[4] = False
    np.testing.assert_array_equal(keep_largest(mask), expected)


def test_empty_mask_has_no_piece_to_keep() -> None:
    assert not keep_largest(np.zeros((3, 3), dtype=bool)).any()


def test_largest_component_is_taken_a_class(tmp_path: Path) -> None:
    image = bright_box(SHAPE, BOX)
    image[9, 0, 0] = 200
    model = personal(config_of(tmp_path), Bright())
    assert model.predict((image, np.eye(4))).masks[0, 9, 0, 0]
    kept = model.predict((image, np.eye(4)), largest_component=True).masks[0]
    assert (kept.sum(), kept[9, 0, 0]) == (60, False)


# --- averages ----------------------------------------------------------------------------------------


def softmax(logits: Array) -> Array:
    shares = np.exp(logits)
    return np.asarray(shares / shares.sum(axis=0))


def test_probabilities_without_averages_are_those_of_the_logits(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    model = personal(config_of(tmp_path, patch_size=[4] * 3), Fixed(torch.from_numpy(logits)))
    image = np.random.default_rng(1).normal(size=(4, 4, 4))
    result = model.predict((image, np.eye(4)), probabilities=True)
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities, softmax(logits), atol=1e-6)
    np.testing.assert_array_equal(result.masks[0], logits[1] > logits[0])
    assert model.predict((image, np.eye(4))).probabilities is None


def test_flips_average_the_probabilities_of_all_eight(tmp_path: Path) -> None:
    """The network answers by place alone, so each flip shows the same answer turned over."""
    logits = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    model = personal(config_of(tmp_path, patch_size=[4] * 3), Fixed(torch.from_numpy(logits)))
    image = np.random.default_rng(1).normal(size=(4, 4, 4))
    axes = [(), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)]
    expected = np.mean([np.flip(softmax(logits), each) for each in axes], axis=0)
    result = model.predict((image, np.eye(4)), flips=True, probabilities=True)
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    np.testing.assert_array_equal(result.masks[0], expected[1] > expected[0])


def test_ensemble_averages_probabilities_not_logits(tmp_path: Path) -> None:
    """Probabilities of class 1: 0.982 and 0.269; with three of the latter the logits' mean is 0.25, still in favour."""
    modules = []
    for value in (4.0, -1.0, -1.0):
        logits = torch.zeros(2, 4, 4, 4)
        logits[1] = value
        modules.append(Fixed(logits))
    image = np.random.default_rng(1).normal(size=(4, 4, 4))
    result = personal(config_of(tmp_path, patch_size=[4] * 3), *modules).predict((image, np.eye(4)), probabilities=True)
    expected = np.mean([1 / (1 + np.exp(-value)) for value in (4.0, -1.0, -1.0)])  # 0.507
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities[1], expected, atol=1e-6)
    assert result.masks.all()
    outvoted = personal(config_of(tmp_path, patch_size=[4] * 3), *modules, modules[1]).predict((image, np.eye(4)))
    assert not outvoted.masks.any(), "mean of logits 0.25 > 0, mean of probabilities 0.447 < 0.5"


def test_regions_are_decided_at_one_half(tmp_path: Path) -> None:
    config = config_of(tmp_path, patch_size=[4] * 3, labels={"background": 0, "x": 1}, regions={"r": ["x"]})
    logits = torch.full((1, 4, 4, 4), -0.1)
    logits[:, 0] = 0.1
    image = np.random.default_rng(1).normal(size=(4, 4, 4))
    model = personal(config, Fixed(logits))
    assert model.predict((image, np.eye(4))).masks.sum() == 16
    assert personal(config, Fixed(logits), Fixed(logits)).predict((image, np.eye(4))).masks.sum() == 16


# --- what can be predicted ---------------------------------------------------------------------------


def test_file_channel_files_and_array_give_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path, channels=["t1", "t2"])
    first, second = bright_box(SHAPE, BOX), np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    affine = AFFINES["LAS anisotropic"]
    one = save_volume(tmp_path / "whole.nii.gz", np.stack([first, second], axis=-1), affine)
    several = [save_volume(tmp_path / f"c{i}.nii.gz", part, affine) for i, part in enumerate((first, second))]
    model = personal(config, Bright())
    results = [model.predict(volume) for volume in (one, str(one), several, (np.stack([first, second]), affine))]
    for result in results:
        np.testing.assert_array_equal(result.masks, results[0].masks)
        np.testing.assert_array_equal(result.affine, affine)
    assert results[0].masks.sum() == 60


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((2, *SHAPE)), np.eye(4), r"shape \(2, 10, 14, 8\); expected 1 channel"),
        (np.zeros((4, 4)), np.eye(4), r"shape \(4, 4\); expected 1 channel"),
        (np.full(SHAPE, np.nan), np.eye(4), "NaN"),
        (np.zeros(SHAPE), np.eye(4), "one value everywhere"),
        (np.arange(8.0).reshape(2, 2, 2), None, "give the 4x4 affine"),
        (np.arange(8.0).reshape(2, 2, 2), np.eye(3), r"affine has the shape \(3, 3\)"),
        (np.arange(8.0).reshape(2, 2, 2), np.ones((4, 4)), "the array has an unusable affine"),
    ],
)
def test_array_that_cannot_be_used_is_refused(tmp_path: Path, array: Array, affine: Array | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        personal(config_of(tmp_path), Bright()).predict((array, affine))


@pytest.mark.parametrize("volume", [np.zeros(SHAPE), torch.zeros(SHAPE), (np.zeros(SHAPE), np.eye(4), "t1")])
def test_arrays_without_their_affine_are_refused_and_a_tensor_with_it_is_taken(tmp_path: Path, volume: Any) -> None:
    with pytest.raises(DataError, match=r"give \(array, affine\)"):
        personal(config_of(tmp_path), Bright()).predict(volume)


# --- loading -----------------------------------------------------------------------------------------


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the list of files is empty; give one file with all channels"):
        personal(config_of(tmp_path), Bright()).predict([])


def test_package_gives_load_model_without_loading_torch() -> None:
    program = "import sys, gcml_ray; print('torch' in sys.modules, gcml_ray.__all__)"
    run = subprocess.run(  # noqa: S603 - our own interpreter and program
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "False ['Federation', 'FederationResult', 'load_model']"
    assert gcml_ray.load_model is load_model


def test_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        gcml_ray.load_modle  # noqa: B018


def test_loaded_model_knows_its_facts_and_is_in_eval_mode(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    model = load_model(config.output.folder, "B")
    assert (model.facts[0].site, model.facts[0].round_number) == ("B", 3)
    assert not model.modules[0].training


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    before = torch.get_rng_state()
    load_model(config.output.folder, "A")
    assert torch.equal(torch.get_rng_state(), before)


def test_ensemble_holds_the_own_model_first_then_the_others(tmp_path: Path) -> None:
    config = write_run(tmp_path, num_sites=3, sites=("A", "B", "C"))
    model = load_model(config.output.folder, "B", ensemble=True)
    assert [facts.site for facts in model.facts] == ["B", "A", "C"]


def test_run_of_pooled_cases_has_one_model_for_all_sites(tmp_path: Path) -> None:
    config = write_run(tmp_path, sites=("pooled",), method={"name": "pooled"})
    assert load_model(config.output.folder, "B").facts[0].site == "pooled"


def test_ensemble_of_one_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path, sites=("A",))
    with pytest.raises(ConfigError, match="no site but A has a personalised"):
        load_model(config.output.folder, "A", ensemble=True)


def test_unknown_site_is_told_the_sites_there_are(tmp_path: Path) -> None:
    config = write_run(tmp_path, sites=("A",))
    with pytest.raises(CheckpointError, match=r"does not exist; sites with a personalised model in this run: A$"):
        load_model(config.output.folder, "B")


def test_site_without_its_model_is_told_to_finish_the_run(tmp_path: Path) -> None:
    config = write_run(tmp_path, sites=("A",))
    RunFolder.open(config.output.folder).checkpoints("B").mkdir()
    with pytest.raises(CheckpointError, match=r"in this run: A\. It is written .* finish it with `gcml run --resume"):
        load_model(config.output.folder, "B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 16}, "network fingerprint 0{16} is not"),
        ({"data_contract": "1" * 16}, "data contract 1{16} is not"),
        ({"site": "B"}, "site B is not A"),
        ({"round": "last"}, "not a personalised model of gcml-ray"),
    ],
)
def test_model_that_does_not_fit_the_configuration_is_refused(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    config = write_run(tmp_path)
    write_model(RunFolder.open(config.output.folder), config, "A", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(config.output.folder, "A")


def test_damaged_model_file_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    path = RunFolder.open(config.output.folder).checkpoints("A") / "personalised.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"personalised.safetensors cannot be read"):
        load_model(config.output.folder, "A")


@pytest.mark.parametrize(("device", "message"), [("gpu", "is unknown"), ("cuda:99", r"shows \d+ GPU")])
def test_device_that_is_not_there_is_refused(tmp_path: Path, device: str, message: str) -> None:
    config = write_run(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_model(config.output.folder, "A", device=device)
