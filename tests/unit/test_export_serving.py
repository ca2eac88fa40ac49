"""The MLflow pyfunc: loaded, registered, and served over HTTP by MLflow's own server."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from typer.testing import CliRunner

from gcml_ray.cli.main import app
from gcml_ray.export.model import Source, fresh_folder, open_source
from gcml_ray.export.pyfunc import export_pyfunc, register_pyfunc, registry_uri
from gcml_ray.prediction.load import load_model
from tests.model_files import save_volume, write_run

START_SECONDS = 120


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    """A model and the folder of its pyfunc; written once, read by all tests."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pyfunc")
    source = open_source(write_run(folder).output.folder, "A")
    with fresh_folder(folder / "model", force=False) as draft:
        export_pyfunc(source, draft)
    return source, folder / "model"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The two channels of a case."""
    random = np.random.default_rng(1)
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    return [save_volume(tmp_path / f"p_{name}.nii.gz", random.normal(size=(12, 10, 8)).astype(np.float32), affine)
            for name in ("t1", "t2")]  # fmt: skip


def _expected(source: Source, files: list[Path], **options: bool) -> Any:
    """Label map by gcml predict's own code."""
    return load_model(source.run.path, "A").predict(files, **options).labels


def _labels(content: str, folder: Path) -> Any:
    """The label map inside an answer."""
    path = folder / "answer.nii.gz"
    path.write_bytes(base64.b64decode(content))
    image: Any = nibabel.load(path)
    return np.asanyarray(image.dataobj)


def _contents(files: list[Path]) -> list[str]:
    return [base64.b64encode(file.read_bytes()).decode() for file in files]


# --- served ------------------------------------------------------------------------------------


