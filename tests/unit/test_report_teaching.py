from __future__ import annotations

from pathlib import Path

import pytest

from gcml_ray.errors import DataError
from gcml_ray.files.run_folder import RunFolder
from gcml_ray.records import RoundRecord
from gcml_ray.report.teaching import plot_gains_by_method, plot_who_taught_whom
from tests.unit.test_teaching import past

ROUNDS = past({"A": (0.5,), "B": (0.5,)}, {"A": (0.6, "B", "server"), "B": (0.46, "A")})


def folder_of(path: Path, rounds: tuple[RoundRecord, ...]) -> RunFolder:
    path.mkdir()
    folder = RunFolder(path)
    for record in rounds:
        folder.append_round(record)
    return folder


def test_map_has_a_row_a_sender_a_column_a_receiver_and_no_server(tmp_path: Path) -> None:
    figure = plot_who_taught_whom(folder_of(tmp_path / "run", ROUNDS))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B", "C", "D"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["A", "B", "C", "D"]
    assert {text.get_text() for text in axes.texts} == {"+10.0", "-4.0", "(1)"}


def test_run_in_which_nobody_taught_has_no_map(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", past({"A": (0.5,)}, {"A": (0.6,)}))
    with pytest.raises(DataError, match="nobody is known to have taught anybody"):
        plot_who_taught_whom(folder)


def test_only_methods_that_push_get_a_panel(tmp_path: Path) -> None:
    alone = past({"A": (0.5,)}, {"A": (0.6,)})
    assert not plot_gains_by_method({"local": [alone]}, tmp_path / "none.png")
    assert plot_gains_by_method({"local": [alone], "gcml": [ROUNDS, ROUNDS]}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert not (tmp_path / "none.png").exists()
