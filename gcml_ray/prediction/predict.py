"""A personalised model taken to new patients: from image files or arrays to labels on the image's own grid.

Legend: C classes (softmax) or regions (sigmoid), K foreground classes or regions, *grid = what the network
sees, *source = the grid of the image's file (D, H, W or H, W).

What is averaged or resampled is probabilities, decided at the end on the file's grid. Where nothing is averaged
or resampled the decision is taken from the logits, exactly as in the run's own evaluation.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from scipy import ndimage
from torch import Tensor, nn

from gcml_ray.config import POOLED, Config
from gcml_ray.config.file import load_config
from gcml_ray.data.contract import data_contract
from gcml_ray.data.datalist import Case, name_from_file
from gcml_ray.data.loading import PreparedImage, prepare_image, read_image
from gcml_ray.data.reading import Volume, affine_problem
from gcml_ray.data.restoring import is_resampled, restore
from gcml_ray.errors import CheckpointError, ConfigError, DataError
from gcml_ray.files.model_card import CARD_FILE, WEIGHTS_FILE, is_model_folder, read_card
from gcml_ray.files.run_folder import MEMBER_FILE, MEMBERS_FILE, MODEL_FILE, RunFolder
from gcml_ray.model.checkpoint import load_model_file
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import build_network, fingerprint
from gcml_ray.prediction.inference import logits_by, mean_of, to_probabilities
from gcml_ray.prediction.label_files import Labels, label_map, output_paths, write_labels, write_masks
from gcml_ray.wording import in_shell

FilePath = str | Path
VolumeInput = FilePath | Sequence[FilePath] | tuple[NDArray[np.generic], NDArray[np.float64] | None]


@dataclass(frozen=True)
class ModelFacts:
    """What a model file says of itself; ``validation_dice`` is empty where it was never scored."""

    site: str
    round_number: int
    validation_dice: str
    method: str
    fingerprint: str
    data_contract: str


@dataclass(frozen=True, eq=False)
class Prediction:
    """One image's prediction on the grid of its file.

    Attributes:
        labels: (*source) values of ``data.labels``; None where regions need a file each (``label_files``).
        masks: (K, *source), one for each of ``data.foreground_names``; regions as the network gave them.
        affine: 4x4, voxel index to mm; None for pictures.
        probabilities: (C, *source), float32, before ``largest_component``; None where they were not asked for.
    """

    labels: Labels | None
    masks: NDArray[np.bool_]
    affine: NDArray[np.float64] | None
    probabilities: NDArray[np.float32] | None


class PersonalModel:
    """A site's model, ready to predict; :func:`load_model` makes one.

    Args:
        config: of the run.
        facts: of each model, the site's own first; several are an ensemble.
        modules: the networks, on ``device``.
        device: where forward passes run.
    """

    def __init__(
        self, config: Config, facts: Sequence[ModelFacts], modules: Sequence[nn.Module], device: torch.device
    ) -> None:
        self.config = config
        self.facts = tuple(facts)
        self.modules = tuple(modules)
        self.device = device

    def predict(
        self,
        volume: VolumeInput,
        *,
        flips: bool = False,
        largest_component: bool = False,
        probabilities: bool = False,
        name: str = "",
    ) -> Prediction:
        """Predicts one image.

        Args:
            volume: a file that holds all channels; a list of files, one a channel in the order of
                ``data.channels``; or (array, affine): (C, *source), or (*source) for one channel, with the 4x4
                affine from voxel index to mm, None for pictures.
            flips: average the probabilities over all flips of the axes: 8 passes in 3D, 4 in 2D.
            largest_component: keep the largest connected piece of each class or region alone.
            probabilities: return them too.
            name: what warnings call the case; by default its first file's name.

        Raises:
            DataError: the image cannot be used; names the file.
        """
        prepared, affine = self._prepare(volume, name)
        scores, threshold = self._scores(prepared, flips=flips)
        masks = self._decide(scores, prepared, threshold)
        if largest_component:
            masks = np.stack([keep_largest(mask) for mask in masks])
        shown = None
        if probabilities:
            shares = scores if threshold else self._activate(scores)  # threshold 0: they are logits
            shown = restore(shares, prepared, self.config.data).cpu().numpy()
        return Prediction(label_map(masks, self.config.data), masks, affine, shown)

    def predict_case(
        self, case: Case, folder: Path, *, flips: bool = False, largest_component: bool = False
    ) -> tuple[Path, ...]:
        """Predicts a case and writes it as ``folder/<case>.nii.gz`` (``.png`` for pictures), or a file a region.

        Raises:
            DataError: the image cannot be used, or its labels cannot be stored in this kind of file.
        """
        prediction = self.predict(case.images, flips=flips, largest_component=largest_component, name=case.name)
        paths = output_paths(folder, case.name, case.images[0], self.config.data)
        note = f"gcml-ray site {self.facts[0].site} round {self.facts[0].round_number}"
        if len(self.facts) > 1:
            note += f" ensemble of {len(self.facts)}"
        if prediction.labels is not None:
            write_labels(paths[""], prediction.labels, like=case.images[0], note=note)
        else:
            masks = dict(zip(self.config.data.foreground_names, prediction.masks, strict=True))
            write_masks(paths, masks, like=case.images[0], note=note)
        return tuple(paths.values())

    # --- steps of a prediction -----------------------------------------------------------------

    def _prepare(self, volume: VolumeInput, name: str) -> tuple[PreparedImage, NDArray[np.float64] | None]:
        """The preprocessed image and the affine of its source."""
        data = self.config.data
        if isinstance(volume, str | Path):
            volume = [volume]
        if hasattr(volume, "__array__"):
            raise DataError("an array comes with its affine: give (array, affine), of a picture (array, None)")
        if len(volume) == 0:
            raise DataError(
                "no image: the list of files is empty; give one file with all channels, or one file for each of "
                f"{', '.join(data.channels)}"
            )
        if hasattr(volume[0], "__array__"):
            if len(volume) != 2:
                raise DataError(f"an array and {len(volume) - 1} other things: give (array, affine)")
            content = self._from_array(np.asarray(volume[0]), volume[1])  # type: ignore[arg-type]  # (array, affine)
        else:
            paths = tuple(str(path) for path in volume)
            content = read_image(Case(self.facts[0].site, name or name_from_file(paths[0]), paths, "", None), data)
        return prepare_image(content.array, content.affine, data), content.affine

    def _from_array(self, array: NDArray[np.generic], affine: NDArray[np.float64] | None) -> Volume:
        """An array as if it came from a file, with the checks that a file gets."""
        data = self.config.data
        values = torch.from_numpy(np.array(array, dtype=np.float32))
        values = values[None] if values.ndim == data.spatial_dims else values
        if values.ndim != data.spatial_dims + 1 or len(values) != len(data.channels) or 0 in values.shape:
            raise DataError(
                f"the array has the shape {tuple(array.shape)}; expected {len(data.channels)} channel(s) "
                f"({', '.join(data.channels)}) first, then {data.spatial_dims} axes"
            )
        if not torch.isfinite(values).all():
            raise DataError("the array has NaN or infinite values; replace them, e.g. by 0")
        if values.min() == values.max():
            raise DataError("the array has one value everywhere: it is empty")
        if affine is None and data.spacing_is_real:
            raise DataError("data.spacing_is_real is true: give the 4x4 affine beside the array")
        if affine is not None and np.shape(affine) != (4, 4):
            raise DataError(f"the affine has the shape {np.shape(affine)}, expected (4, 4)")
        affine = None if affine is None else np.asarray(affine, dtype=np.float64)
        if problem := affine_problem("the array", affine, spatial_dims=data.spatial_dims):
            raise DataError(problem)
        return Volume(values, affine)

    def _scores(self, prepared: PreparedImage, *, flips: bool) -> tuple[Tensor, float]:
        """Scores (C, *grid) and the threshold of a region: logits and 0, or mean probabilities and 0.5."""
        if len(self.modules) == 1 and not flips and not is_resampled(prepared):
            return self._logits(self.modules[0], prepared.image), 0.0
        num_axes = self.config.data.spatial_dims if flips else 0
        flipped = [
            [1 + axis for axis in range(num_axes) if turned[axis]]
            for turned in itertools.product((False, True), repeat=num_axes)
        ]
        shares = (
            self._activate(self._logits(module, prepared.image.flip(axes))).flip(axes)
            for module in self.modules
            for axes in flipped
        )
        return mean_of(shares), 0.5

    def _logits(self, module: nn.Module, image: Tensor) -> Tensor:
        """Logits (C, *grid) of one network by sliding window, as in the run's evaluation."""
        return logits_by(self.config, module, image, self.device)

    def _activate(self, logits: Tensor) -> Tensor:
        """Probabilities (C, *grid)."""
        return to_probabilities(logits, sigmoid=self.config.data.is_sigmoid)

    def _decide(self, scores: Tensor, prepared: PreparedImage, threshold: float) -> NDArray[np.bool_]:
        """Masks (K, *source). Channel by channel, as a whole body in many classes would not fit in memory."""
        channels = (restore(scores[index : index + 1], prepared, self.config.data)[0] for index in range(len(scores)))
        if self.config.data.is_sigmoid:
            return np.stack([(channel > threshold).cpu().numpy() for channel in channels])
        best = next(channels)
        winner = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for index, channel in enumerate(channels, start=1):
            is_better = channel > best  # of equal ones the first, as argmax does
            winner[is_better] = index
            best = torch.where(is_better, channel, best)
        return np.stack([(winner == index).cpu().numpy() for index in range(1, len(scores))])


