"""A site's model as an MLflow pyfunc: loaded by ``mlflow.pyfunc.load_model``, served by ``mlflow models serve``.

The pyfunc holds the exported folder of :func:`gcml_ray.export.model.export_safetensors` and three lines of code that
name :class:`SiteModel`; there is no pickle in it. It predicts with gcml_ray's own code, as ``gcml predict`` does.

This module and ``gcml_ray.tracking`` are the only ones that import mlflow: a pyfunc is a subclass of MLflow's.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc import save_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from gcml_ray.data.datalist import Case
from gcml_ray.errors import ConfigError, DataError
from gcml_ray.export.bundle import provenance_facts
from gcml_ray.export.model import Source, export_safetensors
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.load import load_model
from gcml_ray.tracking.client import children_of, connect_to, find_experiment, reason, tracking_uri
from gcml_ray.wording import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

CODE = """from mlflow.models import set_model

from gcml_ray.export.pyfunc import SiteModel

set_model(SiteModel())
"""
ARTIFACT = "pyfunc"
MAGIC = {b"\x1f\x8b": ".nii.gz", b"\x89P": ".png", b"\xff\xd8": ".jpg", b"II": ".tif", b"MM": ".tif", b"BM": ".bmp"}
PATHS, CONTENTS = "paths", "contents"


class SiteModel(PythonModel):
    """What MLflow calls: a table of images in, a table of label files out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the model; a GPU is not used."""
        self.model = load_model(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predicts a case a row.

        Args:
            context: MLflow's.
            model_input: a table with the column ``paths`` (a list of files a row, one file with all channels or one a
                channel in the order of ``data.channels``) or ``contents`` (the same files as base64).
            params: ``flips`` and ``largest_component``, see :meth:`gcml_ray.prediction.predict.PersonalModel.predict`.

        Returns:
            A row a label file: ``case`` (the row's number), ``name`` (a region's where regions need a file each, else
            empty), ``ending`` and ``content`` (base64 of the file).

        Raises:
            DataError: an image cannot be used; names the row.
        """
        del context
        options = {"flips": False, "largest_component": False} | (params or {})
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(pd.DataFrame(model_input).to_dict("records")):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    images = _images(row, Path(scratch))
                    case = Case(self.model.facts[0].site, "labels", images, "", None)
                    for path in self.model.predict_case(case, Path(scratch) / "out", **options):
                        rows.append({"case": number, **_label_file(path)})
                except DataError as error:
                    raise DataError(f"row {number}: {str(error).replace(scratch + '/', '')}") from error
        return pd.DataFrame(rows, columns=["case", "name", "ending", "content"])


