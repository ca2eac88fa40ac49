"""``gcml predict`` and ``gcml evaluate`` through typer, on the tiny federation of ``tests/makers.py``."""

from __future__ import annotations

import csv
import threading
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from actors.run import run_federation
from gcml_ray.cli.predict import evaluate, predict
from gcml_ray.config import Config
from gcml_ray.errors import CheckpointError, ConfigError, DataError
from gcml_ray.prediction.label_files import site_that_made
from tests.makers import make_config
from tests.model_files import Array, Bright, bright_box, personal, save_volume, write_run
from tests.runs import RecordingListener

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(predict)
app.command()(evaluate)


def gcml(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def predict_b(config: Config, *words: object) -> Result:
    """Site A's model on something, into ``out``."""
    folder = Path(config.output.folder)
    return gcml("predict", "--run", folder, "--site", "A", "--out", folder.parent / "out", *words)


def volume(path: Path, *, value: float | None = None, shape: tuple[int, ...] = (12, 12, 8)) -> Path:
    random = np.random.default_rng(len(path.name))
    array = random.normal(100, 20, shape) if value is None else np.full(shape, value)
    return save_volume(path, array.astype(np.float32))


def pair(folder: Path, case: str, **options: Any) -> None:
    """The two channels of a case."""
    for channel in ("t1", "t2"):
        volume(folder / f"{case}_{channel}.nii", **options)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- the whole way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", [None, {"box": ["box"]}], ids=["softmax", "regions"])
def test_predicted_test_cases_score_exactly_what_the_run_wrote(
    tmp_path: Path, regions: dict[str, list[str]] | None
) -> None:
    config = make_config(tmp_path, data={"regions": regions}, federation={"rounds": 2, "local_steps": 4})
    run_federation(config, listener=RecordingListener(), stop=threading.Event())
    folder = Path(config.output.folder)
    for site in ("A", "B"):
        words = ("--site", site, "--images", config.data.datalist, "--split", "test", "--out", tmp_path / "out" / site)
        assert gcml("predict", "--run", folder, *words).exit_code == 0
    out = tmp_path / "scores.csv"
    words = ("--predictions", tmp_path / "out", "--datalist", config.data.datalist, "--split", "test", "--out", out)
    result = gcml("evaluate", "--run", folder, *words)
    assert result.exit_code == 0, result.output
    assert "2 scored, 0 failed, 0 without a prediction" in result.output
    expected = [row for row in rows(folder / "cases.csv") if (row["split"], row["model"]) == ("test", "personalised")]
    assert len(expected) == 2
    assert rows(out) == [row | {"model": "predicted"} for row in expected]


# --- predict -----------------------------------------------------------------------------------------


def test_folder_is_predicted_case_by_case(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    for case in ("p1", "p2"):
        pair(tmp_path / "in", case)
    result = predict_b(config, "--images", tmp_path / "in")
    assert result.exit_code == 0, result.output
    assert "model of site A: gcml, round 3, validation Dice 0.500" in result.output
    assert "2 predicted, 0 failed" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p1.nii.gz", "p2.nii.gz"]


def bad_4d(folder: Path) -> None:
    volume(folder / "bad.nii", shape=(12, 12, 8, 5))


def bad_nan(folder: Path) -> None:
    pair(folder, "bad")
    volume(folder / "bad_t1.nii", value=np.nan)


def bad_garbage(folder: Path) -> None:
    (folder / "bad.nii").write_bytes(b"no image")


def bad_checksum(folder: Path) -> None:
    """The voxels are whole, the checksum behind them is not."""
    pair(folder, "bad")
    (folder / "bad_t1.nii").unlink()
    packed = bytearray(volume(folder / "bad_t1.nii.gz").read_bytes())
    packed[-8] ^= 1
    (folder / "bad_t1.nii.gz").write_bytes(packed)


def bad_affine(folder: Path) -> None:
    random = np.random.default_rng(0).normal(100, 20, (12, 12, 8, 2)).astype(np.float32)
    save_volume(folder / "bad.nii", random, np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))


def bad_surface(folder: Path) -> None:
    """A file of surface values: its name ends like a volume's."""
    axes = [nibabel.cifti2.ScalarAxis(["a"]), nibabel.cifti2.BrainModelAxis.from_surface([0, 1], 3, "CortexLeft")]
    nibabel.save(nibabel.Cifti2Image(np.ones((1, 2), np.float32), axes), folder / "bad.dscalar.nii")


def bad_grid(folder: Path) -> None:
    volume(folder / "bad_t1.nii")
    volume(folder / "bad_t2.nii", shape=(9, 9, 9))


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (bad_4d, "the image has 5 channel(s) in 1 file(s), data.channels lists 2 (t1, t2)"),
        (lambda folder: volume(folder / "bad.nii"), "the image has 1 channel(s) in 1 file(s)"),
        (lambda folder: volume(folder / "bad.nii", shape=(12, 12, 8, 1, 5, 2)), "data.spatial_dims is 3"),
        (bad_garbage, "not an image that can be opened"),
        (bad_checksum, "it is damaged (BadGzipFile: CRC check failed"),
        (bad_affine, "unusable affine (its axes span 2 of 3 directions"),
        (bad_surface, "is a Cifti2Image, which has no voxels on a grid"),
        (bad_nan, "NaN or infinite value(s); replace them"),
        (lambda folder: pair(folder, "bad", value=0), "has one value everywhere: it is empty"),
        (bad_grid, "they must be on one grid"),
        (lambda folder: volume(folder / "bad_t1.nii"), "channel t2 is missing"),
    ],
    ids=[
        "4D",
        "too few channels",
        "6D",
        "garbage",
        "checksum",
        "flat affine",
        "surface",
        "NaN",
        "empty",
        "two grids",
        "missing channel",
    ],
)
def test_bad_case_is_named_and_the_rest_is_predicted(tmp_path: Path, make_bad: Any, message: str) -> None:
    config = write_run(tmp_path)
    pair(tmp_path / "in", "good")
    make_bad(tmp_path / "in")
    result = predict_b(config, "--images", tmp_path / "in")
    lines = [line for line in result.output.splitlines() if line.startswith("failed: bad")]
    assert len(lines) == 1
    assert message in lines[0]
    assert str(tmp_path / "in" / "bad") in lines[0]
    assert "1 predicted, 1 failed" in result.output
    assert result.exit_code == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]


