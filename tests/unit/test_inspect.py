"""What ``gcml inspect`` measures, what it finds wrong, and what it writes."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from gcml_ray.cli.inspect import inspect
from gcml_ray.console.inspection import quantities_table
from gcml_ray.data.datalist import Case, read_datalist
from gcml_ray.inspection.cases import channel_names, inspect_cases
from gcml_ray.inspection.facts import Inspection
from gcml_ray.inspection.sites import Quantity, by_verdict, quantities, site_share
from gcml_ray.report.inspection import plot_inspection
from tests.makers import make_datalist

SHAPE = (8, 8, 4)


def write(path: Path, voxels: np.ndarray, *, side_mm: float = 1.0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([side_mm, side_mm, side_mm, 1.0])), path)
    return str(path)


def make_case(
    folder: Path, name: str, *, image: np.ndarray | None = None, label: np.ndarray | None = None, **changes: Any
) -> Case:
    """One channel; without arrays an image of its own and a label of one voxel."""
    noise = np.random.default_rng(len(name) + sum(map(ord, name))).normal(100, 10, SHAPE).astype(np.float32)
    spot = np.zeros(SHAPE, np.uint8)
    spot[0, 0, 0] = 1
    side_mm = changes.pop("side_mm", 1.0)
    values = {
        "site": "A",
        "name": name,
        "images": (write(folder / f"{name}.nii.gz", noise if image is None else image, side_mm=side_mm),),
        "label": write(folder / f"{name}_seg.nii.gz", spot if label is None else label, side_mm=side_mm),
        "split": None,
    }
    return Case(**{**values, **changes})


def look(*cases: Case, quick: bool = False, spacing_is_real: bool = True) -> Inspection:
    return inspect_cases(cases, quick=quick, spacing_is_real=spacing_is_real)


# --- measuring


def test_percentiles_are_those_of_the_bright_voxels(tmp_path: Path) -> None:
    """Half of the voxels are air (0), the others 101 to 228: their mean is below 101, so air alone is left out."""
    image = np.zeros(256, np.int16)
    image[128:] = np.arange(101, 229)
    (case,) = look(make_case(tmp_path, "a", image=image.reshape(SHAPE))).cases
    (channel,) = case.channels
    np.testing.assert_allclose(channel.percentiles, np.percentile(np.arange(101, 229), (1, 25, 50, 75, 99)))
    assert channel.median == 164.5
    assert channel.zero_share == 0.5


def test_label_is_measured_in_ml_and_in_pieces_that_touch_nowhere(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[0:2, 0, 0] = 1
    label[2, 1, 1] = 1  # touches the first piece at an edge: the same piece
    label[6, 6, 2] = 1
    label[7, 0, 0] = 4
    (case,) = look(make_case(tmp_path, "a", label=label, side_mm=5.0)).cases
    assert [(each.value, each.num_pieces) for each in case.labels] == [(1, 2), (4, 1)]
    assert case.labels[0].size == pytest.approx(4 * 0.125)  # voxels of 125 mm3 are 0.125 ml


def test_without_real_spacing_a_label_is_measured_as_share_of_the_image(tmp_path: Path) -> None:
    found = look(make_case(tmp_path, "a"), spacing_is_real=False)
    assert found.size_unit == "% of the image"
    assert found.cases[0].labels[0].size == pytest.approx(100 / 256)
    assert not any(each.kind == "spacing" for each in quantities(found))


def test_quick_reads_headers_only(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", image=np.full(SHAPE, np.nan, np.float32), side_mm=2.0)
    (facts,) = look(case, quick=True).cases
    assert (facts.shape, facts.spacing_mm, facts.orientation) == (SHAPE, (2.0, 2.0, 2.0), "RAS")
    assert (facts.channels, facts.labels, facts.problems) == ((), (), ())


def test_pictures_have_their_colours_as_channels_and_a_threshold_makes_the_label(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(1, 255, (10, 10, 3), dtype=np.uint8)
    mask = np.zeros((10, 10), np.uint8)
    mask[2, :5] = 200
    Image.fromarray(colours).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    found = look(Case("A", "a", (str(tmp_path / "a.png"),), str(tmp_path / "m.png"), None, label_threshold=127))
    assert found.channel_names == ("red", "green", "blue")
    assert found.cases[0].labels[0].size == pytest.approx(5.0)  # 5 of 100 pixels
    assert found.cases[0].spacing_mm is None


def test_channels_are_named_after_their_files_where_all_cases_agree() -> None:
    def case(*images: str) -> Case:
        return Case("A", "a", images, "l", None)

    assert channel_names([case("x_t1.nii.gz", "x_flair.nii.gz"), case("y_t1.nii", "y_flair.nii")]) == ("t1", "flair")
    assert channel_names([case("x_t1.nii.gz", "x_t2.nii"), case("y_a.nii", "y_b.nii")]) == ("image 1", "image 2")
    assert channel_names([case("x_7.nii"), case("y_8.nii")]) == ("image",)


# --- what is wrong


def test_labels_of_an_atlas_are_counted_and_a_grey_image_is_none(tmp_path: Path) -> None:
    atlas = np.zeros(SHAPE, np.int16)
    atlas[0, 0, :2] = 1000
    grey = np.arange(np.prod((20, 20, 4)), dtype=np.int16).reshape(20, 20, 4)
    found = look(make_case(tmp_path, "atlas", label=atlas), make_case(tmp_path, "grey", image=grey, label=grey))
    assert [label.value for label in found.cases[0].labels] == [1000]
    assert "site A, case grey: its label holds 1600 different values, more than 150" in "\n".join(found.problems)


def test_all_problems_of_all_cases_are_listed(tmp_path: Path) -> None:
    half = np.full(SHAPE, 0.5, np.float32)
    bad = np.ones(SHAPE, np.float32)
    bad[0, 0, :2] = np.nan
    found = look(
        make_case(tmp_path, "good"),
        make_case(tmp_path, "short", label=np.zeros((8, 8, 3), np.uint8)),
        make_case(tmp_path, "nan", image=bad),
        make_case(tmp_path, "half", label=half),
    )
    text = "\n".join(found.problems)
    assert "site A, case short: label (short_seg.nii.gz) has the shape (8, 8, 3), not (8, 8, 4) as image 1" in text
    assert "site A, case nan: image has 2 NaN or infinite value(s)" in text
    assert "site A, case half: its label holds 0.5; only whole numbers" in text
    assert "case good" not in text


def test_missing_file_is_a_problem_and_the_others_are_still_measured(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a")
    Path(case.label).unlink()
    found = look(case, make_case(tmp_path, "b"), make_case(tmp_path, "c"))
    assert len(found.problems) == 1
    assert "label is missing" in found.problems[0]
    assert len(found.cases[0].channels) == 1
    Path(case.images[0]).unlink()
    assert look(case).cases[0].shape is None


def test_a_label_on_two_different_images_is_noted_and_an_empty_one_is_not(tmp_path: Path) -> None:
    found = look(make_case(tmp_path, "a"), make_case(tmp_path, "b", site="B"), spacing_is_real=False)
    [note] = [note for note in found.notes if "same label" in note]
    assert note.startswith("site B, case b has the same label as site A, case a, on other images")
    empty = np.zeros(SHAPE, np.uint8)
    found = look(make_case(tmp_path, "c", label=empty), make_case(tmp_path, "d", label=empty))
    assert not [note for note in found.notes if "same label" in note]


def test_same_images_under_two_names_are_found_across_sites(tmp_path: Path) -> None:
    image = np.arange(256, dtype=np.int16).reshape(SHAPE)
    found = look(make_case(tmp_path, "a", image=image), make_case(tmp_path, "b", image=image, site="B"))
    problem = found.problems[-1]
    assert "site B, case b holds the same images as site A, case a" in problem


def test_case_with_another_number_of_channels_than_most_is_named(tmp_path: Path) -> None:
    cases = [make_case(tmp_path, name) for name in "abc"]
    stack = np.random.default_rng(0).normal(size=(*SHAPE, 2)).astype(np.float32)
    (problem,) = look(*cases, make_case(tmp_path, "d", image=stack)).problems
    assert problem == "site A, case d has 2 channel(s), most have 1"


def test_site_of_fewer_cases_than_a_run_needs_is_a_problem(tmp_path: Path) -> None:
    found = look(*(make_case(tmp_path, name) for name in "abc"), make_case(tmp_path, "d", site="B"), quick=True)
    (problem,) = found.problems
    assert problem.startswith("site B has 1 case(s) (d); it needs at least 3")


def test_label_value_of_a_single_case_is_a_note(tmp_path: Path) -> None:
    spot = np.zeros(SHAPE, np.uint8)
    spot[0, 0, 0] = 255
    found = look(*(make_case(tmp_path, name) for name in "abc"), make_case(tmp_path, "d", label=spot))
    assert not found.problems
    (note,) = (note for note in found.notes if "label value" in note)
    assert note.startswith("label value 255 is found in 1 of 4 cases only (A/d): is it meant")


def test_label_value_of_a_single_site_is_a_note(tmp_path: Path) -> None:
    spot = np.zeros(SHAPE, np.uint8)
    spot[0, 0, :2] = (1, 2)
    cases = [make_case(tmp_path, name) for name in "abc"]
    cases += [make_case(tmp_path, name, label=spot, site="B") for name in "def"]
    (note,) = (note for note in look(*cases).notes if "label value" in note)
    assert note.startswith("label value 2 is found at site B only: is it meant")


def test_notes_are_gathered_by_site(tmp_path: Path) -> None:
    empty = np.zeros(SHAPE, np.uint8)
    flat = np.full(SHAPE, 7, np.int16)
    found = look(
        *(make_case(tmp_path, name, label=empty) for name in "ab"),
        make_case(tmp_path, "c", image=flat, side_mm=2.0),
    )
    notes = "\n".join(found.notes)
    assert "site A, 2 case(s) (a, b): its label is empty" in notes
    assert "site A, 1 case(s) (c): image is 7 everywhere" in notes
    assert "voxel sizes differ: set data.target_spacing_mm" in notes


def test_channels_with_the_same_voxels_are_noted(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a")
    twin = write(tmp_path / "a_flair.nii.gz", np.asarray(nibabel.load(case.images[0]).dataobj))
    one = write(tmp_path / "a_t1.nii.gz", np.asarray(nibabel.load(case.images[0]).dataobj))
    (note, _) = look(Case("A", "a", (one, twin), case.label, None)).notes
    assert "t1, flair hold the same voxels" in note


# --- between sites


def test_site_share_is_one_where_sites_do_not_overlap_and_zero_where_they_are_alike() -> None:
    """Ranks 1 1 | 3 3 (ties shared): nothing varies within a site. Equal sites: less than chance, so 0."""
    assert site_share([[5.0, 5.0], [9.0, 9.0]]) == pytest.approx(1.0)
    assert site_share([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]) == 0.0


def test_site_share_takes_off_what_chance_gives() -> None:
    """Ranks 1 2 3 | 4 5 6: total 17.5, within 4; 1 - (4 / 4) / (17.5 / 5) = 5 / 7."""
    assert site_share([[1, 2, 30], [40, 50, 6000]]) == pytest.approx(5 / 7)


def test_site_share_is_unknown_with_one_site_or_one_case_each() -> None:
    assert math.isnan(site_share([[1.0, 2.0]]))
    assert math.isnan(site_share([[1.0], [2.0]]))


def test_quantities_are_sorted_by_verdict_most_different_first() -> None:
    def quantity(name: str, first: tuple[float, ...], second: tuple[float, ...]) -> Quantity:
        return Quantity("label", name, name, "ml", {"A": first, "B": second})

    apart, equal = quantity("apart", (1, 2, 3), (7, 8, 9)), quantity("equal", (1, 2, 3), (1, 2, 3))
    assert {word: [each.name for each in those] for word, those in by_verdict([equal, apart]).items()} == {
        "very different": ["apart"],
        "somewhat different": [],
        "alike": ["equal"],
    }


def test_case_without_a_label_value_counts_as_size_zero(tmp_path: Path) -> None:
    two = np.zeros(SHAPE, np.uint8)
    two[0, 0, 0] = 2
    found = quantities(look(make_case(tmp_path, "a"), make_case(tmp_path, "b", label=two)))
    sizes = {each.name: each.by_site["A"] for each in found if each.kind == "label"}
    assert sizes == {"Size of label 1": (0.001, 0), "Size of label 2": (0, 0.001)}


# --- picture and command


def texts_of(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def test_picture_has_a_panel_for_what_differs_and_says_what_does_not(tmp_path: Path) -> None:
    bright = np.random.default_rng(1).normal(900, 10, SHAPE).astype(np.float32)
    cases = [make_case(tmp_path, f"a{index}") for index in range(3)]
    cases += [make_case(tmp_path, f"b{index}", image=bright + index, site="B") for index in range(3)]
    shown = texts_of(plot_inspection(look(*cases), title="mine"))
    assert "mine: where do the sites differ?\nVery different: brightness of image" in shown
    assert "The same in all cases: image size 8 (first axis), 8 (second axis), 4 (third axis), in voxels." in shown
    assert "Image size (first axis)\n" not in shown


def run(*words: object) -> Any:
    app = typer.Typer()
    app.command()(inspect)
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_values_that_no_run_takes_are_problems(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.float32)
    label[0, 0, 0] = np.nan
    image = np.ones(SHAPE, np.float32)
    image[0, 0, 0] = 1e38
    found = look(make_case(tmp_path, "a", label=label), make_case(tmp_path, "b", image=image))
    assert any("its label has NaN or infinite values" in problem for problem in found.problems)
    assert any("holds 1e+38: no intensity" in problem for problem in found.problems)


@pytest.mark.parametrize("quick", [True, False])
def test_a_slice_among_volumes_is_a_problem(tmp_path: Path, *, quick: bool) -> None:
    flat = {
        "image": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32),
        "label": np.eye(8, dtype=np.uint8),
    }
    found = look(*(make_case(tmp_path, name) for name in "abc"), make_case(tmp_path, "scout", **flat), quick=quick)
    assert "site A, case scout has 2 axes, most have 3: a run takes either 2D images or volumes" in found.problems
    sizes = {each.name: each.by_site["A"] for each in quantities(found) if each.kind == "size"}
    assert sizes["Image size (third axis)"] == (4, 4, 4)


def test_volumes_of_one_slice_are_2d_beside_pictures(tmp_path: Path) -> None:
    volume = {"image": np.random.default_rng(0).normal(size=(8, 6, 1)).astype(np.float32)}
    cases = [make_case(tmp_path, name, label=np.ones((8, 6, 1), np.uint8), **volume) for name in "ab"]
    for name in ("p.png", "m.png"):
        Image.fromarray(np.random.default_rng(1).integers(0, 9, (8, 6), np.uint8)).save(tmp_path / name)
    cases.append(Case("A", "picture", (str(tmp_path / "p.png"),), str(tmp_path / "m.png"), None))
    found = look(*cases, spacing_is_real=False)
    assert [case.shape for case in found.cases] == [(8, 6)] * 3
    assert not [problem for problem in found.problems if "axes" in problem]


def test_voxel_sizes_on_other_axes_are_no_other_sizes(tmp_path: Path) -> None:
    first, other = make_case(tmp_path, "a"), make_case(tmp_path, "b")
    for case, affine in (
        (first, np.diag([1.0, 2.0, 3.0, 1.0])),
        (other, np.diag([1.0, 2.0, 3.0, 1.0])[:, [1, 0, 2, 3]]),
    ):
        for path in (*case.images, case.label):
            voxels = np.asanyarray(nibabel.load(path).dataobj)
            nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    notes = look(first, other, quick=True).notes
    assert [note for note in notes if "orientations differ" in note]
    assert not [note for note in notes if "voxel sizes differ" in note]


def test_site_names_that_no_run_takes_are_problems(tmp_path: Path) -> None:
    found = look(*(make_case(tmp_path, name, site="NYU Langone") for name in "abc"))
    assert [line for line in found.problems if "'NYU Langone' cannot name a folder" in line] == list(found.problems)


def test_many_sites_are_shown_by_their_extremes(tmp_path: Path) -> None:
    """Six sites, their images 100 brighter from one to the next: site S0 is the lowest, S5 the highest."""
    noise = np.random.default_rng(0).normal(100, 1, SHAPE).astype(np.float32)
    cases = [make_case(tmp_path, f"c{index}", image=noise + 100 * index, site=f"S{index}") for index in range(6)]
    inspection = look(*cases)
    console = Console(width=100, file=io.StringIO())
    console.print(quantities_table(inspection, quantities(inspection)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("lowest", "highest", "(S0)", "(S5)"))
    assert "S3" not in shown


def test_command_writes_picture_and_table_beside_the_datalist(tmp_path: Path) -> None:
    result = run(make_datalist(tmp_path))
    assert result.exit_code == 0, result.output
    assert "No problem found." in result.output
    with Image.open(tmp_path / "datalist_inspect" / "sites.png") as picture:
        assert picture.width > 1000
    with (tmp_path / "datalist_inspect" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(read_datalist(tmp_path / "datalist.json"))
    assert rows[0]["shape"] == "12x12x8"
    assert float(rows[0]["label_1_size"]) == pytest.approx(0.064)  # a box of 4 x 4 x 4 voxels of 1 mm


def test_command_survives_a_datalist_of_which_no_file_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"cases": [{"site": "A", "image": "none.nii", "label": "none_seg.nii"}]}))
    result = run(path)
    assert result.exit_code == 1
    assert "image 1 is missing: no file" in result.output


def test_command_ends_with_1_and_names_every_problem(tmp_path: Path) -> None:
    path = make_datalist(tmp_path)
    cases = json.loads(path.read_text())["cases"]
    for case in cases[:2]:
        (tmp_path / case["label"]).write_bytes(b"")
    result = run(path, "--out", tmp_path / "found", "--quick")
    assert result.exit_code == 1
    assert "2 problem(s):" in result.output
    assert "site A, case c0" in result.output
    assert (tmp_path / "found" / "sites.png").is_file()
