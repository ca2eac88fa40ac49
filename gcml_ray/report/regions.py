"""An example of what mutual learning compares: Omega, R+ and R- of two sites' models on one validation slice.

The regions are those of :func:`gcml_ray.losses.mutual.mutual_divergences` for the variant ``contrast``, with the site's
personalised model as the learner and a peer's as the peer. Test cases are never used here.

Legend: C image channels, R regions or 1, *spatial = D H W or H W on the network's grid, H W of the shown slice.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from gcml_ray.config import Config, GcmlMethod
from gcml_ray.data.loading import Sample, load_sample
from gcml_ray.data.pooling import cases_to_train_on
from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import MODEL_FILE, RunFolder
from gcml_ray.prediction.inference import logits_by, predict_labels
from gcml_ray.prediction.load import load_model
from gcml_ray.records import RoundRecord
from gcml_ray.report.axes import empty_figure, save_figure
from gcml_ray.report.slices import (
    PREDICTION,
    REFERENCE,
    Mask,
    axial,
    clearest_channel,
    contour,
    crop,
    dark_legend,
    outline_handle,
    picture,
)

MAX_CASES = 3  # looked at before one without any structure is shown
PULL, PUSH = "#0072B2", "#D55E00"
PULL_HATCH, PUSH_HATCH = "//", "xx"


@dataclass(frozen=True)
class RegionsExample:
    """A PNG file and what it shows: in one line, and in words for those who cannot see it."""

    title: str
    words: str
    png: bytes


@dataclass(frozen=True, eq=False)
class _Compared:
    """One case: (C, *spatial) image, (*spatial) masks; ``truths`` and the others hold a mask a class that occurs."""

    image: NDArray[np.float32]
    truths: Mask
    learner: Mask
    peer: Mask
    pull: Mask
    push: Mask


def draw_regions(run_folder: Path, config: Config, rounds: Sequence[RoundRecord]) -> RegionsExample:
    """Draws a validation case of a site that learned from a peer, in the slice where the two differ most.

    Args:
        run_folder: with the personalised models of both sites.
        config: of the run.
        rounds: tell who learned from whom; the last such pair whose models are there is shown.

    Raises:
        DataError: no such pair has its models here, or the site's validation cases cannot be read.
        CheckpointError: a model cannot be read.
        ConfigError: a model cannot be built.
    """
    site, peer = _pair(RunFolder(run_folder), rounds)
    sample = _example_case(config, site)
    labels = [_prediction(run_folder, name, config, sample.image) for name in (site, peer)]
    channel = clearest_channel(sample.image.numpy(), sample.label[0].numpy() > 0)
    if channel is not None:
        sample = replace(sample, image=sample.image[channel : channel + 1])
    compared = _slice(_compare(sample, *labels, sigmoid=config.data.is_sigmoid))
    shown = "" if channel is None else f" Image: {config.data.channels[channel]}."
    title = _title(compared, config, sample.case, site=site, peer=peer) + shown
    words = f"Four pictures of one slice: the expert's outline, {site}'s, {peer}'s, and the two regions. {title}"
    return RegionsExample(title, words, _draw(compared, site, peer))


def _title(compared: _Compared, config: Config, case: str, *, site: str, peer: str) -> str:
    """What the picture shows, with the share of R+ in its slice."""
    num_pull, num_push = int(compared.pull.sum()), int(compared.push.sum())
    share = 100 * num_pull / max(1, num_pull + num_push)
    structure = f" ({config.data.foreground_names[0]})" if config.data.is_sigmoid else ""
    title = (
        f"Validation case {case} of {site}{structure}: where {peer}'s model is right, {site}'s is pulled towards it "
        f"({share:.0f} % of Omega in this slice); where it is wrong, {site}'s is pushed away."
    )
    if isinstance(config.method, GcmlMethod) and config.method.dcml.variant in ("contrast", "contrast_hinge"):
        return title
    return f"{title} The method of this run weighs these regions in its own way."


# --- what is shown -----------------------------------------------------------------------------


def _pair(folder: RunFolder, rounds: Sequence[RoundRecord]) -> tuple[str, str]:
    """The site and its peer."""
    pairs = [
        (report.site, peer)
        for record in reversed(rounds)
        for report in record.trained
        if report.regions
        for peer in report.peers
    ]
    for site, peer in dict.fromkeys(pairs):
        if all((folder.checkpoints(name) / MODEL_FILE).is_file() for name in (site, peer)):
            return site, peer
    raise DataError(
        f"{folder.path / 'checkpoints'} does not hold the {MODEL_FILE} of two sites that learned from each other; "
        "they are written when the run is finished, on each site's own disk"
    )


def _example_case(config: Config, site: str) -> Sample:
    """The first validation case of a site that shows a structure; the first one where none of a few does."""
    cases = sorted(cases_to_train_on(config, site), key=lambda case: case.name)
    validation = [case for case in cases if case.split == "validation"]
    if not validation:
        raise DataError(f"site {site} has no validation case")
    first = None
    for case in validation[:MAX_CASES]:
        sample = load_sample(case, config.data)
        first = first or sample
        if bool((sample.label[0] > 0).any()):
            return sample
    assert first is not None
    return first


def _prediction(run_folder: Path, site: str, config: Config, image: Tensor) -> Tensor:
    """Labels of a site's model, (R, *spatial) or (1, *spatial), on the grid on which it was trained."""
    model = load_model(run_folder, site)
    logits = logits_by(config, model.modules[0], image, torch.device("cpu"))  # where AMP has no effect
    return predict_labels(logits, sigmoid=config.data.is_sigmoid)


