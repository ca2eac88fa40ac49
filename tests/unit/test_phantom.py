from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from gcml_ray.data.datalist import Case, read_datalist, write_datalist
from gcml_ray.data.phantom import prepare_phantom
from gcml_ray.data.phantom_case import make_case
from gcml_ray.data.phantom_sites import STYLES, SiteStyle, style_of
from gcml_ray.errors import DataError
from gcml_ray.seeding import numpy_generator

SHAPE = (18, 16, 10)
SEED = 3


def voxels(path: str) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def files(case: Case) -> tuple[str, ...]:
    return (*case.images, case.label)


def all_voxels(cases: tuple[Case, ...]) -> list[bytes]:
    return [voxels(path).tobytes() for case in cases for path in files(case)]


def sample(
    style: SiteStyle, *, index: int = 0, shape: tuple[int, ...] = (36, 32, 20)
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    return make_case(style, numpy_generator(SEED, "phantom", "x", index), shape=shape)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, ...]:
    folder = tmp_path_factory.mktemp("phantom")
    return prepare_phantom(folder, sites=None, cases_per_site=4, shape=SHAPE, seed=SEED)


def test_same_seed_gives_identical_voxels(cases: tuple[Case, ...], tmp_path: Path) -> None:
    again = prepare_phantom(tmp_path, sites=None, cases_per_site=4, shape=SHAPE, seed=SEED)
    assert all_voxels(cases) == all_voxels(again)


def test_datalist_of_what_is_written_over_is_gone_before_the_first_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "datalist.json"
    old.write_text("{}")
    monkeypatch.setattr("gcml_ray.data.phantom.make_case", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError):
        prepare_phantom(tmp_path, sites=None, cases_per_site=0, shape=SHAPE, seed=SEED, replaces=old)
    assert old.exists()
    with pytest.raises(ZeroDivisionError):
        prepare_phantom(tmp_path, sites=None, cases_per_site=4, shape=SHAPE, seed=SEED, replaces=old)
    assert not old.exists()


def test_another_seed_gives_other_voxels(cases: tuple[Case, ...], tmp_path: Path) -> None:
    other = prepare_phantom(tmp_path, sites=["north"], cases_per_site=4, shape=SHAPE, seed=SEED + 1)
    assert not set(all_voxels(cases)) & set(all_voxels(other))


def test_case_depends_neither_on_number_of_cases_nor_on_other_sites(cases: tuple[Case, ...], tmp_path: Path) -> None:
    more = prepare_phantom(tmp_path, sites=["site7", "west"], cases_per_site=6, shape=SHAPE, seed=SEED)
    few_west = tuple(case for case in cases if case.site == "west")
    many_west = tuple(case for case in more if case.site == "west")
    assert all_voxels(few_west) == all_voxels(many_west[:4])


def test_no_two_cases_are_alike(cases: tuple[Case, ...]) -> None:
    images = [voxels(path).tobytes() for case in cases for path in case.images]
    assert len(set(images)) == 4 * 4 * 2


def test_labels_are_binary_with_foreground_inside_the_brain(cases: tuple[Case, ...]) -> None:
    for case in cases:
        label, brain = voxels(case.label), voxels(case.images[0]) > 0
        assert set(np.unique(label)) == {0, 1}, case.name
        assert not label[~brain].any(), case.name


def test_files_are_finite_on_one_grid_of_1_mm(cases: tuple[Case, ...]) -> None:
    for path in (path for case in cases for path in files(case)):
        image = nibabel.load(path)
        assert image.shape == SHAPE
        assert np.array_equal(image.affine, np.eye(4))
        assert np.isfinite(image.get_fdata()).all()


def test_brain_of_both_channels_is_the_same_and_positive(cases: tuple[Case, ...]) -> None:
    for case in cases:
        t1, flair = (voxels(path) for path in case.images)
        assert t1.min() == 0
        assert np.array_equal(t1 > 0, flair > 0)


def test_paths_are_absolute_and_survive_a_datalist(cases: tuple[Case, ...], tmp_path: Path) -> None:
    assert all(Path(path).is_absolute() for case in cases for path in files(case))
    write_datalist(tmp_path / "datalist.json", cases, description="phantom")
    assert read_datalist(tmp_path / "datalist.json") == cases


def test_three_cases_give_one_of_each_split(tmp_path: Path) -> None:
    three = prepare_phantom(tmp_path, sites=["east"], cases_per_site=3, shape=SHAPE, seed=SEED)
    assert [case.split for case in three] == ["train", "validation", "test"]