def keep_largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected piece of a mask; voxels that share a corner are connected, of equals the first stays."""
    pieces, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    kept: NDArray[np.bool_] = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    return kept


# --- loading -----------------------------------------------------------------------------------


def load_model(
    run_folder: FilePath,
    site: str | None = None,
    *,
    device: str = "cpu",
    ensemble: bool = False,
    peers: bool = False,
) -> PersonalModel:
    """A site's personalised model from the folder of a run, or a model that ``gcml export`` took from one.

    Args:
        run_folder: the ``output.folder`` of a run that was tested, or the folder of an exported model.
        site: whose model; a run of pooled cases has one for all sites, an exported model is of one site.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        ensemble: average with the personalised models of all other sites that lie in the folder.
        peers: predict with the peers' models that the site chose (``evaluation.ensemble_peers``), if it chose any.

    Raises:
        CheckpointError: the folder is not a run's, or a model is missing, unreadable or of another network, site
            or data contract.
        ConfigError: the configuration or the device cannot be used, or there is no other site for an ensemble, or
            the run has none.
    """
    target = _device(device)
    if ensemble and peers:
        raise ConfigError("ensemble and peers: an ensemble is of all sites' models or of those that a site chose")
    if is_model_folder(run_folder):
        return _load_exported(Path(run_folder), site, target, ensemble=ensemble or peers)
    folder = RunFolder.open(run_folder)
    config = load_config(folder.config_file)
    if config.method.name == POOLED:
        site = POOLED
    if site is None:
        found = ", ".join(folder.sites_with_model()) or "none"
        raise ConfigError(f"site: {folder.path} is the folder of a run; say whose model. Sites with one: {found}")
    sites = [site]
    if ensemble:
        sites += [other for other in folder.sites_with_model() if other != site]
        if len(sites) == 1:
            raise ConfigError(f"ensemble: no site but {site} has a {MODEL_FILE} in {folder.path}; leave it out")
    loaded = [_load_one(folder, config, each, target) for each in sites]
    if peers:
        loaded += _load_members(folder, config, site, target)
    return PersonalModel(config, [facts for facts, _ in loaded], [module for _, module in loaded], target)


def _load_exported(folder: Path, site: str | None, device: torch.device, *, ensemble: bool) -> PersonalModel:
    """The one model of an exported folder."""
    card = read_card(folder / CARD_FILE)
    own = card.provenance.site
    if ensemble:
        raise ConfigError(f"ensemble: {folder} holds the model of site {own} alone; give the folder of a run")
    if site not in (None, own) and own != POOLED:
        raise CheckpointError(f"{folder} holds the model of site {own}, not of {site}; leave the site out")
    loaded = _load_file(folder / WEIGHTS_FILE, card.config, own, device, described_in=folder / CARD_FILE)
    return PersonalModel(card.config, [loaded[0]], [loaded[1]], device)


def _load_one(folder: RunFolder, config: Config, site: str, device: torch.device) -> tuple[ModelFacts, nn.Module]:
    """One site's model from the folder of a run."""
    path = folder.checkpoints(site) / MODEL_FILE
    if not path.is_file():
        found = folder.sites_with_model()
        words = f"{path} does not exist; sites with a personalised model in this run: {', '.join(found) or 'none'}"
        if found and not _took_part(folder, site):
            raise CheckpointError(words)
        raise CheckpointError(
            f"{words}. It is written when a run has tested its models: finish it with "
            f"`gcml run --resume {in_shell(folder.path)}`"
        )
    return _load_file(path, config, site, device, described_in=folder.config_file)


