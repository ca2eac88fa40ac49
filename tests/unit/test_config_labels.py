"""What stands first in ``data.labels`` is the background, so nothing else may look like it."""

import pytest

from gcml_ray.config import DataConfig


def data(**labels: int) -> DataConfig:
    return DataConfig(datalist="x.json", channels=("mr",), labels=labels, spacing_is_real=True, patch_size=(4, 4, 4))


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        ({"tumour": 1, "background": 0}, "background: 0"),
        ({"tumour": 1, "rest": 0}, "rest: 0"),
        ({"edema": 2, "BG": 7, "tumour": 1}, "BG: 7"),
    ],
)
def test_background_that_does_not_stand_first_is_refused(labels: dict[str, int], first: str) -> None:
    with pytest.raises(ValueError, match=f"what stands first is the background; put {first} first"):
        data(**labels)


@pytest.mark.parametrize("labels", [{"background": 255, "vessel": 0}, {"air": 4, "bone": 5}, {"rest": 0, "bone": 5}])
def test_background_of_another_value_or_name_is_taken_where_it_stands_first(labels: dict[str, int]) -> None:
    assert data(**labels).foreground_names == tuple(labels)[1:]
