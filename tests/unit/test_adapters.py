import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from gcml_ray.cli.prepare import prepare_app
from gcml_ray.data.adapters.lgg import prepare_lgg
from gcml_ray.data.adapters.manifest import prepare_manifest
from gcml_ray.errors import DataError

CASE = "TCGA_CS_4941_19960909"


def write_manifest(folder: Path, text: str, *, files: str = "") -> Path:
    for name in files.split():
        (folder / name).touch()
    path = folder / "manifest.csv"
    path.write_text(text)
    return path


# --- manifest


def test_manifest_gives_channels_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write_manifest(
        tmp_path, "site,case,t1,t2,seg,split\nA,p1,a.nii,b.nii,s.nii,test\n", files="a.nii b.nii s.nii"
    )
    (case,) = prepare_manifest(path, image_columns=("t2", "t1"), label_column="seg")
    assert case.images == (str(tmp_path / "b.nii"), str(tmp_path / "a.nii"))
    assert (case.site, case.name, case.split, case.label_threshold) == ("A", "p1", "test", None)


def test_manifest_with_spaces_after_the_commas_is_read(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "site, t1, seg\nA, a.png, s.png\n", files="a.png s.png")
    (case,) = prepare_manifest(path, image_columns=("t1",), label_column="seg")
    assert (case.site, Path(case.label).name) == ("A", "s.png")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_manifest_separated_by_semicolons_or_tabs_is_read(tmp_path: Path, separator: str) -> None:
    (tmp_path / "a,1.png").touch()
    text = "\ufeffsep=;\nsite;t1;seg\nA;a,1.png;s.png\n".replace(";", separator)  # with Excel's own first line
    path = write_manifest(tmp_path, text, files="s.png")
    (case,) = prepare_manifest(path, image_columns=("t1",), label_column="seg")
    assert (case.site, Path(case.images[0]).name) == ("A", "a,1.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("site,t1,seg,Split\nA,a.png,s.png,test\n", "has a column Split, which is read as split only; rename it"),
        ("site,t1,seg,seg\nA,a.png,s.png,s.png\n", "has several columns seg; give each a name of its own"),
        ("site,t1,seg\nA,./s.png,s.png\n", "line 2: its image and its label are one file, s.png"),
    ],
)
def test_manifest_whose_columns_would_be_misread_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = write_manifest(tmp_path, text, files="a.png s.png")
    with pytest.raises(DataError, match=words):
        prepare_manifest(path, image_columns=("t1",), label_column="seg")


def test_manifest_column_that_was_named_is_read_however_it_is_spelt(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "site,t1,seg,Case\nA,a.png,s.png,p7\n", files="a.png s.png")
    (case,) = prepare_manifest(path, image_columns=("t1",), label_column="seg", case_column="Case")
    assert case.name == "p7"


def test_manifest_whose_files_lie_elsewhere_asks_for_their_folder(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "site,t1,seg\nA,a.png,s.png\nA,b.png,r.png\n")
    with pytest.raises(DataError, match=r"none of its 4 files exists, .*a\.png for example; .*folder with --root"):
        prepare_manifest(path, image_columns=("t1",), label_column="seg")


def test_manifest_without_the_case_column_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "site,t1,seg\nA,a.png,s.png\n", files="a.png s.png")
    with pytest.raises(DataError, match="has no column patient; its columns are site, t1, seg"):
        prepare_manifest(path, image_columns=("t1",), label_column="seg", case_column="patient")


def test_manifest_saved_by_a_spreadsheet_is_read_or_told_what_to_do(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "site,t1,seg\nA,a.png,s.png\n,,\n\n", files="a.png s.png")
    assert len(prepare_manifest(path, image_columns=("t1",), label_column="seg")) == 1
    path.write_bytes("site,t1,seg\nKöln,a.png,s.png\n".encode("cp1252"))
    with pytest.raises(DataError, match="save the table as CSV UTF-8"):
        prepare_manifest(path, image_columns=("t1",), label_column="seg")


def test_names_in_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "site,t1,seg\nA,a.png,s.png\n", files="a.png s.png")
    words = ("manifest", str(path), "--out", str(tmp_path / "[bold]x[/y].json"), "--image", "t1", "--label", "seg")
    result = CliRunner().invoke(prepare_app, words)
    assert result.exit_code == 0, result.output
    assert "[bold]x[/y].json" in result.output