def _took_part(folder: RunFolder, site: str) -> bool:
    """Whether a run has a site of that name."""
    state = folder.read_state() if folder.state_file.exists() else None
    return folder.checkpoints(site).is_dir() or (state is not None and site in (*state.alive, *state.dropped))


def _load_members(
    folder: RunFolder, config: Config, site: str, device: torch.device
) -> list[tuple[ModelFacts, nn.Module]]:
    """The models of its peers that a site chose for its ensemble when it was tested."""
    if not config.evaluation.ensemble_peers:
        raise ConfigError(f"peers: in the run of {folder.path} no site kept any (evaluation.ensemble_peers is 0)")
    names = folder.checkpoints(site) / MEMBERS_FILE
    if not names.is_file():
        raise CheckpointError(
            f"{names} does not exist: site {site} has not tested its ensemble; finish the run with "
            f"`gcml run --resume {in_shell(folder.path)}`"
        )
    paths = [names.parent / name for name in _member_names(names)]
    return [_load_file(path, config, _facts(path).site, device, described_in=folder.config_file) for path in paths]


def _member_names(path: Path) -> list[str]:
    """What ``members.json`` lists: files beside it, each once."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); bring it back, or predict without peers") from error
    if not isinstance(names, list) or len(set(map(str, names))) < len(names):
        raise CheckpointError(f"{path} is damaged: a list of files, each once, was expected; bring it back")
    if wrong := [name for name in names if not isinstance(name, str) or not MEMBER_FILE.fullmatch(name)]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]!r} is no member's file; bring it back")
    return names


def _load_file(
    path: Path, config: Config, site: str, device: torch.device, *, described_in: Path
) -> tuple[ModelFacts, nn.Module]:
    """A model file, checked against the configuration before its network is built."""
    facts, network = _facts(path), config.network_of(site)
    expected = {
        "site": (facts.site, site),
        "network fingerprint": (facts.fingerprint, fingerprint(network, config.data)),
        "data contract": (facts.data_contract, data_contract(config.data)),
    }
    wrong = [f"{key} {found} is not {wanted}" for key, (found, wanted) in expected.items() if found != wanted]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {described_in}: {'; '.join(wrong)}. Use the configuration that the model was "
            "trained with; data contract means labels, regions, channels, grid and normalisation"
        )
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and overwritten
        model = FlatModel(build_network(network, config.data).to(device), send_buffers=True)
    load_model_file(path, model)
    return facts, model.module.eval()


def _facts(path: Path) -> ModelFacts:
    """The header of a model file."""
    try:
        with safe_open(path, framework="np") as handle:
            header = handle.metadata() or {}
        return ModelFacts(
            site=header["site"],
            round_number=int(header["round"]),
            validation_dice=header["validation_dice"],
            method=header["method"],
            fingerprint=header["fingerprint"],
            data_contract=header["data_contract"],
        )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again from the run") from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a personalised model of gcml-ray: its header lacks {error}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; allowed are cpu, cuda, cuda:0, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine shows {torch.cuda.device_count()} GPU(s) to torch; use cpu")
    return device
