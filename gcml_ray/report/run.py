"""Plots of a run, made from its run folder alone: Dice and losses by round, the gossip graph, the final test."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.prediction.averages import case_dice
from gcml_ray.records import BEFORE_GOSSIP, PERSONALISED, CaseScore, RoundRecord
from gcml_ray.report.axes import (
    empty_figure,
    figure_with_axes,
    finished_rounds,
    names_in_rounds,
    save_figure,
    site_looks,
    span_rounds,
    tidy,
)
from gcml_ray.report.cross_site import plot_cross_site
from gcml_ray.report.gossip import plot_gossip_graph
from gcml_ray.report.teaching import plot_who_taught_whom
from gcml_ray.report.words import MODELS, PHASES, validation_series

__all__ = ["plot_dice_by_round", "plot_gossip_graph", "plot_losses", "plot_test_dice", "write_plots"]

log = logging.getLogger(__name__)

MODEL_COLOURS = {BEFORE_GOSSIP: "0.75", PERSONALISED: "#0072B2"}
PHASE_SHADES = {"warmup": "0.93", "exchange": "1.0", "cooldown": "0.93"}


def write_plots(folder: RunFolder) -> tuple[Path, ...]:
    """Draw every plot that the run has data for into ``plots/``; returns the files.

    Raises:
        DataError: the run has neither a finished round nor a tested case.
    """
    plots: dict[str, Callable[[RunFolder], Figure]] = {
        "dice_by_round.png": plot_dice_by_round,
        "losses.png": plot_losses,
        "gossip_graph.png": plot_gossip_graph,
        "who_taught_whom.png": plot_who_taught_whom,
        "test_dice.png": plot_test_dice,
        "cross_site.png": plot_cross_site,
    }
    written, missing = [], []
    folder.plots.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        try:
            figure = plot(folder)
        except DataError as error:
            missing.append(str(error))
            continue
        save_figure(figure, folder.plots / name, dpi=150)
        written.append(folder.plots / name)
    if not written:
        raise DataError("; ".join(dict.fromkeys(missing)))
    for reason in missing:
        log.info("%s", reason)
    return tuple(written)


# --- by round ----------------------------------------------------------------------------------


def plot_dice_by_round(folder: RunFolder) -> Figure:
    """Validation Dice by round, one line a site; phases shaded, the best round and missed rounds marked.

    Raises:
        DataError: no round is finished, or none was evaluated.
    """
    rounds = finished_rounds(folder)
    sites = names_in_rounds(rounds)
    figure, axes = figure_with_axes(9.0, max(4.6, 1.4 + 0.3 * len(sites)))
    ends: list[tuple[float, str, str]] = []
    for site, (colour, style) in site_looks(sites).items():
        series = validation_series(rounds, site)
        numbers, dice = list(series), list(series.values())
        if not dice:
            continue
        best = int(np.nanargmax(dice)) if np.isfinite(dice).any() else 0
        axes.plot(numbers, dice, color=colour, ls=style, lw=1.6, marker=".", ms=4 if len(dice) < 60 else 0)
        axes.plot(numbers[best], dice[best], marker="*", ms=12, color=colour, mec="white", zorder=5)
        missed = [record.plan.round_number for record in rounds if record.missed(site)]
        axes.plot(missed, np.interp(missed, numbers, dice), "x", color=colour, ms=7, mew=1.8, zorder=6)
        ends.append((dice[-1], f"{site}  {dice[best]:.3f}", colour))
    if not ends:
        raise DataError(f"{folder.path}: no round has a validation score, so there is no Dice to plot")
    _shade_phases(axes, rounds)
    axes.set(xlabel="round", ylabel="validation Dice", ylim=_dice_limits(axes))
    _label_ends(axes, ends)
    marks = [
        Line2D([], [], color="0.3", marker="*", ms=11, ls="none", label="best round (value beside the site)"),
        Line2D([], [], color="0.3", marker="x", ms=7, mew=1.8, ls="none", label="site did not train"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _dice_limits(axes: Axes) -> tuple[float, float]:
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(0.05, (high - low) / 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right of the axes, at the height of their line but never on each other."""
    low, high = axes.get_ylim()
    gap = 0.052 * (high - low)
    places: list[tuple[float, str, str]] = []
    for value, text, colour in sorted(ends):
        place = max(value, places[-1][0] + gap) if places else value
        places.append((place, text, colour))
    overshoot = max(0.0, places[-1][0] - high)
    for place, text, colour in places:
        axes.annotate(text, (1.01, place - overshoot), xycoords=("axes fraction", "data"), va="center", fontsize=9,
                      color=colour, annotation_clip=False)  # fmt: skip


