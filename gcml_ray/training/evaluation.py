"""Scoring a site's models on its own cases: a quick mean Dice for validation, every metric for the test."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gcml_ray.config import Config
from gcml_ray.data.loading import Sample
from gcml_ray.data.pooling import origin
from gcml_ray.data.site_data import SiteData
from gcml_ray.model.learner import Learner
from gcml_ray.prediction.averages import mean
from gcml_ray.prediction.inference import logits_by, predict_labels
from gcml_ray.prediction.metrics import dice_per_class, score_case
from gcml_ray.records import CaseScore, EvaluationReport, Split
from gcml_ray.training.ensemble import Ensemble

log = logging.getLogger(__name__)

Scored = Learner | Ensemble
Box = tuple[slice, ...]  # one slice an axis


@dataclass(frozen=True)
class Patch:
    """A part of a validation case: image (C, *spatial), label (1 or R, *spatial), which of K classes it shows (K,)."""

    image: Tensor
    label: Tensor
    present: Tensor


def with_average(model: Scored) -> AbstractContextManager[None]:
    """Context in which the model has its averaged weights; an ensemble's members have them already."""
    return nullcontext() if isinstance(model, Ensemble) else model.model.averaged()


def middle_of(label: Tensor, size: Sequence[int]) -> Box:
    """A box around a labelled voxel, the middle one in their order; around the image's middle where none is labelled.

    Args:
        label: (1 or R, *spatial), background 0.
        size: voxels of the box, one number an axis; less where the image is smaller.
    """
    spatial = label.shape[1:]
    voxels = (label > 0).any(0).nonzero()
    centre = voxels[len(voxels) // 2].tolist() if len(voxels) else [length // 2 for length in spatial]
    sides = zip(centre, size, spatial, strict=True)
    starts = [max(0, min(middle - side // 2, length - side)) for middle, side, length in sides]
    return tuple(slice(start, start + side) for start, side in zip(starts, size, strict=True))


class Evaluator:
    """Predicts and scores one site's cases.

    Args:
        config: the federation's configuration.
        site: this site's name.
        data: its cases, loaded.
        device: where forward passes run.
    """

    def __init__(self, config: Config, site: str, data: SiteData, device: torch.device) -> None:
        self.config = config
        self.site = site
        self.data = data
        self.device = device
        self._patches_of: dict[int, list[Patch]] = {}

    def predict(self, model: Scored, image: Tensor) -> Tensor:
        """Hard prediction of one preprocessed image (C, *spatial), on the CPU; see ``predict_labels``."""
        sigmoid = self.config.data.is_sigmoid
        if isinstance(model, Ensemble):
            scores = model.scores(lambda learner: self._logits(learner, image), sigmoid=sigmoid)
        else:
            scores = self._logits(model, image)
        return predict_labels(scores, sigmoid=sigmoid).cpu()

    def _logits(self, learner: Learner, image: Tensor, *, window_size: Sequence[int] | None = None) -> Tensor:
        """Logits (C, *spatial) of one model."""
        return logits_by(self.config, learner.model.module, image, self.device, window_size=window_size)

    def patch_dice(self, learner: Learner, num_cases: int, *, enough: float = math.inf) -> float:
        """Mean Dice over one patch of each of the first validation cases: :meth:`validation_dice`, rough and cheap.

        Classes that a patch does not show say nothing and are left out; 0 where no patch shows any.

        Args:
            learner: holds the model; its average is scored where it has one.
            num_cases: so many of the cases at most.
            enough: stops as soon as the mean over all patches is sure to reach this, even if the rest scored 0.
        """
        patches = self._patches(num_cases)
        found: list[Tensor] = []
        with with_average(learner):
            for patch in patches:
                logits = self._logits(learner, patch.image, window_size=self.config.data.patch_size)
                predicted = predict_labels(logits, sigmoid=self.config.data.is_sigmoid).cpu()
                found.append(self._dice(predicted, patch.label)[patch.present].mean())
                if float(torch.stack(found).sum()) >= enough * len(patches):
                    break
        return float(torch.stack(found).mean()) if found else 0.0

    def _patches(self, num_cases: int) -> list[Patch]:
        """A patch of each of the first validation cases, of those that show a class; views, no copies."""
        if num_cases not in self._patches_of:
            patches = []
            for sample in self.data.split("validation")[:num_cases]:
                box = middle_of(sample.label, self.config.data.patch_size)
                label = sample.label[:, *box]
                patches.append(Patch(sample.image[:, *box], label, self._classes_in(label)))
            self._patches_of[num_cases] = [patch for patch in patches if patch.present.any()]
        return self._patches_of[num_cases]

    def validation_dice(self, learner: Scored) -> float:
        """Mean Dice over the validation cases and foreground classes; of pooled cases the mean over their sites.

        Args:
            learner: holds the model; its average is scored where it has one.
        """
        by_site: dict[str, list[Tensor]] = {}
        with with_average(learner):
            for sample in self.data.split("validation"):
                dice = self._dice(self.predict(learner, sample.image), sample.label)
                by_site.setdefault(origin(self.site, sample.case)[0], []).append(dice)
        return float(torch.stack([torch.stack(scores).mean() for scores in by_site.values()]).mean())

    def _classes_in(self, label: Tensor) -> Tensor:
        """Which of the K foreground classes a label (1 or R, *spatial) shows, (K,) booleans."""
        if self.config.data.is_sigmoid:
            return (label > 0).flatten(1).any(1)
        return torch.stack([(label == index + 1).any() for index in range(len(self.config.data.foreground_names))])

    def _dice(self, predicted: Tensor, label: Tensor) -> Tensor:
        """Dice of each foreground class; both (1 or R, *spatial)."""
        data = self.config.data
        return dice_per_class(predicted, label, num_foreground=len(data.foreground_names), sigmoid=data.is_sigmoid)

    def evaluate(
        self,
        learner: Scored,
        *,
        split: Split,
        model: str,
        round_number: int,
        on_progress: Callable[[str, int, int], None],
    ) -> EvaluationReport:
        """Scores one model on one split, case by case.

        Args:
            learner: holds the model, whose average is scored where it has one; or several that predict as one.
            split: which of the site's cases.
            model: the model's name in the tables.
            round_number: the round it comes from.
            on_progress: told (stage, case, number of cases).
        """
        began = time.perf_counter()
        samples = self.data.split(split)
        scores: list[CaseScore] = []
        with with_average(learner):
            for index, sample in enumerate(samples):
                on_progress(f"evaluate {split}", index, len(samples))
                scores.extend(self._score(learner, sample, split=split, model=model))
        return EvaluationReport(self.site, split, model, round_number, tuple(scores), time.perf_counter() - began)

    def _score(self, learner: Scored, sample: Sample, *, split: Split, model: str) -> tuple[CaseScore, ...]:
        """All scores of one case, a record a foreground class; a pooled case is scored for the site it is of."""
        site, case = origin(self.site, sample.case)
        return score_case(
            self.predict(learner, sample.image),
            sample.label,
            spacing=sample.spacing,
            tolerance=self.config.evaluation.surface_tolerance,
            class_names=self.config.data.foreground_names,
            sigmoid=self.config.data.is_sigmoid,
            site=site,
            case=case,
            split=split,
            model=model,
        )

    def draw(self, learner: Learner, scores: Sequence[CaseScore], folder: Path) -> None:
        """Overlays of the worst and the best test cases, on this site's own disk, as far as it takes them.

        Args:
            learner: holds the model that was scored.
            scores: its scores on the test cases.
            folder: where the pictures go.
        """
        from gcml_ray.report.overlays import draw_overlay  # noqa: PLC0415 - matplotlib only when something is drawn

        by_case: dict[tuple[str, str], list[float]] = {}
        for score in scores:
            by_case.setdefault((score.site, score.case), []).append(score.dice)
        dice = {case: mean(values) for case, values in by_case.items()}
        order = sorted(dice, key=lambda case: (dice[case], case))
        wanted = self.config.output.num_overlays
        chosen = dict.fromkeys(order[: (wanted + 1) // 2], "worst")
        chosen |= {case: "best" for case in order[::-1][: wanted // 2] if case not in chosen}
        for sample in self.data.split("test"):
            site, name = known = origin(self.site, sample.case)
            if known not in chosen:
                continue
            try:
                draw_overlay(
                    sample.image.numpy(),
                    sample.label.numpy(),
                    self.predict(learner, sample.image).numpy(),
                    class_names=self.config.data.foreground_names,
                    channel_names=self.config.data.channels,
                    title=f"{site}  {name}  Dice {dice[known]:.3f}",
                    path=folder / f"{chosen[known]}_{sample.case.replace(':', '_')}.png",
                )
            except OSError as error:  # scores are worth more than pictures
                log.warning("site %s: the overlay of case %s is not written (%s)", site, name, error.strerror or error)
