"""What shapes alone show to be wrong with a case."""

import pytest
import torch

from gcml_ray.config import DataConfig
from gcml_ray.data.case_checks import channel_problems, intensity_problems
from gcml_ray.data.datalist import Case
from gcml_ray.data.reading import Volume

DATA = DataConfig(
    datalist="x.json",
    channels=("t1", "flair"),
    labels={"background": 0, "a": 1},
    spacing_is_real=True,
    patch_size=(4, 4, 4),
)


def problem_of(shapes: dict[str, tuple[int, ...]]) -> str:
    """The one problem of images of these shapes, (channels, *spatial), beside two channels in the configuration."""
    (problem,) = channel_problems(Case("A", "p1", tuple(shapes), "seg.nii", "train"), list(shapes.values()), DATA)
    return problem


def test_file_of_several_volumes_is_named_with_its_shape() -> None:
    problem = problem_of({"t1.nii": (1, 6, 5, 4), "flair.nii": (2, 6, 5, 4)})
    assert problem.startswith(
        "the image has 3 channel(s) in 2 file(s), data.channels lists 2 (t1, flair); flair.nii alone"
    )
    assert "flair.nii alone has 2, its shape is (6, 5, 4, 2); change data.channels" in problem


@pytest.mark.parametrize(("name", "is_suspected"), [("x.png", True), ("x.nii", False)])
def test_only_pictures_are_suspected_of_an_alpha_channel(name: str, is_suspected: bool) -> None:
    assert ("is one an alpha channel?" in problem_of({name: (4, 6, 5)})) == is_suspected


@pytest.mark.parametrize(("value", "is_told"), [(1e17, True), (-5e5, True), (30.0, False)])
def test_one_voxel_that_rules_its_channel_is_a_warning(
    value: float, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside 26,999 voxels of spread 1 it holds a quarter of all squares from 95 on."""
    generator = torch.Generator().manual_seed(0)
    plain, spoilt = (torch.randn(1, 30, 30, 30, generator=generator) for _ in range(2))
    spoilt[0, 3, 4, 5] = value
    case = Case("A", "p1", ("t1.nii", "flair.nii"), "seg.nii", "train")
    assert intensity_problems(case, [Volume(plain, None), Volume(spoilt, None)], DATA) == []
    expected = [f"site A, case p1: one voxel of channel flair is {value:g}"] if is_told else []
    assert [message.partition(", the median")[0] for message in caplog.messages] == expected
