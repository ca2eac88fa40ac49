"""Malformed datalists: a DataError that names the file, or cases that can be worked with."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from gcml_ray.config import SplitConfig
from gcml_ray.data.datalist import SPLITS, Case, assign_splits, read_datalist, write_datalist
from gcml_ray.errors import DataError
from tests.faults.fuzzing import inputs, outcome, spoilt_bytes, spoilt_values

VALID: dict[str, Any] = {
    "description": "three cases",
    "cases": [
        {"site": "A", "case": "a1", "image": ["a_t1.nii.gz", "a_t2.nii.gz"], "label": "a_seg.nii.gz", "split": "train"},
        {"site": "A", "image": "b.nii", "label": "b_seg.nii", "split": None, "label_threshold": 127},
        {"site": "B", "case": "c", "image": "/data/c.nii", "label": "../c_seg.nii", "label_threshold": 0.5},
    ],
}  # fmt: skip
TEXT = json.dumps(VALID, indent=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all inputs of this file."""
    return tmp_path_factory.mktemp("fuzz")


def check(folder: Path, content: bytes, *, only_images: bool = False) -> None:
    """The property; whatever else the reader raises fails the test."""
    path = folder / "some.json"
    path.write_bytes(content)
    cases = outcome(lambda: read_datalist(path, only_images=only_images), path, DataError)
    if isinstance(cases, DataError):
        return
    assert cases
    assert len({(case.site, case.name) for case in cases}) == len(cases)
    for case in cases:
        check_case(case, only_images=only_images)
    if not only_images:
        write_datalist(folder / "again.json", cases, description="")
        assert read_datalist(folder / "again.json") == cases
        with contextlib.suppress(DataError):
            assign_splits(cases, SplitConfig(validation=0.2, test=0.2))


def check_case(case: Case, *, only_images: bool) -> None:
    """A case whose names can be files and whose values mean something."""
    for name in (case.name, *(() if only_images and not case.site else (case.site,))):
        assert name.strip()
        assert name not in (".", "..")
        assert not set("/\\\0\n") & set(name)
        name.encode()  # it becomes the name of a file, a row of a table and a tag
    assert case.images
    assert all(Path(path).is_absolute() for path in case.images)
    assert only_images or Path(case.label).is_absolute()
    assert case.split is None or case.split in SPLITS
    assert case.label_threshold is None or math.isfinite(case.label_threshold)


@inputs(0.3)
@given(spoilt_bytes(TEXT.encode()))
def test_damaged_text(folder: Path, content: bytes) -> None:
    check(folder, content)


@inputs(0.5)
@given(spoilt_values(VALID))
def test_wrong_values(folder: Path, content: Any) -> None:
    check(folder, json.dumps(content).encode())


@inputs(0.2)
@given(spoilt_values(VALID))
def test_wrong_values_of_new_patients(folder: Path, content: Any) -> None:
    check(folder, json.dumps(content).encode(), only_images=True)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"cases": ' * 50_000,
        '{"cases": [' + "9" * 5000 + "]}",
        '{"cases": [{"site": "A", "image": "a", "label": "b", "label_threshold": 1' + "0" * 400 + "}]}",
        '{"cases": [{"site": "A", "image": "a", "label": "b", "label_threshold": NaN}]}',
        '{"cases": [{"site": "A", "image": "a", "label": "b"}], "cases": [{"site": "B", "image": "a", "label": "b"}]}',
        '{"cases": [{"site": "A", "site": "B", "image": "a", "label": "b"}]}',
        '{"cases": [{"site": "A", "image": "a", "label": ".nii.gz"}]}',
        '{"cases": [{"site": "A", "image": "a", "label": ".."}]}',
        '{"cases": [{"site": "A", "image": "a", "label": "x\\ny"}]}',
        '{"cases": [{"site": "\\ud800", "image": "a", "label": "b"}]}',
        '{"cases": [{"site": "A", "image": "a", "label": "\\u0000"}]}',
        "\ufeff{}",
    ],
    ids=str.__len__,
)
def test_datalist_that_means_nothing_is_refused(folder: Path, content: str) -> None:
    """Nesting, numbers without end, a key that stands twice, names that cannot be names."""
    check(folder, content.encode())
    with pytest.raises(DataError, match=r"some\.json"):
        read_datalist(folder / "some.json")