def test_manifest_with_a_site_that_no_run_takes_is_refused(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "site,t1,seg\nNYU Langone,a.png,s.png\n", files="a.png s.png")
    with pytest.raises(DataError, match="line 2: site name 'NYU Langone' cannot name a folder"):
        prepare_manifest(path, image_columns=("t1",), label_column="seg")


def test_manifest_rule_becomes_a_threshold(tmp_path: Path) -> None:
    text = "site,img,seg,rule\nA,a,s1.png,value>127\nA,b,s2.png,value > 0\nA,c,s3.png,\n"
    path = write_manifest(tmp_path, text, files="a b c s1.png s2.png s3.png")
    cases = prepare_manifest(path, image_columns=("img",), label_column="seg", label_rule_column="rule")
    assert [case.label_threshold for case in cases] == [127.0, 0.0, None]
    assert [case.name for case in cases] == ["s1", "s2", "s3"]


def test_manifest_paths_start_from_root(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.nii", "s.nii"):
        (tmp_path / "data" / name).touch()
    path = write_manifest(tmp_path, "site,img,seg\nA,a.nii,s.nii\n")
    (case,) = prepare_manifest(path, image_columns=("img",), label_column="seg", root=tmp_path / "data")
    assert case.label == str(tmp_path / "data" / "s.nii")


def test_manifest_names_missing_columns_and_those_there_are(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "centre,img\nA,a\n")
    with pytest.raises(DataError, match="has no column site, seg; its columns are centre, img"):
        prepare_manifest(path, image_columns=("img",), label_column="seg")


def test_manifest_reports_all_wrong_lines_at_once(tmp_path: Path) -> None:
    text = (
        "site,case,img,seg,split,rule\n,p1,a,s,,\nA,p2,none,s,,\nA,p3,a,,,\nA,p4,a,s,val,\nA,p5,a,s,,value<3\n"
        "A,p6,a,s,,\nA,p6,a,s,,\n"
    )
    with pytest.raises(DataError) as caught:
        prepare_manifest(
            write_manifest(tmp_path, text, files="a s"),
            image_columns=("img",),
            label_column="seg",
            label_rule_column="rule",
        )
    for expected in (
        "line 2: site is empty",
        "line 3: img: no such file",
        "line 4: seg is empty",
        "line 5: split is 'val'",
        "line 6: rule is 'value<3'",
        "site A: case p6 is listed 2 times (line 7, line 8); give each",
    ):
        assert expected in str(caught.value)


def test_manifest_without_lines_or_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no line below it"):
        prepare_manifest(write_manifest(tmp_path, "site,img,seg\n"), image_columns=("img",), label_column="seg")
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        prepare_manifest(tmp_path / "none.csv", image_columns=("img",), label_column="seg")


# --- LGG


def write_slices(folder: Path, *, case: str = CASE, numbers: tuple[int, ...] = tuple(range(1, 12))) -> Path:
    """Slices of 4 rows x 6 columns; slice n has the colour (n, 50 + n, 100 + n) one mask pixel: row 1, column 3."""
    home = folder / "kaggle_3m" / case
    home.mkdir(parents=True)
    for number in numbers:
        picture = np.zeros((4, 6, 3), np.uint8) + np.array([number, 50 + number, 100 + number], np.uint8)
        mask = np.zeros((4, 6), np.uint8)
        mask[1, 3] = 255
        Image.fromarray(picture).save(home / f"{case}_{number}.tif")
        Image.fromarray(mask).save(home / f"{case}_{number}_mask.tif")
    return home


def read(path: str) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_lgg_slices_are_in_numeric_order_one_file_a_channel(tmp_path: Path) -> None:
    write_slices(tmp_path)
    (case,) = prepare_lgg(tmp_path, tmp_path / "out")
    assert (case.site, case.name) == ("CS", CASE)
    assert [Path(path).name for path in case.images] == [f"{CASE}_{name}.nii.gz" for name in ("t1", "flair", "t1ce")]
    for path, offset in zip(case.images, (0, 50, 100), strict=True):
        volume = read(path)
        assert (volume.shape, volume.dtype) == ((6, 4, 11), np.uint8)
        assert volume[0, 0].tolist() == [offset + number for number in range(1, 12)]


def test_lgg_mask_is_zero_and_one_at_column_and_row(tmp_path: Path) -> None:
    write_slices(tmp_path)
    (case,) = prepare_lgg(tmp_path / "kaggle_3m", tmp_path / "out")
    mask = read(case.label)
    assert np.argwhere(mask).tolist() == [[3, 1, number] for number in range(11)]
    assert mask.max() == 1
    assert nibabel.load(case.label).header.get_zooms() == (1.0, 1.0, 1.0)


def test_lgg_second_run_converts_nothing_again(tmp_path: Path) -> None:
    write_slices(tmp_path)
    calls: list[tuple[int, int]] = []
    (case,) = prepare_lgg(tmp_path, tmp_path / "out")
    before = Path(case.label).stat().st_mtime_ns
    assert prepare_lgg(tmp_path, tmp_path / "out", progress=lambda *counts: calls.append(counts)) == (case,)
    assert Path(case.label).stat().st_mtime_ns == before
    assert calls == [(1, 1)]
    assert sorted(path.suffix for path in Path(case.label).parent.iterdir()) == [".gz"] * 4


def test_lgg_slices_that_have_changed_are_converted_again(tmp_path: Path) -> None:
    home = write_slices(tmp_path)
    (case,) = prepare_lgg(tmp_path, tmp_path / "out")
    mask = home / f"{CASE}_1_mask.tif"
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(mask)
    os.utime(mask, (1.0, 1.0))
    prepare_lgg(tmp_path, tmp_path / "out")
    assert [read(case.label)[3, 1, number] for number in range(3)] == [0, 1, 1]


def test_lgg_problems_of_all_cases_are_reported_and_good_cases_kept(tmp_path: Path) -> None:
    first = write_slices(tmp_path, numbers=(1, 2, 4))
    (first / f"{CASE}_2_mask.tif").unlink()
    other = "TCGA_DU_1_20000101"
    second = write_slices(tmp_path, case=other, numbers=(1, 2))
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(second / f"{other}_2.tif")
    write_slices(tmp_path, case="TCGA_HT_1_20000101", numbers=(1,))
    (tmp_path / "kaggle_3m" / "TCGA_HT_2_20000101").mkdir()
    with pytest.raises(DataError) as caught:
        prepare_lgg(tmp_path, tmp_path / "out")
    for expected in (
        f"case {CASE}: slice(s) 3 are missing",
        f"case {CASE}: no mask for slice(s) 2",
        f"case {other}: slices and masks have several sizes (rows x columns): 4x6, 5x5",
        "case TCGA_HT_2_20000101: no slice",
    ):
        assert expected in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["HT"]


def test_lgg_unreadable_slice_is_named(tmp_path: Path) -> None:
    home = write_slices(tmp_path, numbers=(1, 2))
    (home / f"{CASE}_2.tif").write_bytes(b"II*\x00")
    with pytest.raises(DataError, match=f"{CASE}_2.tif cannot be read"):
        prepare_lgg(tmp_path, tmp_path / "out")


def test_lgg_second_run_does_not_take_its_own_output_for_a_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_slices(tmp_path, numbers=(1, 2)).parent
    first = prepare_lgg(folder, folder / "volumes")
    assert prepare_lgg(folder, folder / "volumes") == first
    assert not caplog.text


def test_lgg_folder_without_cases_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no case folder"):
        prepare_lgg(tmp_path, tmp_path / "out")


# --- command line


def test_command_says_which_sites_have_too_few_cases_for_a_run(tmp_path: Path) -> None:
    lines = "".join(f"{name[0]},c{name[1]},{name},{name}s\n" for name in ("A1", "A2", "A3", "B1"))
    path = write_manifest(tmp_path, f"site,case,img,seg\n{lines}", files="A1 A2 A3 B1 A1s A2s A3s B1s")
    words = ["manifest", str(path), "--out", str(tmp_path / "x.json"), "--image", "img", "--label", "seg"]
    result = CliRunner().invoke(prepare_app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "site B has 1 case(s) (c1); it needs at least 3" in result.output
    assert "site A has" not in result.output
