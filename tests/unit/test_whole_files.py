"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gcml_ray.files.whole_files import replace_file, replaced


def test_a_file_takes_the_place_of_the_one_before_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two\n"):
        replace_file(path, text)
        assert path.read_bytes() == text.encode()
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_file_before_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_text("before")

    def write_half() -> None:
        with replaced(path, draft=tmp_path / ".draft-a.nii.gz") as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert [each.name for each in tmp_path.iterdir()] == ["a.nii.gz"]
    assert path.read_text() == "before"


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    """What a write to a full disk raises names none."""
    with pytest.raises(OSError, match=r"table\.csv") as caught, replaced(tmp_path / "table.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "table.csv")
