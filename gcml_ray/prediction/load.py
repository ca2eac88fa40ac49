"""A personalised model found and read: from the folder of a run, or one that ``gcml export`` took from a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gcml_ray.config import POOLED, Config
from gcml_ray.config.file import load_config
from gcml_ray.data.contract import data_contract
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.files.model_card import CARD_FILE, WEIGHTS_FILE, is_model_folder, read_card
from gcml_ray.files.run_folder import MEMBER_FILE, MEMBERS_FILE, MODEL_FILE, RunFolder
from gcml_ray.model.checkpoint import load_model_file
from gcml_ray.model.weights import FlatModel
from gcml_ray.networks.registry import build_network, fingerprint
from gcml_ray.prediction.predict import FilePath, ModelFacts, PersonalModel
from gcml_ray.wording import in_shell


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