def _images(row: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """The image files of a row; what came as base64 is written into ``folder`` first."""
    given = {key: _as_list(row.get(key)) for key in (PATHS, CONTENTS)}
    if bool(given[PATHS]) == bool(given[CONTENTS]):
        raise DataError(f"give {PATHS} (files) or {CONTENTS} (base64 of files), a list with one entry or one a channel")
    if given[PATHS]:
        return tuple(given[PATHS])
    paths = []
    for index, text in enumerate(given[CONTENTS]):
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{CONTENTS}, entry {index}: not base64 ({error})") from error
        path = folder / f"image_{index}{MAGIC.get(content[:2], '.nii')}"
        path.write_bytes(content)
        paths.append(str(path))
    return tuple(paths)


def _as_list(cell: Any) -> list[str]:
    """A cell's entries; a missing cell has none, a text is one."""
    if cell is None or (isinstance(cell, float) and cell != cell):  # noqa: PLR0124 - NaN, pandas' missing cell
        return []
    return [cell] if isinstance(cell, str) else list(cell)


def _label_file(path: Path) -> dict[str, str]:
    ending = ".png" if path.suffix == ".png" else ".nii.gz"
    name = path.name.removesuffix(ending).removeprefix("labels").removeprefix("_")
    return {"name": name, "ending": ending, "content": base64.b64encode(path.read_bytes()).decode("ascii")}


# --- writing -----------------------------------------------------------------------------------


def signature() -> ModelSignature:
    """Columns and parameters of :meth:`SiteModel.predict`."""
    files: list[ColSpec | TensorSpec] = [
        ColSpec(Array(DataType.string), name, required=False) for name in (PATHS, CONTENTS)
    ]
    labels: list[ColSpec | TensorSpec] = [ColSpec(DataType.long, "case")]
    labels += [ColSpec(DataType.string, name) for name in ("name", "ending", "content")]
    switches = [ParamSpec(name, DataType.boolean, default=False) for name in ("flips", "largest_component")]
    return ModelSignature(inputs=Schema(files), outputs=Schema(labels), params=ParamSchema(switches))


def export_pyfunc(source: Source, folder: Path) -> str:
    """Writes an MLflow model folder. Returns a line that says how to serve it."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory() as scratch:
        model, code = Path(scratch) / "model", Path(scratch) / "site_model.py"
        model.mkdir()
        export_safetensors(source, model)
        code.write_text(CODE, encoding="utf-8")
        folder.rmdir()  # MLflow makes it itself
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like an example of an input: a whole image
            save_model(
                folder,
                python_model=str(code),
                artifacts={"model": str(model)},
                signature=signature(),
                pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "gcml-ray")],
                metadata={"provenance": json.dumps(provenance_facts(source.card.provenance))},
            )
    return "pyfunc: mlflow models serve --env-manager local --model-uri THIS FOLDER"


# --- the model registry ------------------------------------------------------------------------


def registry_uri(source: Source, uri: str | None) -> str:
    """MLflow's server or database: ``uri``, or the one that tracked the run.

    Raises:
        ConfigError: ``uri`` is None and the run was not tracked.
    """
    if uri is None and not source.config.tracking.enabled:
        raise ConfigError("--register: this run was not tracked (tracking.enabled: false); give --tracking-uri")
    return uri or tracking_uri(source.config, source.run.path)


def register_pyfunc(source: Source, folder: Path, *, uri: str) -> str:
    """Uploads an exported pyfunc to the site's MLflow run and registers it as ``<experiment>-<site>``.

    Args:
        source: the model.
        folder: where :func:`export_pyfunc` wrote it.
        uri: see :func:`registry_uri`. Where it does not know the site's run, a new one is made.

    Returns:
        ``models:/NAME/VERSION``.

    Raises:
        ConfigError: MLflow refuses.
    """
    config, origin = source.config, source.card.provenance
    name = f"{config.tracking.experiment}-{origin.site}"
    try:
        client = connect_to(uri)
        run_id = _site_run(client, source.run, origin.site) or _new_run(client, config.tracking.experiment, source, uri)
        client.log_artifacts(run_id, str(folder), ARTIFACT)
        _ensure_registered(client, name)
        place = f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
        tags = {f"gcml.{key}": str(value) for key, value in provenance_facts(origin).items() if key != "versions"}
        made = client.create_model_version(name, place, run_id=run_id, tags=tags)
    except MlflowException as error:
        raise ConfigError(f"MLflow at {without_secrets(uri)} cannot register {name}: {reason(error)}") from error
    return f"models:/{name}/{made.version}"


def _site_run(client: MlflowClient, run: RunFolder, site: str) -> str | None:
    """The MLflow run of a site, if this place tracked it."""
    try:
        recorded = json.loads(run.tracking_file.read_text(encoding="utf-8"))
        experiment, parent = str(recorded["experiment_id"]), str(recorded["run_id"])
        children = children_of(client, experiment, parent)
    except (OSError, ValueError, KeyError, MlflowException):
        return None
    return next((str(child.info.run_id) for child in children if child.data.tags.get("gcml.site") == site), None)


def _new_run(client: MlflowClient, experiment: str, source: Source, uri: str) -> str:
    """A run for a model whose training was tracked elsewhere or not at all."""
    site = source.card.provenance.site
    tags = {"gcml.role": "export", "gcml.site": site, "mlflow.source.name": "gcml"}
    run = client.create_run(find_experiment(client, experiment, uri), tags=tags, run_name=f"export-{site}")
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _ensure_registered(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