def _shade_phases(axes: Axes, rounds: Sequence[RoundRecord]) -> None:
    """A band and a name above the axes for each phase."""
    for phase, members in itertools.groupby(rounds, key=lambda record: record.plan.phase):
        numbers = [record.plan.round_number for record in members]
        name, shade = PHASES[phase], PHASE_SHADES[phase]
        axes.axvspan(numbers[0] - 0.5, numbers[-1] + 0.5, color=shade, lw=0, zorder=0)
        axes.text(float(np.mean(numbers)), 1.015, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                  fontsize=9, color="0.35")  # fmt: skip
    span_rounds(axes, rounds)


def plot_losses(folder: RunFolder) -> Figure:
    """Each part of the loss by round, a panel a part, one line a site.

    Raises:
        DataError: no round is finished, or no site ever trained.
    """
    rounds = finished_rounds(folder)
    reports = [report for record in rounds for report in record.trained]
    parts = list(dict.fromkeys(part for report in reports for part in report.losses))
    if not parts:
        raise DataError(f"{folder.path}: no site ever trained, so there is no loss to plot")
    num_columns = min(2, len(parts))
    num_rows = -(-len(parts) // num_columns)
    figure = empty_figure(4.2 * num_columns + 0.8, 2.5 * num_rows + 0.7)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True)
    looks = site_looks(names_in_rounds(rounds))
    for axes, part in itertools.zip_longest(grid.flat, parts):
        if part is None:
            axes.set_axis_off()
            continue
        tidy(axes)
        for site, (colour, style) in looks.items():
            points = [(r.round_number, r.losses[part]) for r in reports if r.site == site and part in r.losses]
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=colour,
                ls=style,
                lw=1.2,
                marker=".",
                ms=3 if len(rounds) > 3 else 9,
            )
        axes.set_title(part.replace("_", " "), fontsize=10)
        axes.set_ylabel("loss")
        axes.tick_params(labelbottom=True)
        span_rounds(axes, rounds)
        axes.set_xlabel("round")
    handles = [Line2D([], [], color=colour, ls=style, label=site) for site, (colour, style) in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


# --- final test --------------------------------------------------------------------------------


def plot_test_dice(folder: RunFolder) -> Figure:
    """Test Dice by site: the personalised model beside the site's own model before gossip, with every case.

    Raises:
        DataError: ``cases.csv`` holds no test case of either model.
    """
    scores = [score for score in folder.cases() if score.split == "test" and score.model in MODEL_COLOURS]
    sites = list(dict.fromkeys(score.site for score in scores))
    models = [model for model in MODEL_COLOURS if any(score.model == model for score in scores)]
    if not scores:
        raise DataError(
            f"{folder.path}: cases.csv holds no test case of {' or '.join(MODEL_COLOURS)}: the final test has not run"
        )
    figure, axes = figure_with_axes(max(5.0, 1.3 * len(sites) + 1.5), 4.4)
    width = 0.8 / len(models)
    for position, site in enumerate(sites):
        places = [position + (index - (len(models) - 1) / 2) * width for index in range(len(models))]
        by_model = [case_dice(scores, site, model) for model in models]
        for model, place, dice in zip(models, places, by_model, strict=True):
            _draw_bar(axes, place, 0.92 * width, dice, colour=MODEL_COLOURS[model])
        if len(models) == 2:
            for case in by_model[0].keys() & by_model[1].keys():
                axes.plot(places, [by_model[0][case], by_model[1][case]], color="0.2", lw=0.5, alpha=0.5, zorder=3)
    axes.set_xticks(range(len(sites)), [_site_caption(scores, site, models) for site in sites])
    axes.set(ylabel="test Dice, mean over classes", ylim=(0, 1.06), xlim=(-0.6, len(sites) - 0.4))
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    handles: list[Line2D] = [
        Line2D([], [], color=MODEL_COLOURS[model], marker="s", ms=9, ls="none", label=MODELS[model]) for model in models
    ]
    handles.append(Line2D([], [], color="0.2", marker=".", ls="none", label="one case"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_bar(axes: Axes, place: float, width: float, dice: dict[str, float], *, colour: str) -> None:
    if not dice:
        return
    values = list(dice.values())
    mean = float(np.mean(values))
    axes.bar(place, mean, width, color=colour, alpha=0.85, zorder=2)
    axes.plot([place] * len(values), values, ".", color="0.1", ms=5, alpha=0.7, zorder=4)


def _site_caption(scores: Sequence[CaseScore], site: str, models: Sequence[str]) -> str:
    by_model = [case_dice(scores, site, model) for model in models]
    num_cases = max(len(dice) for dice in by_model)
    means = " \u2192 ".join(f"{np.mean(list(dice.values())):.3f}" if dice else "none" for dice in by_model)
    return f"{site}\n{means}\n{num_cases} case{'s' * (num_cases != 1)}"
