"""A site's model taken out of its run: safetensors with a card, torch.export and ONNX.

Every export lies in a folder of its own, beside ``model.json`` (:mod:`gcml_ray.files.model_card`). The graphs of
torch.export and ONNX are the network alone: a normalised window in, logits of the main head out.

Legend: B batch, C outputs, *window = ``evaluation.window_size`` (D H W or H W).
"""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from gcml_ray.config import POOLED, Config
from gcml_ray.errors import ConfigError, ExportError
from gcml_ray.export.bundle_config import own_code_reason, preparation
from gcml_ray.files.model_card import CARD_FILE, WEIGHTS_FILE, ModelCard, make_card, write_card, write_json
from gcml_ray.files.run_folder import MODEL_FILE, RunFolder
from gcml_ray.files.site_names import RESERVED_SITES
from gcml_ray.networks.registry import forward_heads
from gcml_ray.prediction.load import load_model
from gcml_ray.prediction.predict import PersonalModel
from gcml_ray.seeding import derive_seed
from gcml_ray.wording import in_shell

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # faults of where it is written
DRAFTS = ".export-"  # how the names of folders begin that an export is written to first
TOLERANCE = 1e-4  # of the largest logit
TORCH_FILE, ONNX_FILE, GRAPH_FILE = "model.pt2", "model.onnx", "graph.json"
INPUT, OUTPUT = "image", "logits"
OPSET = 18


@dataclass(frozen=True, eq=False)
class Source:
    """A model that is about to leave its run.

    Attributes:
        model: as for prediction, on the CPU; its weights are tensors of their own.
        card: what goes beside it.
        weights: the run's file.
        run: the run's folder.
    """

    model: PersonalModel
    card: ModelCard
    weights: Path
    run: RunFolder

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.model.config

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.model.modules[0]


Exporter = Callable[[Source, Path], str]


def open_source(run_folder: str | Path, site: str) -> Source:
    """A site's personalised model and all that its card says.

    Raises:
        CheckpointError: the folder is not a run's, the site is unknown, or the run has not tested its models yet.
        ConfigError: the configuration cannot be used.
    """
    run = RunFolder.open(run_folder)
    model = load_model(run_folder, site)
    facts = model.facts[0]
    for tensor in (*model.modules[0].parameters(), *model.modules[0].buffers()):
        tensor.data = tensor.data.clone()  # views into one vector would be saved whole, each of them
    card = make_card(
        run,
        model.config,
        facts.site,
        round_number=facts.round_number,
        validation_dice=facts.validation_dice,
        fingerprint=facts.fingerprint,
        data_contract=facts.data_contract,
    )
    return Source(model, card, run.checkpoints(facts.site) / MODEL_FILE, run)


def sites_to_export(run_folder: str | Path, names: list[str]) -> list[str]:
    """The sites asked for; ``all`` means every one with a model, the model of pooled cases included.

    Raises:
        CheckpointError: the folder is not a run's.
        ConfigError: ``all``, and no site has a model.
    """
    if "all" not in names:
        return list(dict.fromkeys(names))
    run = RunFolder.open(run_folder)
    found = run.sites_with_model()
    if not found:
        raise ConfigError(
            f"--site all: no site of {run.path} has a {MODEL_FILE}; it is written when a run has tested its models: "
            f"finish it with `gcml run --resume {in_shell(run.path)}`"
        )
    return [POOLED] if POOLED in found else found


def missing_models(run_folder: str | Path, exported: list[str]) -> list[str]:
    """A line for each site of a run without a model that ``all`` should have exported.

    Those are the sites that the run did not drop, by its state and the folders of their checkpoints.
    """
    run = RunFolder.open(run_folder)
    if POOLED in exported:
        return []
    state = run.read_state() if run.state_file.exists() else None
    known = {path.name for path in (run.path / "checkpoints").glob("*") if path.is_dir()}
    known |= set(state.alive) if state else set()
    gone = set(exported) | set(RESERVED_SITES) | (set(state.dropped) if state else set())
    return [
        f"site {site}: {run.checkpoints(site) / MODEL_FILE} is missing; copy it from where the site ran, or write it "
        f"again with `gcml run --resume {in_shell(run.path)}`"
        for site in sorted(known - gone)
    ]


