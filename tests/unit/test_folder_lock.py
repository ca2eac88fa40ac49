"""One run at a time in a folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from actors.run import run_federation
from gcml_ray.config.file import load_config
from gcml_ray.errors import CheckpointError, ConfigError
from gcml_ray.files.folder_lock import held
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import RoundRecord
from tests.fakes import FakeTrainers, fake_config
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


def test_a_run_stops_where_another_one_has_begun_in_a_new_folder_of_its_name(tmp_path: Path) -> None:
    """The first of both notices at its next round, writes nothing more, and leaves the second as it is."""
    config = fake_config(tmp_path, federation={"rounds": 4})
    folder = Path(config.output.folder)
    second = config.model_copy(update={"federation": config.federation.model_copy(update={"seed": 7})})
    listener = RecordingListener()

    def begin_anew(_: RoundRecord) -> None:
        if not (tmp_path / "moved").exists():
            folder.rename(tmp_path / "moved")
            run_federation(second, listener=RecordingListener(), stop=threading.Event(), make_trainer=FakeTrainers())

    listener.on_round_end = begin_anew  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"another run has begun in .*: the run folder was removed or moved"):
        run_federation(config, listener=listener, stop=threading.Event(), make_trainer=FakeTrainers())
    there, moved = RunFolder.open(folder), RunFolder.open(tmp_path / "moved")
    assert [record.plan.round_number for record in there.rounds()] == [1, 2, 3, 4]
    assert there.read_state().status == "finished"
    assert load_config(there.config_file).federation.seed == 7
    assert [record.plan.round_number for record in moved.rounds()] == [1]


def test_a_lock_file_that_was_tidied_away_stops_no_run(tmp_path: Path) -> None:
    with held(tmp_path / "run") as is_ours:
        (tmp_path / "run" / ".lock").unlink()
        assert is_ours()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run cannot be made"), held(tmp_path / "file" / "run"):
        raise AssertionError("never")


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'.*a\\x00b' cannot be the name of a folder"), held(tmp_path / "a\0b"):
        raise AssertionError("never")
