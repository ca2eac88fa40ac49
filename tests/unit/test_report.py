from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from numpy.typing import NDArray
from PIL import Image

from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import CaseScore, SiteFailure
from gcml_ray.report.overlays import draw_overlay
from gcml_ray.report.run import plot_dice_by_round, plot_gossip_graph, plot_losses, plot_test_dice, write_plots
from gcml_ray.report.slices import WHOLE, clearest_channel, picture, shrunk, stride
from tests.made_up_run import made_up_run

ALL = ["dice_by_round.png", "losses.png", "gossip_graph.png", "test_dice.png"]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def is_drawn(path: Path) -> bool:
    return float(np.asarray(Image.open(path).convert("L"), dtype=float).var()) > 1


# --- which plots are made ----------------------------------------------------------------------


def test_all_plots_are_written_and_not_blank(tmp_path: Path) -> None:
    paths = write_plots(made_up_run(tmp_path / "run", ("CS", "DU", "hosp-1.a_b"), rounds=8))
    assert [path.name for path in paths] == ALL
    assert all(path.parent == tmp_path / "run" / "plots" and is_drawn(path) for path in paths)


@pytest.mark.parametrize(
    ("num_sites", "rounds", "exchange"),
    [(1, 4, True), (12, 4, True), (3, 1, True), (2, 4, False)],
    ids=["one site", "twelve sites", "one round", "no pushes"],
)
def test_extreme_federations_have_all_plots(tmp_path: Path, num_sites: int, rounds: int, exchange: bool) -> None:
    sites = tuple(f"site{number}" for number in range(num_sites))
    paths = write_plots(made_up_run(tmp_path / "run", sites, rounds=rounds, exchange=exchange))
    assert [path.name for path in paths] == ALL


def test_run_without_evaluation_has_the_other_plots(tmp_path: Path) -> None:
    paths = write_plots(made_up_run(tmp_path / "run", ("CS", "DU"), rounds=4, evaluate=False))
    assert [path.name for path in paths] == ALL[1:]


def test_folder_without_rounds_and_cases_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no round is finished yet.*; .*the final test has not run"):
        write_plots(RunFolder(tmp_path))


# --- what they show ----------------------------------------------------------------------------


