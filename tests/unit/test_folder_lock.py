"""One run at a time in a folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from actors.federation import run_federation
from gcml_ray.errors import ConfigError
from gcml_ray.files.folder_lock import held
from tests.makers import make_config
from tests.runs import RecordingListener


def test_a_folder_that_is_held_is_refused_with_who_holds_it(tmp_path: Path) -> None:
    in_use = pytest.raises(ConfigError, match=rf"in use.*process {os.getpid()} on ")
    with held(tmp_path / "run"), in_use, held(tmp_path / "run"):
        raise AssertionError("never")
    with held(tmp_path / "run"):  # free again
        pass


def test_a_second_run_in_a_folder_in_use_changes_nothing_there(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = Path(config.output.folder)
    with held(folder), pytest.raises(ConfigError, match="in use"):
        run_federation(config, listener=RecordingListener(), stop=threading.Event())
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run cannot be made"), held(tmp_path / "file" / "run"):
        raise AssertionError("never")


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'.*a\\x00b' cannot be the name of a folder"), held(tmp_path / "a\0b"):
        raise AssertionError("never")
