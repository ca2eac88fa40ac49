"""Runs a bundle of :mod:`gcml_ray.export.bundle` whose images only gcml_ray's own code can prepare.

``configs/inference.json`` names these by ``_target_``; MONAI calls them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from gcml_ray.data.datalist import Case
from gcml_ray.data.image_cases import find_cases
from gcml_ray.errors import DataError, GcmlError
from gcml_ray.files.model_card import ModelCard
from gcml_ray.prediction.predict import ModelFacts, PersonalModel

log = logging.getLogger(__name__)


def find_images(folder: str, card: ModelCard) -> tuple[Case, ...]:
    """The cases of a folder; what cannot be put together is logged and left out.

    Raises:
        DataError: the folder holds no image.
    """
    found = find_cases([Path(folder)], card.config.data, site=card.provenance.site, split=None)
    for problem in found.problems:
        log.error("%s", problem)
    return found.cases


class BundleRunner:
    """What MONAI calls the evaluator of a bundle: predicts every case and writes its label file.

    Args:
        card: the bundle's ``model.json``.
        network: with its weights, on ``device``.
        dataset: the cases.
        output_dir: where label files go.
        device: where forward passes run.
    """

    def __init__(
        self, card: ModelCard, network: nn.Module, dataset: Sequence[Case], output_dir: str, device: torch.device
    ) -> None:
        origin = card.provenance
        dice = "" if origin.validation_dice is None else repr(origin.validation_dice)
        facts = ModelFacts(
            origin.site, origin.round_number, dice, origin.method, origin.fingerprint, origin.data_contract
        )
        self.model = PersonalModel(card.config, [facts], [network], device)
        self.dataset = dataset
        self.output_dir = Path(output_dir)

    def run(self) -> None:
        """Predicts all cases; one that fails does not stop the others.

        Raises:
            DataError: after the last case, where any of them failed.
        """
        problems = []
        for case in self.dataset:
            try:
                paths = self.model.predict_case(case, self.output_dir)
                log.info("%s -> %s", case.name, ", ".join(map(str, paths)))
            except (GcmlError, OSError) as error:
                problems.append(f"{case.name}: {error}")
        if problems:
            raise DataError("; ".join(problems))
