"""The log of a run or a search in its folder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gcml_ray.files.log_file import logged_to

LOGGER = logging.getLogger("gcml_ray_log_file_test")


@pytest.fixture(autouse=True)
def level_before() -> None:
    LOGGER.setLevel(logging.ERROR)


def test_loggers_are_afterwards_as_they_were_before(tmp_path: Path) -> None:
    with logged_to(tmp_path / "log.txt", [LOGGER.name], only_there=True):
        LOGGER.info("inside")
        assert not LOGGER.propagate
    LOGGER.info("outside")
    assert (LOGGER.level, LOGGER.propagate, LOGGER.handlers) == (logging.ERROR, True, [])
    (line,) = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert line.endswith("INFO    gcml_ray_log_file_test: inside")


def test_a_run_that_ends_first_does_not_silence_the_other(tmp_path: Path) -> None:
    first, second = (logged_to(tmp_path / name, [LOGGER.name]) for name in ("first.txt", "second.txt"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    LOGGER.info("still here")
    second.__exit__(None, None, None)
    assert (tmp_path / "first.txt").read_text(encoding="utf-8") == ""
    assert "still here" in (tmp_path / "second.txt").read_text(encoding="utf-8")
    assert LOGGER.level == logging.ERROR


def test_only_wanted_records_are_written(tmp_path: Path) -> None:
    with logged_to(tmp_path / "log.txt", [LOGGER.name], is_wanted=lambda record: "a" in record.getMessage()):
        LOGGER.info("a")
        LOGGER.info("b")
    assert len((tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()) == 1


def test_a_name_that_is_no_utf_8_is_written_too(tmp_path: Path) -> None:
    with logged_to(tmp_path / "log.txt", [LOGGER.name], only_there=True):
        LOGGER.info("cannot read %s", "bad\udcff.nii")
    assert "cannot read bad\\udcff.nii" in (tmp_path / "log.txt").read_text(encoding="utf-8")