def _compare(sample: Sample, learner: Tensor, peer: Tensor, *, sigmoid: bool) -> _Compared:
    """Omega split into R+ and R-; of nested regions the first."""
    truth, own, other = (part[0].long() for part in (sample.label, learner, peer))
    omega = (truth > 0) | (own > 0) | (other > 0)
    is_right = other == truth
    classes = (
        [1] if sigmoid else sorted(int(value) for value in torch.unique(torch.stack((truth, own, other))) if value)
    )
    truths, owns, others = (
        np.stack([(part == value).numpy() for value in classes or [1]]) for part in (truth, own, other)
    )
    pull, push = (omega & is_right).numpy(), (omega & ~is_right).numpy()
    return _Compared(sample.image.numpy(), truths, owns, others, pull, push)


def _slice(volume: _Compared) -> _Compared:
    """Of a volume the slice where both regions are largest, cut to them; of a picture the same window."""
    pull, push = volume.pull[None], volume.push[None]
    parts: list[NDArray[Any]] = [volume.image, volume.truths, volume.learner, volume.peer, pull, push]
    if volume.image.ndim == 4:
        areas = np.stack([part[0].sum(axis=(0, 1)) for part in (pull, push)])
        both = areas.min(axis=0)
        index = int(both.argmax() if both.any() else areas.sum(axis=0).argmax())
        parts = [axial(part, index) for part in parts]
    rows, columns = crop(parts[4][0] | parts[5][0])
    image, truths, learner, peer, pull, push = [part[:, rows, columns] for part in parts]
    return _Compared(image, truths, learner, peer, pull[0], push[0])


# --- drawing -----------------------------------------------------------------------------------


def _draw(compared: _Compared, site: str, peer: str) -> bytes:
    """Four panels: expert, learner, peer, regions."""
    figure = empty_figure(8.0, 8.9)
    panels: list[Axes] = list(figure.subplots(2, 2).flat)
    titles = ("the expert's outline", f"{site}'s model", f"{peer}'s model", "R+ and R\u2212")
    shown = picture(compared.image)
    for axes, title in zip(panels, titles, strict=True):
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=11, parse_math=False)
        axes.set_axis_off()
    for axes, masks in zip(panels, (None, compared.learner, compared.peer), strict=False):
        for truth in compared.truths:
            contour(axes, truth, REFERENCE)
        for mask in masks if masks is not None else ():
            contour(axes, mask, PREDICTION)
    _fill(panels[3], compared.pull, PULL, PULL_HATCH)
    _fill(panels[3], compared.push, PUSH, PUSH_HATCH)
    handles = [
        outline_handle("expert", REFERENCE),
        outline_handle("model", PREDICTION),
        Patch(facecolor=PULL, edgecolor="white", hatch=PULL_HATCH, label="R+: peer right, pull"),
        Patch(facecolor=PUSH, edgecolor="white", hatch=PUSH_HATCH, label="R\u2212: peer wrong, push"),
    ]
    dark_legend(figure, handles, fontsize=11)
    buffer = io.BytesIO()
    save_figure(figure, buffer, dpi=110)
    return buffer.getvalue()


def _fill(axes: Axes, mask: Mask, colour: str, hatch: str) -> None:
    """A region in half-transparent colour with a hatch, exact to the voxel."""
    if not mask.any():
        return
    shown = np.ma.masked_where(~mask, np.ones(mask.shape))
    axes.imshow(shown, cmap=ListedColormap([to_rgba(colour, 0.55)]), interpolation="nearest")
    padded = np.pad(mask.astype(float), 1)
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    hatched = axes.contourf(columns, rows, padded, levels=[0.5, 1.5], colors="none", hatches=[hatch])
    hatched.set(edgecolor="white", linewidth=1.0)
    axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))
