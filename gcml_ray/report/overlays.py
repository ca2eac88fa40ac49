"""Reference and prediction drawn as contours on an image.

Legend: C image channels, R foreground regions, *spatial is D H W (volumes) or H W (2D images).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from gcml_ray.errors import DataError
from gcml_ray.report.axes import save_figure

Mask = NDArray[np.bool_]
REFERENCE_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#F0E442"  # of Okabe and Ito, told apart by the colour-blind
MAX_PANELS = 6
MIN_SIDE, MARGIN = 48, 0.35  # of the crop: pixels, and share of the structure's extent


def draw_overlay(
    image: NDArray[Any],
    label: NDArray[Any],
    prediction: NDArray[Any],
    *,
    title: str,
    path: Path,
    class_names: Sequence[str] = (),
    channel_names: Sequence[str] = (),
) -> None:
    """Draw contours of reference and prediction around the structure, one panel a class, to a PNG file.

    A volume is shown in the slice of its last axis with the largest reference area, turned so that in
    an RAS volume anterior is up and the patient's right is on the left. A 2D image of three channels is
    shown in colour, anything else by the channel in which the structure is clearest.

    Args:
        image: (C, *spatial).
        label: (1, *spatial) class indices with 0 as background, or (R, *spatial) of 0 and 1.
        prediction: like ``label``.
        title: shown above the panels.
        path: where the PNG goes; its folder is made.
        class_names: of the foreground classes in order, or of the R regions.
        channel_names: of the C channels; the one that is shown is named in the title.

    Raises:
        DataError: the shapes do not fit.
    """
    if image.ndim not in (3, 4) or label.shape != prediction.shape or label.shape[1:] != image.shape[1:]:
        raise DataError(
            f"overlay {path.name}: image {image.shape}, label {label.shape} and prediction {prediction.shape} do not "
            "fit; expected (C, *spatial) and twice (1, *spatial) or (R, *spatial) with 2 or 3 spatial axes"
        )
    channel = clearest_channel(image, label[0] > 0)
    if channel is not None:
        image = image[channel : channel + 1]
        title += f"  {channel_names[channel]}" if len(channel_names) > 1 else ""
    names, references, predictions = _class_masks(label, prediction, class_names)
    if image.ndim == 4:
        index = _slice_index(references, predictions)
        image, references, predictions = (_axial(part, index) for part in (image, references, predictions))
    rows, columns = _crop(np.any(references | predictions, axis=0))
    shown = [i for i in range(len(names)) if (references[i] | predictions[i]).any()][:MAX_PANELS] or [0]
    figure, panels = _panels(len(shown), title=title)
    picture = _picture(image)[rows, columns]
    for axes, i in zip(panels, shown, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        _contour(axes, references[i][rows, columns], REFERENCE_COLOUR, "solid")
        _contour(axes, predictions[i][rows, columns], PREDICTION_COLOUR, "dashed")
        axes.set_title(names[i], fontsize=9, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=150)


def clearest_channel(image: NDArray[Any], structure: Mask) -> int | None:
    """The channel in which a structure differs most from the rest; None for a colour picture, shown as it is.

    Args:
        image: (C, *spatial).
        structure: (*spatial).
    """
    if image.ndim == 3 and len(image) == 3:
        return None
    if not structure.any() or structure.all():
        return 0
    spread = np.maximum([channel.std() for channel in image], 1e-6)
    differences = [channel[structure].mean() - channel[~structure].mean() for channel in image]
    return int((np.abs(differences) / spread).argmax())


def _class_masks(
    label: NDArray[Any], prediction: NDArray[Any], class_names: Sequence[str]
) -> tuple[list[str], Mask, Mask]:
    """Names, and (R, *spatial) masks of reference and prediction."""
    if label.shape[0] > 1:
        references, predictions = label > 0, prediction > 0
    else:
        num_classes = len(class_names) or max(1, int(label.max()), int(prediction.max()))
        values = np.arange(1, num_classes + 1).reshape(-1, *[1] * (label.ndim - 1))
        references, predictions = label == values, prediction == values
    names = [class_names[i] if i < len(class_names) else f"class {i + 1}" for i in range(len(references))]
    return names, references, predictions


def _slice_index(references: Mask, predictions: Mask) -> int:
    """The slice of the last axis with most reference; without any, most prediction; else the middle one."""
    for masks in (references, predictions):
        areas = masks.any(axis=0).sum(axis=(0, 1))
        if areas.any():
            return int(areas.argmax())
    return int(references.shape[-1] // 2)


def _axial(stack: NDArray[Any], index: int) -> NDArray[Any]:
    """(K, X, Y, Z) to (K, rows, columns), both axes turned round: RAS becomes the radiological view."""
    return np.flip(stack[..., index], axis=(1, 2)).transpose(0, 2, 1)


def _crop(mask: Mask) -> tuple[slice, slice]:
    """A window around the mask with a margin, at least ``MIN_SIDE`` pixels; the whole image for an empty mask."""
    if not mask.any():
        return slice(None), slice(None)
    windows = []
    for axis, size in enumerate(mask.shape):
        hits = np.flatnonzero(mask.any(axis=1 - axis))
        extent = hits[-1] + 1 - hits[0]
        half = max(MIN_SIDE, extent * (1 + 2 * MARGIN)) / 2
        centre = (hits[0] + hits[-1] + 1) / 2
        windows.append(slice(max(0, round(centre - half)), min(size, round(centre + half))))
    return windows[0], windows[1]


def _picture(image: NDArray[Any]) -> NDArray[np.float64]:
    """(C, H, W) to (H, W, 3) or (H, W) between 0 and 1, the darkest and brightest percent cut off."""
    picture = np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image[0]
    picture = np.nan_to_num(picture.astype(np.float64))
    low, high = np.percentile(picture, (1, 99), axis=(0, 1), keepdims=True)
    scaled: NDArray[np.float64] = (picture - low) / np.maximum(high - low, 1e-12)
    return scaled.clip(0, 1)


def _contour(axes: Axes, mask: Mask, colour: str, style: str) -> None:
    if not mask.any():
        return
    padded = np.pad(mask.astype(np.float64), 1)  # closes contours at the crop's border
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    lines = axes.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1.4, linestyles=[style])
    lines.set_path_effects([effects.Stroke(linewidth=2.4, foreground="black", alpha=0.55), effects.Normal()])
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def _panels(num_panels: int, *, title: str) -> tuple[Figure, list[Axes]]:
    num_columns = min(3, num_panels)
    num_rows = -(-num_panels // num_columns)
    side = 5.5 if num_panels == 1 else 3.4
    figure = Figure(figsize=(side * num_columns, side * num_rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for axes in panels:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10, parse_math=False)
    handles = [
        Line2D([], [], color=REFERENCE_COLOUR, lw=2, label="reference"),
        Line2D([], [], color=PREDICTION_COLOUR, lw=2, ls="dashed", label="prediction"),
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, handlelength=3)
    legend.get_frame().set(facecolor="0.25", edgecolor="none")
    for text in legend.get_texts():
        text.set_color("white")
    return figure, panels[:num_panels]