@contextmanager
def _served(model: Path, log: Path) -> Iterator[str]:
    """The address of ``mlflow models serve``, which is ended in any case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--workers", "1"]
    command += ["--model-uri", str(model), "--host", "127.0.0.1", "--port", str(port)]
    # MLflow starts its web server by name, so that of this interpreter must be found.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("w") as out:
        server = subprocess.Popen(  # noqa: S603 - our own interpreter
            command,
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            _wait_until_up(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(server.pid, number)
                    server.wait(10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _wait_until_up(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/ping", timeout=2):  # noqa: S310 - our own server
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"not up after {START_SECONDS} s: {log.read_text()}")


def _ask(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"{address}/invocations", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - our own server
        return json.load(answer)["predictions"]


def test_served_model_gives_the_labels_of_gcml_predict(
    exported: tuple[Source, Path], files: list[Path], tmp_path: Path
) -> None:
    """One server for all that is asked over HTTP, as it takes seconds to start."""
    source, folder = exported
    with _served(folder, tmp_path / "log.txt") as address:
        (sent,) = _ask(address, {"dataframe_records": [{"contents": _contents(files)}]})
        named = _ask(address, {"dataframe_records": [{"paths": [str(file) for file in files]}] * 2})
        body = {"dataframe_records": [{"contents": _contents(files)}], "params": {"flips": True}}
        (flipped,) = _ask(address, body)
        with pytest.raises(urllib.error.HTTPError) as wrong:
            _ask(address, {"dataframe_records": [{"contents": ["not base64!"]}]})
        reason = wrong.value.read().decode()
    expected = _expected(source, files)
    assert len(np.unique(expected)) > 1, "an empty prediction would prove nothing"
    np.testing.assert_array_equal(_labels(sent["content"], tmp_path), expected)
    assert [row["case"] for row in named] == [0, 1]
    np.testing.assert_array_equal(_labels(named[1]["content"], tmp_path), expected)
    np.testing.assert_array_equal(_labels(flipped["content"], tmp_path), _expected(source, files, flips=True))
    assert wrong.value.code == 400
    assert "row 0: contents, entry 0: not base64" in reason


# --- loaded and registered ---------------------------------------------------------------------


def test_a_loaded_pyfunc_writes_a_file_for_each_region_that_needs_one(tmp_path: Path, files: list[Path]) -> None:
    data = {"labels": {"air": 0, "a": 1, "b": 2, "c": 3}, "regions": {"x": ["a", "b"], "y": ["b", "c"]}}
    source = open_source(write_run(tmp_path, data=data).output.folder, "A")
    with fresh_folder(tmp_path / "model", force=False) as draft:
        export_pyfunc(source, draft)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    answer = model.predict(pd.DataFrame({"contents": [_contents(files)]}))
    assert list(answer["name"]) == ["x", "y"]
    masks = load_model(source.run.path, "A").predict(files).masks
    for mask, content in zip(masks, answer["content"], strict=True):
        np.testing.assert_array_equal(_labels(content, tmp_path), mask)


def test_the_pyfunc_holds_no_pickle(exported: tuple[Source, Path]) -> None:
    names = {str(path.relative_to(exported[1])) for path in exported[1].rglob("*") if path.is_file()}
    assert {name for name in names if name.endswith((".pkl", ".pt", ".pickle"))} == set()
    assert {"site_model.py", "artifacts/model/model.safetensors", "artifacts/model/model.json"} <= names


def test_a_row_without_images_is_refused(exported: tuple[Source, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(exported[1]))
    with pytest.raises(Exception, match=r"row 0: give paths .* or contents"):
        model.predict(pd.DataFrame({"paths": [[]]}))


def test_registering_gives_a_version_under_the_sites_name(
    exported: tuple[Source, Path], files: list[Path], tmp_path: Path
) -> None:
    source, folder = exported
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = register_pyfunc(source, folder, uri=uri)
    second = register_pyfunc(source, folder, uri=uri)
    assert (first, second) == ("models:/gcml-ray-A/1", "models:/gcml-ray-A/2")
    version = MlflowClient(uri).get_model_version("gcml-ray-A", "1")
    assert (version.tags["gcml.site"], version.tags["gcml.round"], version.tags["gcml.seed"]) == ("A", "3", "7")
    mlflow.set_tracking_uri(uri)
    try:
        answer = mlflow.pyfunc.load_model(first).predict(pd.DataFrame({"paths": [[str(file) for file in files]]}))
    finally:
        mlflow.set_tracking_uri(None)
    np.testing.assert_array_equal(_labels(answer["content"][0], tmp_path), _expected(source, files))


def test_a_run_that_was_not_tracked_asks_where_to_register(exported: tuple[Source, Path], tmp_path: Path) -> None:
    run = str(exported[0].run.path)
    result = CliRunner().invoke(
        app,
        ["export", "--run", run, "--site", "A", "--format", "pyfunc", "--out", str(tmp_path / "out"), "--register"],
    )
    assert "this run was not tracked" in str(result.exception)
    assert not (tmp_path / "out").exists(), "asked before anything is written"


def test_a_tracked_runs_model_is_registered_with_the_mlflow_run_of_its_site(tmp_path: Path) -> None:
    config = write_run(tmp_path, tracking={"enabled": True, "experiment": "trial"})
    source = open_source(config.output.folder, "A")
    client = MlflowClient(registry_uri(source, None))
    experiment = client.create_experiment("trial", artifact_location=(tmp_path / "artifacts").as_uri())
    parent = client.create_run(experiment).info.run_id
    child, _ = (
        client.create_run(experiment, tags={"mlflow.parentRunId": parent, "gcml.site": site}).info.run_id
        for site in ("A", "B")
    )
    source.run.tracking_file.write_text(json.dumps({"uri": "", "experiment_id": experiment, "run_id": parent}))
    with fresh_folder(tmp_path / "model", force=False) as draft:
        export_pyfunc(source, draft)
    name = register_pyfunc(source, tmp_path / "model", uri=registry_uri(source, None))
    assert name == "models:/trial-A/1"
    assert client.get_model_version("trial-A", "1").run_id == child


def test_the_current_folder_can_be_exported_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh_folder(Path(), force=False) as draft:
        (draft / "model.txt").write_text("weights")
    assert [path.name for path in tmp_path.iterdir()] == ["model.txt"]