@contextmanager
def fresh_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write an export into; when all is written its files go to ``out``, each whole, the card last.

    What was there before stays as it was until then.

    Args:
        out: must not exist, or be an empty folder.
        force: an existing folder is written over, file by file; files of other names stay.

    Raises:
        ConfigError: ``out`` exists and ``force`` was not asked for, ``out`` is a file, or the disk does not take it.
    """
    out = Path(os.path.abspath(out))  # "." and ".." have no name
    is_new = not out.exists()
    if not is_new and (not out.is_dir() or (not force and any(not _is_left(path) for path in out.iterdir()))):
        advice = "give another folder, or --force to write over its files" if out.is_dir() else "give a folder"
        raise ConfigError(f"--out {out} exists already; {advice}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in filter(_is_left, list(out.iterdir())):
            shutil.rmtree(path)
        with tempfile.TemporaryDirectory(prefix=DRAFTS, dir=out) as scratch:
            draft = Path(scratch) / out.name
            draft.mkdir()
            yield draft
            _move(draft, out)
    except BaseException as error:
        if is_new:
            with suppress(OSError):  # it has files: those of an export are whole
                out.rmdir()
        if not isinstance(error, OSError) or (error.errno not in UNWRITABLE and not isinstance(error, shutil.Error)):
            raise
        reason = error.strerror or "its files cannot be copied there"  # of several files shutil does not say it
        raise ConfigError(f"--out {out} cannot be written ({reason}); make room, or give another folder") from error


def _is_left(path: Path) -> bool:
    """Whether it was left behind by an export that was killed."""
    return path.name.startswith(DRAFTS)


def _move(draft: Path, out: Path) -> None:
    """Every file of a draft to its place; the card last, so that a folder with one is whole."""
    for path in sorted(draft.rglob("*"), key=lambda path: (path.name == CARD_FILE, path)):
        target = out / path.relative_to(draft)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            path.replace(target)


# --- formats -----------------------------------------------------------------------------------


def export_safetensors(source: Source, folder: Path) -> str:
    """``model.safetensors`` and ``model.json``: all that ``gcml predict`` needs. Returns a line that says so."""
    shutil.copyfile(source.weights, folder / WEIGHTS_FILE)
    write_card(folder / CARD_FILE, source.card)
    return f"{WEIGHTS_FILE} and {CARD_FILE}: gcml predict --run takes this folder"


def export_torch(source: Source, folder: Path) -> str:
    """``model.pt2`` by torch.export, for any batch; read back and compared with the network itself.

    Returns:
        A line with the largest difference.

    Raises:
        ExportError: the network cannot be traced, or the graph says something else than the network.
    """
    program = _traced(source)
    program.example_inputs = None  # windows of noise, larger than the network
    saved = io.BytesIO()  # not to the disk at once: torch does not say that one is full
    with _explained("torch.export", source):
        torch.export.save(program, saved)
        saved.seek(0)
        difference = _difference(source, torch.export.load(saved).module())
    (folder / TORCH_FILE).write_bytes(saved.getvalue())
    _write_graph_facts(source, folder, difference)
    return f"{TORCH_FILE}: {_said(difference)}"


def export_onnx(source: Source, folder: Path) -> str:
    """``model.onnx`` (opset 18) for any batch; run by onnxruntime and compared with the network itself.

    Returns:
        A line with the largest difference.

    Raises:
        ConfigError: a package of the extra ``export`` is missing.
        ExportError: the network cannot be said in ONNX, or the graph says something else than the network.
    """
    need_packages("onnx", "onnxscript", "onnxruntime")
    import onnxruntime  # noqa: PLC0415 - of the extra `export`

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # misses torchvision
    program = _traced(source)
    with _explained("ONNX", source):
        torch.onnx.export(
            program,
            (),
            folder / ONNX_FILE,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
        difference = _difference(
            source, lambda image: torch.from_numpy(session.run([OUTPUT], {INPUT: image.numpy()})[0])
        )
    _write_graph_facts(source, folder, difference)
    return f"{ONNX_FILE} (opset {OPSET}): {_said(difference)}"


def need_packages(*names: str) -> None:
    """Raises a ConfigError that names the extra ``export`` where one of these packages is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed; pip install 'gcml-ray[export]'")


