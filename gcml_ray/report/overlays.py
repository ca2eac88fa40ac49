"""Reference and prediction drawn as contours on an image.

Legend: C image channels, R foreground regions, *spatial is D H W (volumes) or H W (2D images).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gcml_ray.errors import DataError
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
    shrunk,
    stride,
)

MAX_PANELS = 6


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
        image, references, predictions = (axial(part, index) for part in (image, references, predictions))
    window = crop(np.any(references | predictions, axis=0))
    step = stride(window, image.shape[1:])
    references, predictions = (shrunk(masks[:, *window], step) for masks in (references, predictions))
    shown = [i for i in range(len(names)) if (references[i] | predictions[i]).any()][:MAX_PANELS] or [0]
    figure, panels = _panels(len(shown), title=title)
    shown_image = picture(image, window, step)
    for axes, i in zip(panels, shown, strict=True):
        axes.imshow(shown_image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        contour(axes, references[i], REFERENCE)
        contour(axes, predictions[i], PREDICTION)
        axes.set_title(names[i], fontsize=9, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=150)


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


def _panels(num_panels: int, *, title: str) -> tuple[Figure, list[Axes]]:
    num_columns = min(3, num_panels)
    num_rows = -(-num_panels // num_columns)
    side = 5.5 if num_panels == 1 else 3.4
    figure = empty_figure(side * num_columns, side * num_rows + 0.9)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for axes in panels:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10, parse_math=False)
    handles = [
        outline_handle("reference", REFERENCE),
        outline_handle("prediction", PREDICTION),
    ]
    dark_legend(figure, handles, fontsize=9)
    return figure, panels[:num_panels]
