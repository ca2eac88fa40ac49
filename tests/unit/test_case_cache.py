"""Preprocessed cases on disk: the same tensors, never those of other files or settings."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gcml_ray.config import DataConfig
from gcml_ray.data import case_cache
from gcml_ray.data.case_cache import cached_sample
from gcml_ray.data.datalist import Case
from gcml_ray.data.loading import Sample, load_sample
from gcml_ray.data.phantom import prepare_phantom


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (first, *_) = prepare_phantom(tmp_path / "volumes", sites=("north",), cases_per_site=3, shape=(20, 18, 12), seed=1)
    return replace(first, split="train")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that were read from their own files."""
    names: list[str] = []

    def noted(case: Case, data: DataConfig) -> Sample:
        names.append(case.name)
        return load_sample(case, data)

    monkeypatch.setattr(case_cache, "load_sample", noted)
    return names


def data_config(folder: Path | None, **keys: object) -> DataConfig:
    values = {
        "datalist": "unused.json",
        "channels": ["t1", "flair"],
        "labels": {"background": 0, "lesion": 1},
        "spacing_is_real": True,
        "patch_size": [8, 8, 8],
        "cache_folder": None if folder is None else str(folder),
    }
    return DataConfig.model_validate(values | keys)


def test_a_case_from_the_cache_is_the_case_from_its_files(tmp_path: Path, case: Case, reads: list[str]) -> None:
    data = data_config(tmp_path / "cache")
    first, again = cached_sample(case, data), cached_sample(case, data)
    assert reads == [case.name], "read once"
    assert (again.case, again.spacing) == (first.case, first.spacing)
    for name in ("image", "label", "foreground", "background"):
        one, other = getattr(first, name), getattr(again, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0, "nobody else may read it"


def test_what_comes_after_preprocessing_needs_no_new_reading(tmp_path: Path, case: Case, reads: list[str]) -> None:
    cached_sample(case, data_config(tmp_path))
    cached_sample(case, data_config(tmp_path, patch_size=[16, 16, 8], batch_size=7, num_workers=1))
    assert len(reads) == 1


def test_other_settings_another_split_or_a_changed_file_are_read_anew(
    tmp_path: Path, case: Case, reads: list[str]
) -> None:
    data = data_config(tmp_path)
    cached_sample(case, data)
    cached_sample(case, data_config(tmp_path, normalise="all"))
    cached_sample(replace(case, split="test"), data)
    os.utime(case.images[0], ns=(1, 1))
    cached_sample(case, data)
    assert len(reads) == 4


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, case: Case, reads: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    sample = cached_sample(case, data_config(tmp_path / "file"))
    assert torch.equal(sample.image, load_sample(case, data_config(None)).image)
    assert len(reads) == 1


def test_a_damaged_file_in_the_cache_stops_nothing(tmp_path: Path, case: Case, reads: list[str]) -> None:
    data = data_config(tmp_path / "cache")
    cached_sample(case, data)
    next((tmp_path / "cache").iterdir()).write_bytes(b"torn")
    cached_sample(case, data)
    assert len(reads) == 2


@pytest.mark.parametrize("metadata", [None, {}, {"spacing": "torn"}, {"spacing": "1"}])
def test_a_file_in_the_cache_without_its_metadata_stops_nothing(
    tmp_path: Path, case: Case, reads: list[str], metadata: dict[str, str] | None
) -> None:
    data = data_config(tmp_path / "cache")
    first = cached_sample(case, data)
    path = next((tmp_path / "cache").iterdir())
    save_file(load_file(path), path, metadata=metadata)
    again = cached_sample(case, data)
    assert len(reads) == 2
    assert torch.equal(again.image, first.image)


def test_without_a_folder_nothing_is_kept(case: Case, reads: list[str]) -> None:
    for _ in range(2):
        cached_sample(case, data_config(None))
    assert len(reads) == 2


def test_a_draft_of_a_process_that_was_killed_is_cleared_after_an_hour(tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age_s in (("old.7.tmp", 7200), (".tmpOld", 7200), ("new.8.tmp", 60)):
        (folder / name).write_text("half")
        os.utime(folder / name, (time.time() - age_s,) * 2)
    cached_sample(case, data_config(folder))
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors") == ["new.8.tmp"]