# --- graphs ------------------------------------------------------------------------------------


class MainHead(nn.Module):
    """A network whose one output is the main head: (B, channels, *window) -> logits (B, C, *window)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the main head."""
        return forward_heads(self.network, image)[0]


def _traced(source: Source) -> torch.export.ExportedProgram:
    """The network as a graph, for any batch and one size of window."""
    with _explained("torch.export", source):
        batch = torch.export.Dim("batch", min=1)
        with torch.no_grad():
            return torch.export.export(
                MainHead(source.module).eval(), (_windows(source, 2),), dynamic_shapes={"image": {0: batch}}
            )


def _windows(source: Source, batch: int) -> Tensor:
    """Random windows (B, channels, *window), the same ones on every call."""
    shape = (batch, len(source.config.data.channels), *source.config.window_size)
    seed = derive_seed(source.config.federation.seed, "export")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _difference(source: Source, graph: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Largest difference from the network itself over batches of 1 and 3, absolute and relative to the largest logit.

    Raises:
        ExportError: the relative one is above :data:`TOLERANCE`.
    """
    network = MainHead(source.module).eval()
    differences, sizes = [], []
    with torch.inference_mode():
        for batch in (1, 3):
            image = _windows(source, batch)
            expected = network(image)
            differences.append((graph(image) - expected).abs().max())
            sizes.append(expected.abs().max())
    worst, largest = float(torch.stack(differences).max()), float(torch.stack(sizes).max())  # max() would hide a NaN
    relative = worst / max(largest, torch.finfo(torch.float32).tiny)
    if not relative <= TOLERANCE:  # also where it is NaN
        raise ExportError(
            f"the exported graph of site {source.card.provenance.site} differs from its network by {worst:.2g} "
            f"({relative:.2g} of the largest logit, {TOLERANCE:g} is allowed): it was not kept"
        )
    return worst, relative


def _said(difference: tuple[float, float]) -> str:
    return f"largest difference from the network {difference[0]:.2g} ({difference[1]:.1g} of the largest logit)"


def _write_graph_facts(source: Source, folder: Path, difference: tuple[float, float]) -> None:
    """The card, and what a program that runs the graph has to know."""
    data = source.config.data
    write_card(folder / CARD_FILE, source.card)
    names = list(data.regions) if data.regions is not None else list(data.labels)
    facts = {
        "input": {"name": INPUT, "shape": ["batch", len(data.channels), *source.config.window_size]},
        "output": {"name": OUTPUT, "shape": ["batch", data.num_outputs, *source.config.window_size]},
        "dtype": "float32",
        "channels": list(data.channels),
        "outputs": names,
        "activation": "sigmoid" if data.is_sigmoid else "softmax",
        "window_overlap": source.config.evaluation.window_overlap,
        "window_blend": "gaussian",
        "preparation": own_code_reason(data) or preparation(data),
        "largest_difference": difference[0],
    }
    write_json(folder / GRAPH_FILE, facts)


@contextmanager
def _explained(what: str, source: Source) -> Iterator[None]:
    """Turns what an exporter raises into an ExportError, and hides its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations inside the exporters
            yield
    except ExportError:
        raise
    except Exception as error:  # exporters raise whatever they like; all of it stems from the network
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise  # the disk's fault, not the network's
        network = source.config.network_of(source.card.provenance.site)
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"network {network.name} with options {network.options} cannot be exported by {what} "
            f"({type(error).__name__}: {reason}); use --format safetensors or bundle"
        ) from error
