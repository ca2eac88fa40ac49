"""The folder of an export: whole or not there, whatever ends the command."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gcml_ray.errors import ConfigError, ExportError
from gcml_ray.export.model import fresh_folder
from gcml_ray.files.model_card import CARD_FILE


def test_a_folder_that_holds_something_is_refused_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(ConfigError, match="exists already; give another folder, or --force"):  # noqa: SIM117
        with fresh_folder(tmp_path / "out", force=False):
            pass


def test_a_full_disk_names_the_folder_that_is_written_not_the_file_that_is_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device", "personalised.safetensors")
    with pytest.raises(ConfigError, match=r"--out .*out cannot be written \(No space left on device\); make room"):  # noqa: SIM117
        with fresh_folder(out, force=False):
            raise full
    gone = FileNotFoundError(errno.ENOENT, "No such file", "personalised.safetensors")
    with pytest.raises(FileNotFoundError), fresh_folder(out, force=False):
        raise gone


def test_force_writes_over_files_and_leaves_others_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for force, text in ((False, "old"), (True, "new")):
        with fresh_folder(out, force=force) as draft:
            (draft / "model.json").write_text(text)
        (out / "notes.txt").write_text("mine")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"model.json": "new", "notes.txt": "mine"}


def test_an_export_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ExportError), fresh_folder(tmp_path / "out", force=False) as draft:  # noqa: PT012
        (draft / "half").write_text("half")
        raise ExportError("broken")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_whole_until_an_export_is_ready(tmp_path: Path) -> None:
    """The draft is on the same disk, inside the folder, so that nothing has to be copied at the end."""
    out = tmp_path / "out"
    with fresh_folder(out, force=False) as draft:
        (draft / CARD_FILE).write_text("old card")
        (draft / "model.safetensors").write_text("old weights")
    with pytest.raises(ExportError), fresh_folder(out, force=True) as draft:  # noqa: PT012
        (draft / "model.safetensors").write_text("half")
        raise ExportError("broken")
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        CARD_FILE: "old card",
        "model.safetensors": "old weights",
    }


def test_the_card_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace_of = Path.replace

    def replace(path: Path, target: Path) -> Path:
        moved.append(path.name)
        return replace_of(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with fresh_folder(tmp_path / "out", force=False) as draft:
        for name in (CARD_FILE, "a.bin", "models/z.bin"):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(name)
    assert moved == ["a.bin", "z.bin", CARD_FILE]


def test_the_rest_of_an_export_that_was_killed_is_in_nobody_s_way(tmp_path: Path) -> None:
    left = tmp_path / "out" / ".export-abc" / "out"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    with fresh_folder(tmp_path / "out", force=False) as draft:
        (draft / CARD_FILE).write_text("card")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [CARD_FILE]