def test_dice_lines_are_the_records_numbers(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", ("CS",), rounds=5)
    axes = plot_dice_by_round(folder).axes[0]
    expected = {record.plan.round_number: record.trained[0].validation_dice for record in folder.rounds()}
    x, y = axes.lines[0].get_data()
    assert dict(zip(x, y, strict=True)) == expected


def test_a_cross_marks_rounds_in_which_a_site_did_not_train_not_a_push_that_failed(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", ("CS", "DU"), rounds=4)
    records = list(folder.rounds())
    push, restarting = SiteFailure("CS", 2, "push", "late", "no answer"), {"CS": "restarting"}
    records[1] = replace(records[1], failures=(push,))
    without = tuple(report for report in records[2].trained if report.site != "CS")
    plan = replace(records[2].plan, sites=("DU",))
    records[2] = replace(records[2], plan=plan, trained=without, failures=(), left_out=restarting)
    folder.truncate_after(0)
    for record in records:
        folder.append_round(record)
    crosses = [line.get_xdata() for line in plot_dice_by_round(folder).axes[0].lines if line.get_marker() == "x"]
    assert [list(numbers) for numbers in crosses] == [[3], []]


def test_best_value_stands_beside_the_sites_name(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", ("CS",), rounds=5)
    best = max(report.validation_dice or 0.0 for record in folder.rounds() for report in record.trained)
    assert f"CS  {best:.3f}" in texts(plot_dice_by_round(folder))


def test_phases_are_named(tmp_path: Path) -> None:
    shown = texts(plot_dice_by_round(made_up_run(tmp_path / "run", ("CS", "DU"), rounds=20)))
    assert [text for text in shown if text in ("warm-up", "exchange", "cool-down")] == [
        "warm-up",
        "exchange",
        "cool-down",
    ]


def test_nan_dice_is_left_out(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", ("CS",), rounds=2)
    last = folder.rounds()[-1]
    report = replace(last.trained[0], round_number=3, validation_dice=math.nan)
    folder.append_round(replace(last, plan=replace(last.plan, round_number=3), trained=(report,)))
    assert plot_dice_by_round(folder).axes[0].lines[0].get_xdata().tolist() == [1, 2]  # type: ignore[union-attr]


def test_each_loss_part_has_a_panel(tmp_path: Path) -> None:
    figure = plot_losses(made_up_run(tmp_path / "run", ("CS", "DU"), rounds=20))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["segmentation", "mutual", "incoming segmentation"]


def test_gossip_table_counts_pushes_and_refusals(tmp_path: Path) -> None:
    """With two sites every push of CS goes to DU; each push has 16.5 MB."""
    folder = made_up_run(tmp_path / "run", ("CS", "DU"), rounds=30)
    pushes = [push for push in folder.transfers() if push.sender == "CS"]
    num_accepted = sum(push.accepted for push in pushes)
    shown = texts(plot_gossip_graph(folder))
    assert {str(num_accepted), f"{16.5 * len(pushes):.0f} MB", f"\u2212{len(pushes) - num_accepted}"} <= set(shown)


def test_gossip_graph_has_an_arrow_for_each_edge(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", ("CS", "DU", "HT"), rounds=12)
    arrows = [patch for patch in plot_gossip_graph(folder).axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == len({(push.sender, push.receiver) for push in folder.transfers()})


def test_test_bars_are_means_over_cases(tmp_path: Path) -> None:
    """Two classes: case a has the mean 0.5, case b 0.7 (its undefined class is left out); the site has 0.6."""
    folder = RunFolder(tmp_path / "run")
    dice = {("a", "left"): 0.4, ("a", "right"): 0.6, ("b", "left"): 0.7, ("b", "right"): math.nan}
    folder.write_cases(
        CaseScore("CS", case, "test", "personalised", name, value, 1.0, 1.0) for (case, name), value in dice.items()
    )
    axes = plot_test_dice(folder).axes[0]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([0.6])  # type: ignore[attr-defined]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["CS\n0.600\n2 cases"]


def test_validation_cases_are_not_in_the_test_plot(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_cases([CaseScore("CS", "a", "validation", "personalised", "left", 0.5, 1.0, 1.0)])
    with pytest.raises(DataError, match="no test case"):
        plot_test_dice(folder)


# --- overlays ----------------------------------------------------------------------------------


def block(shape: tuple[int, ...], start: int, stop: int) -> NDArray[np.int64]:
    mask = np.zeros((1, *shape), dtype=np.int64)
    mask[(0, *[slice(start, stop)] * len(shape))] = 1
    return mask


def pixels_of(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels close to a colour; the legend holds some of each."""
    picture = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return int((np.abs(picture - colour).max(axis=-1) < 40).sum())


REFERENCE, PREDICTION = (0x56, 0xB4, 0xE9), (0xF0, 0xE4, 0x42)


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 64)], ids=["2D", "3D"])
def test_both_contours_are_drawn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image, label = np.zeros((1, *shape)), block(shape, 20, 40)
    for name, reference, prediction in (("empty", 0, 0), ("reference", 1, 0), ("both", 1, 1)):
        draw_overlay(image, label * reference, label * prediction, title="a_$b_c", path=tmp_path / f"{name}.png")
    drawn = {name: tmp_path / f"{name}.png" for name in ("empty", "reference", "both")}
    assert pixels_of(drawn["reference"], REFERENCE) > 2 * pixels_of(drawn["empty"], REFERENCE)
    assert pixels_of(drawn["both"], PREDICTION) > 2 * pixels_of(drawn["reference"], PREDICTION)


def test_volume_is_shown_where_the_reference_is_largest(tmp_path: Path) -> None:
    """Only slice 5 is bright above and dark below, so a grey step shows that it was chosen."""
    image, label = np.zeros((1, 64, 64, 8)), np.zeros((1, 64, 64, 8), dtype=np.int64)
    label[0, 30:34, 30:34, 2], label[0, 20:40, 20:40, 5] = 1, 1
    image[0, :, 30:, 5] = 1.0
    draw_overlay(image, label, label, title="", path=tmp_path / "overlay.png")
    picture = np.asarray(Image.open(tmp_path / "overlay.png").convert("L"), dtype=int)
    middle = picture[:, picture.shape[1] // 4]
    assert middle[len(middle) // 4] == 255
    assert middle[5 * len(middle) // 8] == 0


def test_three_channels_of_a_2d_image_are_colour(tmp_path: Path) -> None:
    image = np.stack([np.tile(np.linspace(0, 1, 64), (64, 1)), np.zeros((64, 64)), np.zeros((64, 64))])
    draw_overlay(image, block((64, 64), 20, 40), block((64, 64), 22, 42), title="", path=tmp_path / "overlay.png")
    picture = np.asarray(Image.open(tmp_path / "overlay.png").convert("RGB"), dtype=int)
    assert ((picture[..., 0] > 200) & (picture[..., 1] < 30) & (picture[..., 2] < 30)).sum() > 100


def test_large_pictures_are_shrunk_and_keep_what_is_thin() -> None:
    """3000 x 4000 pixels at most 1200 a side: every fourth; a vessel of one pixel is still there."""
    mask = np.zeros((1, 3000, 4000), dtype=bool)
    mask[0, :, 1] = True
    mask[0, 2999, 3999] = True
    step = stride(WHOLE, mask.shape[1:])
    small = shrunk(mask, step)
    assert (step, small.shape) == (4, (1, 750, 1000))
    assert small[0, :, 0].all()
    assert small[0, 749, 999]
    assert small.sum() == 751
    image = np.linspace(0, 1, 12_000_000, dtype=np.float32).reshape(1, 3000, 4000)
    shown = picture(image, WHOLE, step)
    assert shown.shape == (750, 1000)
    np.testing.assert_allclose(shown[[0, 375, 749], 500], [0.0, 0.5, 1.0], atol=0.01)


def test_pictures_of_usual_size_are_drawn_pixel_by_pixel() -> None:
    mask = np.eye(1200, dtype=bool)[None]
    assert stride((slice(100, 300), slice(None)), (2000, 1200)) == 1
    assert shrunk(mask, 1) is mask


def test_channel_with_the_clearest_structure_is_shown_and_colour_pictures_as_they_are() -> None:
    """Channel 0: 1 inside, 0 outside, but a far outlier spreads it; channel 1: 1 inside and 0 outside."""
    structure = np.zeros((2, 2, 2), dtype=bool)
    structure[0, 0] = True
    clear = structure.astype(np.float32)
    noisy = clear.copy()
    noisy[1, 1, 1] = 9.0
    assert clearest_channel(np.stack([noisy, clear]), structure) == 1
    assert clearest_channel(np.stack([noisy, clear]), np.zeros_like(structure)) == 0
    assert clearest_channel(np.zeros((3, 2, 2)), structure[0]) is None


def test_overlay_names_the_channel_that_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("gcml_ray.report.overlays.save_figure", lambda figure, *_, **__: figures.append(figure))
    label = block((64, 64), 20, 40)
    image = np.concatenate([np.zeros((1, 64, 64)), label])
    draw_overlay(image, label, label, title="CS", path=tmp_path / "x.png", channel_names=("t1", "flair"))
    assert figures[0].get_suptitle() == "CS  flair"


def test_each_region_has_its_own_panel(tmp_path: Path) -> None:
    regions = np.concatenate([block((64, 64), 10, 50), block((64, 64), 20, 40)])
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, masks in zip(paths, (regions[:1], regions), strict=True):
        draw_overlay(np.zeros((1, 64, 64)), masks, masks, title="", path=path, class_names=("WT", "TC"))
    one, two = (Image.open(path).size for path in paths)
    assert two[0] / two[1] > one[0] / one[1] * 1.5


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"overlay a\.png: image \(1, 8, 8\), label \(1, 8, 9\)"):
        draw_overlay(np.zeros((1, 8, 8)), np.zeros((1, 8, 9)), np.zeros((1, 8, 9)), title="", path=tmp_path / "a.png")


def test_name_in_letters_that_the_font_lacks_is_drawn_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    image, label = np.random.default_rng(0).random((1, 16, 16)), np.zeros((1, 16, 16))
    label[0, 4:8, 4:8] = 1
    draw_overlay(image, label, label, title="\u60a3\u8005 1", path=tmp_path / "x.png", class_names=("\u80bf\u7624",))
    assert is_drawn(tmp_path / "x.png")
    assert [str(each.message) for each in recwarn] == []