def test_default_sizes_differ_by_site_and_keep_ten_cases_aside(tmp_path: Path) -> None:
    made = prepare_phantom(tmp_path, sites=["north", "west"], cases_per_site=None, shape=(16, 16, 8), seed=SEED)
    counts = {
        (site, split): sum(case.site == site and case.split == split for case in made)
        for site in ("north", "west")
        for split in ("train", "validation", "test")
    }
    assert counts["north", "train"] == STYLES["north"].num_train > counts["west", "train"] == STYLES["west"].num_train
    assert [counts[site, split] for site in ("north", "west") for split in ("validation", "test")] == [2, 8, 2, 8]


def test_2d_cases_have_two_axes(tmp_path: Path) -> None:
    made = prepare_phantom(tmp_path, sites=None, cases_per_site=3, shape=(24, 20), seed=SEED, spatial_dims=2)
    assert {voxels(path).shape for case in made for path in files(case)} == {(24, 20)}
    assert all(voxels(case.label).any() for case in made)


def test_lesions_scale_with_the_grid() -> None:
    """Twice the voxels along each axis: 8 times the lesion's voxels, give or take the noise of its outline."""
    volumes = {
        size: np.mean([sample(STYLES["north"], index=i, shape=shape)[1].sum() for i in range(4)])
        for size, shape in (("small", (18, 16, 10)), ("large", (36, 32, 20)))
    }
    assert 4 < volumes["large"] / volumes["small"] < 16


def test_lesions_are_dark_in_t1_and_bright_in_flair() -> None:
    for style in STYLES.values():
        contrast = []
        for index in range(3):
            (t1, flair), label = sample(style, index=index)
            rest = (t1 > 0) & ~label
            contrast.append([np.median(c[label]) / np.median(c[rest]) for c in (t1, flair)])
        t1_ratio, flair_ratio = np.mean(contrast, axis=0)
        assert t1_ratio < 0.95
        assert flair_ratio > 1.1


def noise_level(style: SiteStyle) -> float:
    """Median absolute second difference along one axis, relative to the signal: anatomy is smoother than noise."""
    levels = []
    for index in range(3):
        (_, flair), _ = sample(style, index=index)
        inside = (flair[2:] > 0) & (flair[1:-1] > 0) & (flair[:-2] > 0)
        levels.append(np.median(np.abs(np.diff(flair, n=2, axis=0))[inside]) / np.median(flair[flair > 0]))
    return float(np.mean(levels))


def test_west_is_noisier_than_north() -> None:
    """Set to 0.045 and 0.030 of the signal's scale: 1.5 times."""
    assert noise_level(STYLES["west"]) > 1.25 * noise_level(STYLES["north"])


def test_readers_of_east_draw_less_than_those_of_south() -> None:
    """Same anatomy, same lesions: only the label style of one site is swapped for the other's."""
    south = STYLES["south"]
    eastern = replace(south, label_shift=STYLES["east"].label_shift, label_smooth=STYLES["east"].label_smooth)
    assert sample(eastern)[1].sum() < 0.8 * sample(south)[1].sum()


def test_derived_style_depends_on_name_and_seed_only() -> None:
    assert style_of("site5", 1) == style_of("site5", 1)
    assert len({style_of("site5", 1), style_of("site6", 1), style_of("site5", 2)}) == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sites": ["north", "nowhere"]}, r"unknown sites \['nowhere'\].*north.*site999"),
        ({"sites": []}, "sites is empty"),
        ({"sites": ["north", "north"]}, "names one twice"),
        ({"cases_per_site": 2}, "cases_per_site is 2: at least 3"),
        ({"shape": (15, 16, 10)}, r"shape \[15, 16, 10\] is too small: at least \[16, 16, 8\]"),
        ({"shape": (32, 32)}, "has 2 numbers, spatial_dims is 3"),
        ({"spatial_dims": 4}, "spatial_dims is 4: 2 or 3"),
    ],
)
def test_wrong_argument_is_named(wrong: dict, words: str, tmp_path: Path) -> None:
    arguments = {"sites": None, "cases_per_site": 3, "shape": SHAPE, "seed": SEED} | wrong
    with pytest.raises(DataError, match=words):
        prepare_phantom(tmp_path, **arguments)


def test_all_wrong_arguments_are_named_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*cases_per_site is 1.*too small"):
        prepare_phantom(tmp_path, sites=["nowhere"], cases_per_site=1, shape=(8, 8, 8), seed=SEED)
    assert not list(tmp_path.iterdir())
