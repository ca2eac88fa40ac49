"""A personalised model taken to new patients: from image files or arrays to labels on the image's own grid.

Legend: C classes (softmax) or regions (sigmoid), K foreground classes or regions, *grid = what the network
sees, *source = the grid of the image's file (D, H, W or H, W).

What is averaged or resampled is probabilities, decided at the end on the file's grid. Where nothing is averaged
or resampled the decision is taken from the logits, exactly as in the run's own evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from gcml_ray.config import Config
from gcml_ray.data.datalist import Case, name_from_file
from gcml_ray.data.loading import PreparedImage, prepare_image, read_image
from gcml_ray.data.reading import Volume, affine_problem
from gcml_ray.data.restoring import is_resampled, restore
from gcml_ray.errors import DataError
from gcml_ray.prediction.inference import logits_by, mean_of, to_probabilities
from gcml_ray.prediction.label_files import Labels, label_map, output_paths, write_labels, write_masks

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
