"""Slices of images with outlines on them: which slice and channel to show, and how.

Legend: C image channels, *spatial is D H W (volumes) or H W (2D images).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Window = tuple[slice, slice]  # rows and columns of a picture
WHOLE: Window = (slice(None), slice(None))
Look = tuple[str, str]  # of an outline: colour and line style
REFERENCE: Look = ("#56B4E9", "solid")  # colours of Okabe and Ito, told apart by the colour-blind
PREDICTION: Look = ("#F0E442", "dashed")
MOST_PIXELS = 1200  # a side, of a drawn slice
MIN_SIDE, MARGIN = 48, 0.35  # of the crop: pixels, and share of the structure's extent


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


def axial(stack: NDArray[Any], index: int) -> NDArray[Any]:
    """(K, X, Y, Z) to (K, rows, columns), both axes turned round: RAS becomes the radiological view."""
    return np.flip(stack[..., index], axis=(1, 2)).transpose(0, 2, 1)


def crop(mask: Mask) -> Window:
    """A window around the mask with a margin, at least ``MIN_SIDE`` pixels; the whole image for an empty mask."""
    if not mask.any():
        return WHOLE
    windows = []
    for axis, size in enumerate(mask.shape):
        hits = np.flatnonzero(mask.any(axis=1 - axis))
        extent = hits[-1] + 1 - hits[0]
        half = max(MIN_SIDE, extent * (1 + 2 * MARGIN)) / 2
        centre = (hits[0] + hits[-1] + 1) / 2
        windows.append(slice(max(0, round(centre - half)), min(size, round(centre + half))))
    return windows[0], windows[1]


def stride(window: Window, shape: Sequence[int]) -> int:
    """Every how many pixels of a window of (H, W) are drawn: more than ``MOST_PIXELS`` a side no figure can show."""
    sides = [len(range(*part.indices(size))) for part, size in zip(window, shape, strict=True)]
    return -(-max(sides) // MOST_PIXELS)


def shrunk(masks: Mask, step: int) -> Mask:
    """(K, H, W) masks, a pixel for each ``step`` x ``step`` square: true where any of it is, so no vessel is lost."""
    if step == 1:
        return masks
    padding = [(0, 0), *((0, -size % step) for size in masks.shape[1:])]
    whole = np.pad(masks, padding)
    rows, columns = (size // step for size in whole.shape[1:])
    squares: Mask = np.asarray(whole.reshape(len(masks), rows, step, columns, step).any(axis=(2, 4)))
    return squares


def picture(image: NDArray[Any], window: Window = WHOLE, step: int = 1) -> NDArray[np.float64]:
    """A window of (C, H, W) as (H, W, 3) or (H, W) between 0 and 1, the image's darkest and brightest percent cut off.

    Args:
        image: in colour where it has three channels.
        window: rows and columns to show.
        step: of them every how many.
    """
    values = np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image[0]
    every = max(1, min(values.shape[:2]) // MOST_PIXELS)  # a sample tells where the percents lie
    sample = np.nan_to_num(values[::every, ::every].astype(np.float64))
    low, high = np.percentile(sample, (1, 99), axis=(0, 1), keepdims=True)
    shown = np.nan_to_num(values[window][::step, ::step].astype(np.float64))
    scaled: NDArray[np.float64] = (shown - low) / np.maximum(high - low, 1e-12)
    return scaled.clip(0, 1)


def contour(axes: Axes, mask: Mask, look: Look) -> None:
    """The outline of (H, W) ``mask``, nothing where it is empty."""
    if not mask.any():
        return
    colour, style = look
    padded = np.pad(mask.astype(np.float64), 1)  # closes contours at the crop's border
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    lines = axes.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1.4, linestyles=[style])
    lines.set_path_effects([effects.Stroke(linewidth=2.4, foreground="black", alpha=0.55), effects.Normal()])
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def outline_handle(label: str, look: Look) -> Line2D:
    """What stands for an outline in a legend."""
    colour, style = look
    return Line2D([], [], color=colour, lw=2, ls=style, label=label)


def dark_legend(figure: Figure, handles: Sequence[Artist], *, fontsize: int) -> None:
    """Below the panels, white on grey, as the bright colours of outlines need it."""
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=fontsize, handlelength=3)
    legend.get_frame().set(facecolor="0.25", edgecolor="none")
    for text in legend.get_texts():
        text.set_color("white")
