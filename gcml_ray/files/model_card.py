"""What an exported model says of itself: how to prepare its images, and where it comes from.

``model.json`` holds the configuration of the run without paths and addresses, and a :class:`Provenance`. Knows no
torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gcml_ray.config import POOLED, Config
from gcml_ray.config.file import parse_config
from gcml_ray.errors import CheckpointError
from gcml_ray.files.record_json import from_json
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import PERSONALISED

CARD_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
# What decides a prediction, or tells how the model was trained; all others are about machines.
SECTIONS = (
    "name",
    "data",
    "network",
    "site_networks",
    "loss",
    "optimiser",
    "method",
    "federation",
    "privacy",
    "evaluation",
)
PACKAGES = ("gcml-ray", "torch", "monai", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    ``round_number`` is the round of these weights, ``num_rounds`` how many the run made. Up to then it learnt from the
    weights of ``peers``, from ``num_pushes`` of their pushes in all. A Dice is the mean over cases and classes, None
    where there was none. ``fingerprint`` says the architecture, ``identity`` the run's configuration.
    """

    site: str
    method: str
    round_number: int
    num_rounds: int
    peers: tuple[str, ...]
    num_pushes: int
    seed: int
    validation_dice: float | None
    test_dice: float | None
    data_contract: str
    fingerprint: str
    identity: str
    exported_at: str
    versions: dict[str, str]


@dataclass(frozen=True)
class ModelCard:
    """The content of ``model.json``."""

    config: Config
    provenance: Provenance


def make_card(
    run: RunFolder,
    config: Config,
    site: str,
    *,
    round_number: int,
    validation_dice: str,
    fingerprint: str,
    data_contract: str,
) -> ModelCard:
    """The card of a site's model, from what lies in the folder of its run.

    Args:
        run: the run that trained it; its test Dice is the mean over the site's cases in ``cases.csv``.
        config: of that run.
        site: whose model, or ``pooled``.
        round_number: the round that the weights come from; peers of later rounds are not named.
        validation_dice: a number as a weights file has it; empty where the model was never validated.
        fingerprint: of its network.
        data_contract: see :func:`gcml_ray.data.contract.data_contract`.

    Raises:
        ValueError: ``validation_dice`` is no number.
    """
    rounds = run.rounds()
    learnt_from = [  # not of whom weights arrived: a receiver's judge may leave a model out
        peer
        for record in rounds
        for report in record.trained
        if report.site == site and report.round_number <= round_number
        for peer in report.peers
    ]
    dice = [
        score.dice
        for score in run.cases()
        if site in (score.site, POOLED)  # a pooled model is scored on all sites' cases
        and (score.split, score.model) == ("test", PERSONALISED)
        and not math.isnan(score.dice)
    ]
    provenance = Provenance(
        site=site,
        method=config.method.name,
        round_number=round_number,
        num_rounds=len(rounds),
        peers=tuple(sorted(set(learnt_from))),
        num_pushes=len(learnt_from),
        seed=config.federation.seed,
        validation_dice=float(validation_dice) if validation_dice else None,
        test_dice=sum(dice) / len(dice) if dice else None,
        data_contract=data_contract,
        fingerprint=fingerprint,
        identity=config.identity,
        exported_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={package: version(package) for package in PACKAGES},
    )
    return ModelCard(config, provenance)


def is_model_folder(folder: str | Path) -> bool:
    """Whether this is an exported model rather than the folder of a run."""
    return (Path(folder) / CARD_FILE).is_file()


def write_card(path: Path, card: ModelCard) -> None:
    """Writes ``model.json``; its configuration names no path, server or cluster."""
    sections = card.config.model_dump(mode="json", by_alias=True, include=set(SECTIONS))
    sections["data"] |= {"datalist": "", "cache_folder": None}
    for network in (sections["network"], *sections["site_networks"].values()):
        network["start_from"] = None
    sections |= {"resources": {"amp": card.config.resources.amp}, "output": {"folder": ""}}
    write_json(path, {"format": 1, "provenance": asdict(card.provenance), "config": sections})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """An indented JSON file, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_card(path: Path) -> ModelCard:
    """Reads ``model.json``.

    Raises:
        CheckpointError: it is not one that :func:`write_card` wrote.
        ConfigError: a key of its configuration is not known, or its value not allowed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        provenance = from_json(Provenance, json.dumps(content["provenance"]))
        sections = dict(content["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the card of an exported model ({error!r}); export it again") from error
    return ModelCard(parse_config(sections, source=f"{path}, config"), provenance)