def test_existing_files_are_kept_unless_overwritten(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    pair(tmp_path / "in", "p1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p1.nii.gz").write_bytes(b"mine")
    result = predict_b(config, "--images", tmp_path / "in")
    assert (result.exit_code, (tmp_path / "out" / "p1.nii.gz").read_bytes()) == (0, b"mine")
    assert "0 predicted, 0 failed, 1 skipped (their files exist; --overwrite replaces them)" in result.output
    assert predict_b(config, "--images", tmp_path / "in", "--overwrite").exit_code == 0
    assert nibabel.load(tmp_path / "out" / "p1.nii.gz").shape == (12, 12, 8)


def test_files_of_another_sites_model_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    for case in ("p1", "p2"):
        pair(tmp_path / "in", case)
    words = ("--images", tmp_path / "in")
    assert predict_b(config, *words).exit_code == 0
    assert "2 skipped" in predict_b(config, *words).output
    before = (tmp_path / "out" / "p1.nii.gz").read_bytes()
    result = predict_b(config, *words, "--site", "B")
    assert isinstance(result.exception, ConfigError)
    assert "2 file(s) are there from another site's model" in str(result.exception)
    assert "p1.nii.gz from that of site A, not B; give another folder" in str(result.exception)
    assert (tmp_path / "out" / "p1.nii.gz").read_bytes() == before
    assert predict_b(config, *words, "--site", "B", "--overwrite").exit_code == 0
    assert site_that_made(tmp_path / "out" / "p1.nii.gz") == "B"


def test_images_are_never_replaced(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    image = volume(tmp_path / "out" / "p1.nii.gz", shape=(12, 12, 8, 2))
    before = image.read_bytes()
    for words in ((tmp_path / "out", "--overwrite"), (image,)):
        result = predict_b(config, "--images", *words)
        assert isinstance(result.exception, ConfigError)
        assert "out is the folder of the images: label files among them would be taken for" in str(result.exception)
    assert image.read_bytes() == before
    assert list((tmp_path / "out").iterdir()) == [image]


def labels_with(config: Config, *words: object) -> Array:
    """The labels of the one case, predicted with some options."""
    result = predict_b(config, "--overwrite", "--images", Path(config.output.folder).parent / "in", *words)
    assert result.exit_code == 0, result.output
    return np.asarray(nibabel.load(Path(config.output.folder).parent / "out" / "p1.nii.gz").dataobj)


@pytest.mark.parametrize("option", ["--flips", "--ensemble"])
def test_option_reaches_the_prediction(tmp_path: Path, option: str) -> None:
    """Untrained networks on noise: every option changes some voxel."""
    config = write_run(tmp_path)
    pair(tmp_path / "in", "p1")
    plain = labels_with(config)
    assert 0 < plain.sum() < plain.size
    assert (labels_with(config, option) != plain).any()


def test_largest_component_leaves_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of 8 and 27 voxels in both channels; the network marks what is bright."""
    config = write_run(tmp_path)
    monkeypatch.setattr("gcml_ray.prediction.load.load_model", lambda *_, **__: personal(config, Bright()))
    image = bright_box((12, 12, 8), (slice(1, 3),) * 3) + bright_box((12, 12, 8), (slice(5, 8),) * 3)
    for channel in ("t1", "t2"):
        save_volume(tmp_path / "in" / f"p1_{channel}.nii", image)
    assert labels_with(config).sum() == 35
    assert labels_with(config, "--largest-component").sum() == 27


def test_header_says_which_model_made_it(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    pair(tmp_path / "in", "p1")
    labels_with(config, "--ensemble")
    header = nibabel.load(tmp_path / "out" / "p1.nii.gz").header
    assert bytes(header["descrip"]).rstrip(b"\0") == b"gcml-ray site A round 3 ensemble of 2"


def test_pictures_give_pictures(tmp_path: Path) -> None:
    config = write_run(tmp_path, spatial_dims=2)
    result = predict_b(config, "--images", config.data.datalist, "--split", "test")
    assert result.exit_code == 0, result.output
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".png"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--site", "Z", "--images", "."), CheckpointError, "sites with a personalised model in this run: A, B"),
        (("--run", "nowhere", "--images", "."), CheckpointError, "not the folder of a run"),
        (("--split", "tests", "--images", "x.json"), ConfigError, "--split 'tests' is unknown; allowed are train"),
        (("--device", "gpu", "--images", "."), ConfigError, "allowed are cpu"),
        (("--images", "nothing.nii"), DataError, "no such file or folder"),
    ],
)
def test_wrong_option_is_an_error_that_names_it(
    tmp_path: Path, words: tuple[str, ...], error: type[Exception], message: str
) -> None:
    result = predict_b(write_run(tmp_path), *words)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_a_folder_that_cannot_be_made_is_said_once_before_the_first_case(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "file").write_text("")
    result = predict_b(config, "--images", config.data.datalist, "--out", str(tmp_path / "file" / "out"))
    assert isinstance(result.exception, ConfigError)
    assert f"--out: {tmp_path / 'file' / 'out'} cannot be made or written (Not a directory)" in str(result.exception)
    assert "failed" not in result.output
